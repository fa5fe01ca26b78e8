"""The error of everything here that a user can mend."""

from ..errors import FireError


class EvaluationError(FireError):
    """What cannot be evaluated. The message names what is at fault, and what would do."""
