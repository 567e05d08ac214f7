"""A run in several processes: they join under jax.distributed, print each line once, and end together.

Every process runs the same program on its own devices; the mesh spans all devices. Process 0 writes the files and
prints. A process that fails exits at once. The remaining processes, which wait for it in a collective or for its
heartbeat, then fail too instead of hanging.
"""

import contextlib
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator

import jax
from jax._src import distributed
from jax.experimental import multihost_utils
from tqdm import tqdm

from dmm_jax.runtime import terminal
from dmm_jax.runtime.errors import INTERRUPTED, REPORT, Preempted, UserError, message, visible

JOIN_TIMEOUT_S = 300  # How long processes wait for each other at the start.
HEARTBEAT_TIMEOUT_S = 30  # A process without a heartbeat for this long counts as dead and ends the run.
CONNECT_TIMEOUT_S = 0.5  # How long a process that could not join tries to reach process 0, to name the reason.
LOST = 134  # Exit code after the loss of another process, by JAX's abort or by ours; xpk restarts such a run.
PRINT_TIME_S = 2  # JAX aborts the remaining processes when process 0 exits; before, they have this time to print.


@contextlib.contextmanager
def joined(
    distributed: bool, coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Iterator[None]:
    """Makes this process one of several for the block; without arguments, does nothing.

    After a failure inside, prints the error and exits: with code `LOST` if another process or the device is lost,
    else with 1. A normal exit would wait for the other processes, which wait for this one.

    Args:
      distributed: ask the cluster (Cloud TPU, GKE, Slurm, Open MPI) for the remaining arguments.
      coordinator: HOST:PORT of process 0.

    Raises:
      UserError: no cluster answers, or only some of the last three arguments are set.
    """
    place = (coordinator, num_processes, process_id)
    if not distributed and place == (None, None, None):
        yield
        return
    if not distributed and None in place:
        raise UserError("--coordinator, --num-processes and --process-id go together: give all three.")
    try:
        with _exit_after(JOIN_TIMEOUT_S):
            jax.distributed.initialize(
                *place,
                initialization_timeout=2 * JOIN_TIMEOUT_S,  # After it, JAX aborts with a stack trace.
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
            )
    except (ValueError, TypeError) as error:
        raise UserError(
            f"the processes of this run cannot be joined: {error} Outside Cloud TPU, GKE, Slurm and Open MPI, give "
            "--coordinator HOST:PORT --num-processes N --process-id K in every process."
        ) from error
    try:
        yield
    except (Preempted, FloatingPointError):  # All processes raise them at the same step.
        jax.distributed.shutdown()
        raise
    except BaseException as error:
        _exit_with(error)
    jax.distributed.shutdown()


@contextlib.contextmanager
def _exit_after(seconds: float) -> Iterator[None]:
    """Prints why the processes did not join and exits with code 1, if the block (which waits in C++) takes longer."""
    done = threading.Event()

    def watch():
        if not done.wait(seconds):
            print(f"dmm-jax: error: {_join_failure(seconds)}", file=sys.stderr, flush=True)
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _join_failure(seconds: float) -> str:
    """Returns why the processes did not join: either process 0 cannot be reached, or some process is missing."""
    state = distributed.global_state
    if not state.coordinator_address:
        return f"the cluster did not report the address of process 0 within {seconds:.0f} s."
    host, port = state.coordinator_address.rsplit(":", 1)
    this = f"process {state.process_id} of {state.num_processes}"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return (
            f"{this} cannot reach process 0 at {host}:{port} ({error}), for {seconds:.0f} s. Start process 0 too, give "
            "all processes its address and a port that is open between the hosts."
        )
    return (
        f"{this} reaches process 0 at {host}:{port}, but not all {state.num_processes} processes joined within "
        f"{seconds:.0f} s. Start each of them, with its own number from 0 to {state.num_processes - 1}."
    )


def _exit_with(error: BaseException):
    """Prints the error and exits without waiting for the other processes."""
    text, code = message(error) or str(error) or type(error).__name__, 1
    if isinstance(error, KeyboardInterrupt):
        text, code = "interrupted", INTERRUPTED
    elif isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
        code = LOST
        text = f"the device or another process is gone (the log of that process names the cause): {error}"
    elif message(error) is None:
        traceback.print_exception(error)
        text = f"{text}: {REPORT}"
    print(f"process {jax.process_index()} of {jax.process_count()} failed: {text}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if is_first():
        time.sleep(PRINT_TIME_S)
    os._exit(code)


def is_first() -> bool:
    """Returns whether this process writes the run's files and prints its lines."""
    return jax.process_index() == 0


def say(line: str) -> None:
    """Prints a line about progress on stderr, once for all processes of a run; --quiet hides it."""
    if is_first() and not terminal.is_quiet():
        tqdm.write(visible(line), file=sys.stderr)  # Above a progress bar, if there is one.


def check_joined() -> None:
    """Raises UserError if the devices span processes that did not join; JAX makes the hosts of a TPU pod do so."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(f"this is one of {jax.process_count()} processes: start each with --distributed.")


def wait_for_all(place: str) -> None:
    """Returns when every process has called this function with the same name of a place in the program."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)
