"""The one exception for mistakes that a user can mend."""


class UserError(ValueError):
    """A problem with the user's input, files or options: one sentence that names it and says what to do.

    The command line prints the sentence and exits with status 1; `--debug` adds the traceback.
    """
