"""The one error that users meet: bad input, told with what was asked, what was given and the cure."""


class TqaiError(ValueError):
    """Raised for whatever a user can mend. The command prints it in one line; every other error keeps its traceback."""
