"""What `smpl_jax` raises when a file cannot be used; everything else that is wrong with an argument is a plain
``ValueError``.
"""


class BodyFileError(ValueError):
    """A body file is missing, cut off, malformed, absurdly large, or asks for code to be run.

    The text names the file, what was expected, what was found, and what to do.
    """


class PoseFileError(ValueError):
    """A pose file is missing, cut off, holds no pose, or could mean more than one.

    The text names the file, what was expected, what was found, and what to do.
    """
