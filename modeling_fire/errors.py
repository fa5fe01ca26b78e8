"""The errors that a user can mend."""

import errno
import os


# What the system says of a file that cannot be written to its end; libraries repeat it in errors of their own.
FULL_DISK = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


class FireError(ValueError):
    """What was asked for cannot be done. The message names what is at fault, and what would do."""


class TextError(FireError):
    """A text that cannot be read, or that does not fit the model."""


class EvaluationError(FireError):
    """What cannot be evaluated."""
