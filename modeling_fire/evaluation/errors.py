"""The error of everything here that a user can mend."""


class EvaluationError(ValueError):
    """What cannot be evaluated. The message names what is at fault, and what would do."""
