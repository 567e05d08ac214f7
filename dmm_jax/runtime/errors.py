"""Errors that the user can mend, lists of problems, and suggestions for a wrong name."""

import difflib
from collections.abc import Iterable

REPORT = "this is a fault of dmm-jax; please open an issue with your command and the traceback above."


class UserError(ValueError):
    """An error that the user can mend: a wrong option, file or checkpoint; the message says what to do.

    The command line prints it in one line. Any other exception is a fault of this package and keeps its traceback.
    """


class UsageError(UserError):
    """A command-line option that does not exist, or a value that it cannot take."""


def refuse(title: str, problems: Iterable[str | bool | None], error: type[UserError] = UserError) -> None:
    """Raises one error that lists every problem; does nothing if there is none. False and None are skipped."""
    lines = [problem for problem in problems if problem]
    if lines:
        raise error(visible(f"{title}:\n" + "\n".join(f"  - {line}" for line in lines)))


def nearest(name: str, names: Iterable[str], cutoff: float = 0.0) -> str:
    """Returns the one of `names` that is most like `name`, or "" if none reaches the cutoff (0 to 1)."""
    return next(iter(difflib.get_close_matches(name, list(names), 1, cutoff)), "")


def visible(text: str) -> str:
    """Returns text that is safe for a terminal: control characters, which files can hold, are written as \\x1b."""
    return "".join(symbol if symbol.isprintable() or symbol == "\n" else ascii(symbol)[1:-1] for symbol in text)


def message(error: BaseException) -> str | None:
    """Returns the message for an error caused by the user or the machine; None for a fault of this package."""
    text = _message(error)
    return None if text is None else visible(text)


def _message(error: BaseException) -> str | None:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, (UserError, OSError, FloatingPointError)):
        return str(error)
    first_line = " ".join((str(error).splitlines() or [""])[0].split())[:300]
    if "Vmem" in str(error):
        return f"a kernel does not fit the chip's fast memory: {first_line} Avoid it with --config.attention=xla."
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return f"out of memory: {first_line} Compute fewer images at once (batch size), or smaller ones."
    if first_line.startswith("Unable to initialize backend"):  # A driver is missing, or another program has the device.
        return first_line
    if type(error).__name__ == "JaxRuntimeError":  # By its name, since importing JAX takes seconds.
        return f"the device cannot continue: {first_line}"
    return None
