"""Several processes as one run: they join under jax.distributed, speak with one voice, and end together.

Every process runs the same program on its own devices; the mesh spans all of them. Files and lines on the terminal
come from process 0. A process that fails ends at once, so that the others, which wait for it in a collective or miss
its heartbeat, fail too instead of hanging.
"""

import contextlib
import itertools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

HEARTBEAT_TIMEOUT_S = 30  # A process not heard of for so long is dead, and ends the run.
LAST_WORDS_S = 2  # Without process 0 the others are aborted: where all fail alike, it lets them speak first.
SAID_PLAINLY = (ValueError, OSError, FloatingPointError, KeyboardInterrupt)  # The rest needs its traceback.


class Preempted(Exception):
    """The run was asked to stop (SIGTERM), and saved what it had."""


@contextlib.contextmanager
def joined(
    distributed: bool, coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Iterator[None]:
    """Makes this process one of several for the block; without arguments, does nothing.

    A failure inside ends the process with exit code 1 after it was said on stderr: the usual way out would wait for the
    other processes, and they for this one.

    Args:
      distributed: ask the cluster (Cloud TPU, GKE, Slurm, Open MPI) for what is not given below.
      coordinator: HOST:PORT of process 0.

    Raises:
      ValueError: no cluster is there to ask, or only some of the three were given.
    """
    given = (coordinator, num_processes, process_id)
    if not distributed and given == (None, None, None):
        yield
        return
    if not distributed and None in given:
        raise ValueError("--coordinator, --num-processes and --process-id go together: give all three.")
    try:
        jax.distributed.initialize(*given, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"the processes of this run cannot be joined: {error} Outside Cloud TPU, GKE, Slurm and Open MPI, give "
            "--coordinator HOST:PORT --num-processes N --process-id K in every process."
        ) from error
    try:
        yield
    except (Preempted, FloatingPointError):  # All stop so, at the same step.
        jax.distributed.shutdown()
        raise
    except BaseException as error:
        _end(error)
    jax.distributed.shutdown()


def _end(error: BaseException):
    """Says what happened and leaves without waiting for anyone."""
    text = str(error) or type(error).__name__
    if isinstance(error, jax.errors.JaxRuntimeError):
        text = f"the device or another process is gone (if it was a process, its own log says why): {text}"
    elif not isinstance(error, SAID_PLAINLY):
        traceback.print_exception(error)
    print(f"process {jax.process_index()} of {jax.process_count()} failed: {text}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if is_first():
        time.sleep(LAST_WORDS_S)
    os._exit(1)


def is_first() -> bool:
    """Tells whether this process writes the run's files and says its lines."""
    return jax.process_index() == 0


def check_joined() -> None:
    """Raises ValueError when the devices span processes that were not joined: a TPU pod's do so by themselves."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ValueError(f"this is one of {jax.process_count()} processes: start each with --distributed.")


def wait_for_all(where: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Yields `asked(step)`, called by every process at every step: whether to stop after it, all of them alike.

    SIGTERM asks: clouds send it before they take a machine away. Under jax.distributed its preemption service hears the
    signal in any process and lets all agree on a step; alone, a handler of our own does.
    """
    if jax.distributed.is_initialized():
        # Counted from 1: after a signal before the first call all agree on 1, which no step of a resumed run is.
        calls = itertools.count(1)
        yield lambda step: multihost_utils.reached_preemption_sync_point(next(calls))
        return
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # Python gives signals to the main thread alone.
        yield lambda step: False
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield lambda step: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
