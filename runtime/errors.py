"""The one error that a user is meant to read."""


class UserError(ValueError):
    """A wrong flag, file, checkpoint or data set: one sentence that names it, what was found and what to do.

    The scripts print the message on stderr and exit with status 2, without a traceback.
    """
