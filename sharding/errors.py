"""The one error for the caller's mistake, raised wherever the mistake is known."""


class UserError(ValueError):
    """The caller's mistake: one line that says what, where and how to mend it. Exit code 2."""


def first_line(error: Exception) -> str:
    """The first line of an error's text that is not blank; its repr if there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
