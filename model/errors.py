"""The one exception that stands for a mistake of the user's."""


class UserError(Exception):
    """Something the user gave cannot be used; `str(error)` is one line that says what is wrong and what to do.

    The command line prints that line and exits with code 2. Anything else that is raised is a fault of ours.
    """
