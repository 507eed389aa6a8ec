"""The one exception that means "the caller can fix this"."""


class UserError(ValueError):
    """Bad input: a file, a setting or a message that cannot be used.

    The text says what was expected, what was found, where, and what to do. The command line prints it as one line and exits with status 2;
    library callers may catch it as a ``ValueError``.
    """
