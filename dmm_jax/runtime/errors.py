"""Errors that the user can mend, lists of problems, and suggestions for a wrong name."""

import contextlib
import difflib
from collections.abc import Callable, Iterable, Iterator

INTERRUPTED = 130  # Exit code after Ctrl-C.
FULL_DISK = ("No space left on device", "Disk quota exceeded")
LIKENESS = 0.6  # A name is suggested if it is so similar to the unknown one, from 0 to 1.
REPORT = "this is a fault of dmm-jax; please open an issue with your command and the traceback above."


class UserError(ValueError):
    """An error that the user can mend: a wrong option, file or checkpoint; the message says what to do.

    The command line prints it in one line. Any other exception is a fault of this package and keeps its traceback.
    """


class Preempted(Exception):
    """A signal stopped the run after it saved its state."""

    def __init__(self, text: str, exit_code: int):
        """Takes what happened, and the exit code of the command line."""
        super().__init__(text)
        self.exit_code = exit_code


class UsageError(UserError):
    """A command-line option that does not exist, or a value that it cannot take."""


@contextlib.contextmanager
def naming_option(option: str) -> Iterator[None]:
    """Puts the name of an option before the message of an error that its value causes in the block."""
    try:
        yield
    except UserError as error:
        error.args = (f"{option}: {error}",)
        raise


def refuse(title: str, problems: Iterable[str | bool | None], error: type[UserError] = UserError) -> None:
    """Raises one error that lists every problem; does nothing if there is none. False and None are skipped."""
    lines = [problem for problem in problems if problem]
    if lines:
        raise error(visible(f"{title}:\n" + "\n".join(f"  - {line}" for line in lines)))


def nearest(name: str, names: Iterable[str], likeness: float = LIKENESS) -> str:
    """Returns the one of `names` that is most like `name`, or "" if none is; case makes no difference."""
    spellings = {other.lower(): other for other in names}
    near = difflib.get_close_matches(name.lower(), spellings, 1, likeness)
    return spellings[near[0]] if near else ""


def meant(name: str, names: Iterable[str], show: Callable[[str], str] = str, likeness: float = LIKENESS) -> str:
    """Returns "; did you mean X?" for the nearest of `names`, or "." if none is near: the end of a sentence."""
    near = nearest(name, names, likeness)
    return f"; did you mean {show(near)}?" if near else "."


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
        return (
            f"a kernel does not fit the chip's fast memory: {first_line} In `train`, --config.attention=xla avoids it."
        )
    if any(reason in str(error) for reason in FULL_DISK):
        return f"the disk is full: {first_line} Free some space and run it again."
    if isinstance(error, RecursionError):
        return "a file refers to itself, or is nested too deeply: look at config.json of the runs that are named."
    if isinstance(error, MemoryError):
        return f"this machine is out of memory: {first_line or 'nothing more can be allocated'}"
    if "RESOURCE_EXHAUSTED" in str(error):
        return f"the device is out of memory: {first_line} Where it computes images: fewer at once, or smaller ones."
    if first_line.startswith("Unable to initialize backend"):  # A driver is missing, or another program has the device.
        return first_line
    if type(error).__name__ == "JaxRuntimeError":  # By its name, since importing JAX takes seconds.
        return f"the device cannot continue: {first_line}"
    return None
