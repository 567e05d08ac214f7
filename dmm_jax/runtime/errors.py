"""Errors that the user can mend, lists of problems, and suggestions for a wrong name."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """An error that the user can mend: a wrong option, file or checkpoint; the message says what to do.

    The command line prints it in one line. Any other exception is a fault of this package and keeps its traceback.
    """


def refuse(title: str, problems: Iterable[str | bool | None], error: type[UserError] = UserError) -> None:
    """Raises one error that lists every problem; does nothing if there is none. False and None are skipped."""
    lines = [problem for problem in problems if problem]
    if lines:
        raise error(f"{title}:\n" + "\n".join(f"  - {line}" for line in lines))


def nearest(name: str, known: Iterable[str], cutoff: float = 0.0) -> str:
    """Returns the known name that is most like `name`, or "" if none reaches the cutoff (0 to 1)."""
    return next(iter(difflib.get_close_matches(name, list(known), 1, cutoff)), "")
