"""The exception for mistakes of the user."""


class UserError(Exception):
    """The user gave something that cannot be used. `str(error)` is one line that says what is wrong and what to do.

    The command lines print that line and exit with code 2. Any other exception is a bug in this project.
    """
