"""Several processes as one run: they join under jax.distributed, speak with one voice, and end together.

Every process runs the same program on its own devices; the mesh spans all of them. Files and lines on the terminal
come from process 0. A process that fails ends at once, so that the others, which wait for it in a collective or miss
its heartbeat, fail too instead of hanging.
"""

import contextlib
import itertools
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator

import jax
from jax._src import distributed
from jax.experimental import multihost_utils

from dmm_jax.runtime.errors import UserError, message

JOIN_TIMEOUT_S = 300  # How long processes wait for each other at the start.
HEARTBEAT_TIMEOUT_S = 30  # A process not heard of for so long is dead, and ends the run.
POLL_S = 0.5  # How often a process asks before its first step whether another was told to stop.
LOST = 134  # The exit code of a process that has lost another, by JAX's hand or ours; xpk starts such a run again.
LAST_WORDS_S = 2  # Without process 0 the others are aborted: where all fail alike, it lets them speak first.


class Preempted(Exception):
    """The run was asked to stop (SIGTERM), and saved what it had."""


@contextlib.contextmanager
def joined(
    distributed: bool, coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Iterator[None]:
    """Makes this process one of several for the block; without arguments, does nothing.

    A failure inside ends the process after it was said on stderr, with exit code 1, or `LOST` where another process or
    the device was lost: the usual way out would wait for the other processes, and they for this one.

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
        raise UserError("--coordinator, --num-processes and --process-id go together: give all three.")
    try:
        with _ended_after(JOIN_TIMEOUT_S):
            jax.distributed.initialize(
                *given,
                initialization_timeout=2 * JOIN_TIMEOUT_S,  # JAX aborts with a stack trace: ours comes first.
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
            )
    except (ValueError, TypeError) as error:
        raise UserError(
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


@contextlib.contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """Ends this process with exit code 1 and what is missing if the block, which waits in C++, takes longer."""
    done = threading.Event()

    def watch():
        if not done.wait(seconds):
            print(f"dmm-jax train: error: {_missing(seconds)}", file=sys.stderr, flush=True)
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _missing(seconds: float) -> str:
    """Says why the processes have not joined: whether process 0 can be reached tells."""
    state = distributed.global_state
    if not state.coordinator_address:
        return f"the cluster did not tell within {seconds:.0f} s where process 0 is."
    host, port = state.coordinator_address.rsplit(":", 1)
    who = f"process {state.process_id} of {state.num_processes}"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=POLL_S).close()
    except OSError as error:
        return (
            f"{who} cannot reach process 0 at {host}:{port} ({error}), for {seconds:.0f} s. Start process 0 too, give "
            "all processes its address and a port that is open between the hosts."
        )
    return (
        f"{who} reaches process 0 at {host}:{port}, but not all {state.num_processes} processes came within "
        f"{seconds:.0f} s. Start each of them, with its own number from 0 to {state.num_processes - 1}."
    )


def _end(error: BaseException):
    """Says what happened and leaves without waiting for anyone."""
    text, code = str(error) or type(error).__name__, 1
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in text:
        code = LOST
        text = f"the device or another process is gone (if it was a process, its own log says why): {text}"
    elif message(error) is None and not isinstance(error, KeyboardInterrupt):
        traceback.print_exception(error)
    print(f"process {jax.process_index()} of {jax.process_count()} failed: {text}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if is_first():
        time.sleep(LAST_WORDS_S)
    os._exit(code)


def is_first() -> bool:
    """Tells whether this process writes the run's files and says its lines."""
    return jax.process_index() == 0


def say(line: str) -> None:
    """Prints a line on stderr, once for all processes of a run."""
    if is_first():
        print(line, file=sys.stderr, flush=True)


def check_joined() -> None:
    """Raises ValueError when the devices span processes that were not joined: a TPU pod's do so by themselves."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(f"this is one of {jax.process_count()} processes: start each with --distributed.")


def wait_for_all(where: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


@contextlib.contextmanager
def stop_requests() -> Iterator["StopRequests"]:
    """Hears SIGTERM, which clouds send before they take a machine away, for the block.

    Under jax.distributed its preemption service hears the signal in any process and lets all agree on a step; alone, a
    handler of our own does. Python gives signals to the main thread alone: in others nothing is heard.
    """
    if jax.distributed.is_initialized():
        hearing = _heard_by_all
    elif threading.current_thread() is threading.main_thread():
        hearing = _heard_here
    else:
        hearing = contextlib.nullcontext
    stop = StopRequests()
    with hearing(stop):
        yield stop


class StopRequests:
    """Whether the run was asked to stop; all its processes are told alike.

    Before `begin` nothing is unsaved: a request ends the process with exit code 0 at once, though it may be compiling,
    when Python's own handlers have to wait. Afterwards `stop()` tells, called by every process at the same places.
    """

    def __init__(self):
        self._lock = threading.RLock()  # A signal's handler may interrupt who holds it.
        self._has_begun, self._all_have_begun, self._asked = False, threading.Event(), threading.Event()
        # Counted from 1: after a signal before the first call all agree on 1, which no step of a resumed run is.
        self._calls = itertools.count(1) if jax.distributed.is_initialized() else None

    def begin(self) -> None:
        """Is called before the first step."""
        with self._lock:
            self._has_begun = True
        wait_for_all("first step")
        self._all_have_begun.set()

    def __call__(self) -> bool:
        """Tells whether to stop."""
        if self._calls:
            return multihost_utils.reached_preemption_sync_point(next(self._calls))
        return self._asked.is_set()


@contextlib.contextmanager
def _heard_here(stop: StopRequests) -> Iterator[None]:
    """Python's handler waits until the main thread comes back from C++; the byte it writes at once wakes a thread."""

    def heard(*_):
        with stop._lock:
            if not stop._has_begun:
                _leave()
            stop._asked.set()

    def listen():
        with open(listening, "rb", buffering=0) as signals:
            while byte := signals.read(1):
                if byte[0] == signal.SIGTERM:
                    heard()

    listening, written = os.pipe()
    os.set_blocking(written, False)
    threading.Thread(target=listen, daemon=True).start()
    before = signal.set_wakeup_fd(written, warn_on_full_buffer=False), signal.signal(signal.SIGTERM, heard)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before[0])
        signal.signal(signal.SIGTERM, before[1])
        os.close(written)


