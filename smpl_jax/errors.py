"""Exceptions for files that cannot be used. Other invalid arguments raise ``ValueError``."""


class BodyFileError(ValueError):
    """A body file is missing, cut off, malformed or too large, or would run code.

    The text names the file, what was expected, what was found, and what to do.
    """


class PoseFileError(ValueError):
    """A pose file is missing, cut off or ambiguous, or contains no pose.

    The text names the file, what was expected, what was found, and what to do.
    """
