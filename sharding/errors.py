"""The one error for the caller's mistake, raised wherever the mistake is known."""

import contextlib
from collections.abc import Iterator

LARGEST = 1e100  # the largest score or log-prob in a row: sums of their squares are finite


class UserError(ValueError):
    """The caller's mistake: one line that says what, where and how to mend it. Exit code 2."""

    def __str__(self) -> str:
        return printable(super().__str__())


@contextlib.contextmanager
def at(place: str) -> Iterator[None]:
    """Put the place of a mistake before the text of a UserError that is raised within."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def printable(text: str) -> str:
    """The text as one short line of printable characters: names in it may come from anyone."""
    text = text if len(text) < 2000 else f"{text[:1500]} … {text[-400:]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def check_least(args, **least: int) -> None:
    """Raise UserError for a flag, a field of `args`, that is set and below its `least` value."""
    for name, limit in least.items():
        if (value := getattr(args, name)) is not None and value < limit:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be at least {limit}")


def check_scheme(path: str, name: str = "") -> None:
    """Raise UserError for every scheme but gs://. name: the flag, for that line."""
    scheme, separator, _ = str(path).partition("://")
    if separator and scheme != "gs":
        raise UserError(
            f"{name} {path}: {scheme}:// is not supported: give a local path or gs://…".lstrip()
        )


def first_line(error: Exception) -> str:
    """The first line of an error's text that is not blank; its repr if there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