@contextlib.contextmanager
def _heard_by_all(stop: StopRequests) -> Iterator[None]:
    """Before the first step: who hears a notice there tells all to leave; who has come to the step waits for all.

    So either all have come to their first step, and then none leaves, or one was told before: it never comes, and all
    the others, who wait for it there at the latest, leave too.
    """
    notice, leave = "RECEIVED_PREEMPTION_NOTICE", "dmm_jax_leaves"  # The first is the preemption service's.

    def watch():
        while not stop._all_have_begun.wait(POLL_S):
            if _is_told(leave):
                _leave()
            with stop._lock:
                if not stop._has_begun and _is_told(notice):
                    distributed.global_state.client.key_value_set(leave, "", allow_overwrite=True)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop._all_have_begun.set()
        watcher.join()


def _is_told(key: str) -> bool:
    try:
        distributed.global_state.client.key_value_try_get(key)
    except jax.errors.JaxRuntimeError:  # Nobody has set it.
        return False
    return True


def _leave():
    """Ends this process, and by agreement all, where nothing is unsaved."""
    if distributed.global_state.process_id == 0:
        print("dmm-jax train: stopped by SIGTERM: nothing had to be saved.", file=sys.stderr)
        if jax.distributed.is_initialized():
            time.sleep(LAST_WORDS_S)  # Without process 0 the others are aborted.
    sys.stderr.flush()
    os._exit(0)
