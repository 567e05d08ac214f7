"""Runs generated hostile cases: each ends well, or in an error for the user, within bounds of time and memory.

A case depends on its number alone. DMM_JAX_HOSTILE_CASES=1000 runs 1,000 cases of every generator, and
DMM_JAX_HOSTILE_CASES=500:1000 the second half of them.
"""

import collections
import os
import pathlib
import random
import resource
import shutil
import signal
import warnings
from collections.abc import Callable

from dmm_jax.runtime.errors import UserError, visible

MAX_SECONDS, MAX_GROWTH_MB, MAX_CHARS, MAX_LINE_CHARS = 20, 1024, 20_000, 2_000
FIRST_NAMED = 20  # Faults that a failing test prints.
SPECIAL = ("fifo", "folder", "itself", "..", "nothing", "/dev/zero", "/dev/full", "/proc/version", "huge")
HUGE_BYTES = 2**33  # A file with a hole takes no space on the disk.


class TooLong(BaseException):
    """A case takes longer than MAX_SECONDS; no `except Exception` of the package catches it."""


def case_numbers(default: int) -> range:
    """Returns the numbers of the cases that DMM_JAX_HOSTILE_CASES selects."""
    first, _, end = os.environ.get("DMM_JAX_HOSTILE_CASES", str(default)).rpartition(":")
    return range(int(first or 0), int(end))


def run(case: Callable[[random.Random, pathlib.Path], bool], tmp_path: pathlib.Path, default: int) -> None:
    """Runs the selected cases, each in a new folder, and asserts that they end well or are refused.

    Args:
      case: takes a random generator and a path that does not exist; returns whether what it made there can be used,
        or raises.
      default: the number of cases without DMM_JAX_HOSTILE_CASES.
    """
    numbers, outcomes, faults = case_numbers(default), collections.Counter(), []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    previous = signal.signal(signal.SIGALRM, _stop)
    for number in numbers:
        folder = tmp_path / f"case_{number}"
        signal.alarm(MAX_SECONDS)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outcomes["usable" if case(random.Random(number), folder / "it") else "refused"] += 1
        except UserError as error:
            outcomes["refused"] += 1
            faults += [f"case {number}: {fault}" for fault in message_faults(error)]
        except (Exception, TooLong) as error:
            faults.append(f"case {number}: {type(error).__name__}: {str(error)[:300]}")
        finally:
            signal.alarm(0)
        if (growth := resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) > MAX_GROWTH_MB * 1024:
            faults.append(f"case {number}: the memory grew by {growth // 1024} MB")
            break
        shutil.rmtree(folder, ignore_errors=True)
    signal.signal(signal.SIGALRM, previous)
    print(f"cases {numbers.start} to {numbers.stop - 1}: {dict(outcomes)}, {growth // 1024} MB more")
    assert not faults, f"{len(faults)} faults:\n" + "\n".join(faults[:FIRST_NAMED])
    assert min(outcomes["usable"], outcomes["refused"]) >= len(numbers) // 8


def message_faults(error: UserError) -> list[str]:
    """Returns what is wrong with an error's text: overlong, or not safe for a terminal."""
    text = str(error)
    faults = {
        "a message of too many characters": len(text) > MAX_CHARS,
        "a line of too many characters": max(map(len, text.splitlines() or [""])) > MAX_LINE_CHARS,
        "no message": not text.strip(),
        "an invisible character": visible(text) != text,
    }
    return [f"{fault}: {text[:300]!r}" for fault, present in faults.items() if present]


def replace_by_special(rng: random.Random, path: pathlib.Path) -> None:
    """Replaces a file by something else than a small regular file."""
    path.unlink()
    kind = rng.choice(SPECIAL)
    if kind in ("fifo", "folder"):
        (os.mkfifo if kind == "fifo" else os.mkdir)(path)
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(HUGE_BYTES)
    else:
        path.symlink_to(path.name if kind == "itself" else kind)


def _stop(*_):
    raise TooLong(f"more than {MAX_SECONDS} s")
