"""What the terminal shows: how much, and in which colours."""

import os
import sys

QUIET, NORMAL, VERBOSE = range(3)  # Results, warnings and errors alone; progress too; tracebacks and foreign logs too.
_CODES = {"bold": 1, "red": 31, "green": 32, "yellow": 33, "cyan": 36}
_settings = {"verbosity": NORMAL}


def set_verbosity(level: int) -> None:
    """Sets how much the following lines of this process show: QUIET, NORMAL or VERBOSE."""
    _settings["verbosity"] = level


def is_quiet() -> bool:
    """Tells whether progress is not shown."""
    return _settings["verbosity"] == QUIET


def is_verbose() -> bool:
    """Tells whether tracebacks of mendable errors and the logs of other libraries are shown."""
    return _settings["verbosity"] == VERBOSE


def paint(text: str, colour: str, stream=None) -> str:
    """Returns text in a colour, or bold, if the stream (stdout by default) is a terminal that has colours.

    The variable NO_COLOR, if it is set and not empty, switches colours off (no-color.org).
    """
    stream = stream or sys.stdout
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    if plain or not getattr(stream, "isatty", bool)():
        return text
    return f"\x1b[{_CODES[colour]}m{text}\x1b[0m"


def table(rows, *, aligned_left: int = 1) -> str:
    """Lays rows of texts out in columns of equal width; the first `aligned_left` columns start at the left."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if number < aligned_left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
