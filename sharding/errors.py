"""The one error for the caller's mistake, raised wherever the mistake is known."""


class UserError(ValueError):
    """The caller's mistake: one line that says what, where and how to mend it. Exit code 2."""
