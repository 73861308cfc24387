"""The one exception for mistakes that a user can mend, and a hint for misspelt names."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A problem with the user's input, files or options: one sentence that names it and says what to do.

    The command line prints the sentence and exits with status 1; `--debug` adds the traceback.
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`, did you mean NAME?` when one of the known names is close, otherwise nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else ""
