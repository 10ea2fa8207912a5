"""python -m scripts.bench COMMAND: side_by_side.py lists the commands."""

import sys


def main(words: list[str]) -> int:
    if words[:1] == ["accelerator"]:
        # Here: it runs where packages that the other commands need are not installed.
        from scripts.bench import accelerator

        return accelerator.main(words[1:])
    from scripts.bench import side_by_side  # here: it needs them

    return side_by_side.command(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
