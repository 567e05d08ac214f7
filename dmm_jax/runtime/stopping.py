"""SIGTERM and Ctrl-C stop a run at a saved step: clouds send SIGTERM before they take a machine away.

Before the first step there is nothing to save, and the process exits at once, even while it compiles. After it, the
training loop asks after every step whether to stop. All processes of a run stop at the same step. A second Ctrl-C exits
at once.
"""

import collections
import contextlib
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax
from jax._src import distributed
from jax.experimental import multihost_utils

from dmm_jax.runtime.errors import INTERRUPTED, Preempted
from dmm_jax.runtime.processes import PRINT_TIME_S, wait_for_all

POLL_S = 0.5  # How often a process looks, before its first step, whether another process received SIGTERM.
# Keys in the store that all processes share. The preemption service of JAX writes the first.
NOTICE_KEY, EXIT_KEY = "RECEIVED_PREEMPTION_NOTICE", "dmm_jax_leaves"
NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
AT_ONCE = "the step under way is not saved; run it again to resume from the last checkpoint."
EXIT_CODES = {signal.SIGTERM: 0, signal.SIGINT: INTERRUPTED}


class StopRequests:
    """Answers whether the run shall stop, in all its processes alike.

    Every process calls `begin()` before its first step, and then the object itself after the same steps.
    """

    def __init__(self):
        self._lock = threading.RLock()  # The signal handler may interrupt a thread that has it.
        self._has_begun, self._all_have_begun, self._requested = False, threading.Event(), threading.Event()
        self._signal = signal.SIGTERM  # The signal that was received, here or in another process.
        # After a signal before the first call, JAX proposes to stop at 1. A run that resumes at step 8 never reaches
        # step 1, so calls are counted instead of steps.
        self._calls = itertools.count(1) if jax.distributed.is_initialized() else None

    def begin(self) -> None:
        """Waits for all processes; from here on a signal no longer ends the process at once."""
        with self._lock:
            self._has_begun = True
        wait_for_all("first step")
        self._all_have_begun.set()

    def __call__(self) -> bool:
        """Returns whether to stop."""
        if self._calls:
            return multihost_utils.reached_preemption_sync_point(next(self._calls))
        return self._requested.is_set()

    def stopped(self, place: str) -> Preempted:
        """Returns the exception of a run that was saved at a place, such as "step 3 of 10"."""
        text = f"stopped by {NAMES[self._signal]} after {place}, which is saved."
        return Preempted(text, EXIT_CODES[self._signal])

    def forward(self, number: int, count: int) -> None:
        """Receives Ctrl-C as `receive` does, and passes it on to JAX's service as SIGTERM."""
        if count > 1:
            _exit(number, AT_ONCE)
        self._signal = signal.Signals(number)
        os.kill(os.getpid(), signal.SIGTERM)

    def receive(self, number: int, count: int) -> None:
        """Receives a signal for the `count`-th time; may be called twice for the same one."""
        with self._lock:
            if number == signal.SIGINT and count > 1:
                _exit(number, AT_ONCE)
            if not self._has_begun:
                _exit(number, "nothing had to be saved.")
            if number == signal.SIGINT and not self._requested.is_set():
                _print("\nStopping after this step, which is saved. Ctrl-C again stops at once.")
            self._signal = signal.Signals(number)
            self._requested.set()


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Receives SIGTERM and Ctrl-C for the block.

    Under jax.distributed its preemption service receives SIGTERM in any process. Otherwise a handler of Python does,
    which only the main thread can have; in another thread the signals keep their usual effect.
    """
    stop = StopRequests()
    with contextlib.ExitStack() as stack:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if jax.distributed.is_initialized():
            stack.enter_context(_from_any_process(stop))
            if in_main_thread:
                stack.enter_context(_signals((signal.SIGINT,), stop.forward))
        elif in_main_thread:
            stack.enter_context(_signals((signal.SIGTERM, signal.SIGINT), stop.receive))
        yield stop


@contextlib.contextmanager
def _signals(numbers: tuple[int, ...], receive: Callable[[int, int], None]) -> Iterator[None]:
    """Calls `receive(number, count)` for each of these signals that this process receives, twice.

    Python runs a handler only when the main thread returns from C++, for example after minutes of compiling. It writes
    a byte to the wake-up pipe at once, so a thread that reads the pipe handles the signal then.
    """
    counts = {"handler": collections.Counter(), "pipe": collections.Counter()}

    def count(source, number):
        counts[source][number] += 1
        receive(number, counts[source][number])

    def listen():
        with open(reading_end, "rb", buffering=0) as pipe:
            while byte := pipe.read(1):
                if byte[0] in previous:
                    count("pipe", byte[0])

    # Jobs in the background of a script ignore Ctrl-C, and shall go on ignoring it.
    previous = {number: signal.getsignal(number) for number in numbers}
    previous = {number: handler for number, handler in previous.items() if handler != signal.SIG_IGN}
    reading_end, writing_end = os.pipe()
    os.set_blocking(writing_end, False)
    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    previous_pipe = signal.set_wakeup_fd(writing_end, warn_on_full_buffer=False)
    for number in previous:
        signal.signal(number, lambda number, _: count("handler", number))
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_pipe)
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.close(writing_end)
        listener.join()  # It reads the rest of the pipe.


@contextlib.contextmanager
def _from_any_process(stop: StopRequests) -> Iterator[None]:
    """Lets all processes exit if one of them receives SIGTERM before its first step.

    A process that sees the notice before its first step sets a key, and every process that sees the key exits. A
    process at its first step waits there for all processes and still looks for the key. So either all processes reach
    their first step and none exits, or all exit.
    """

    def watch():
        while not stop._all_have_begun.wait(POLL_S):
            if _is_set(EXIT_KEY):
                _exit(stop._signal, "nothing had to be saved.")
            with stop._lock:
                if not stop._has_begun and _is_set(NOTICE_KEY):
                    distributed.global_state.client.key_value_set(EXIT_KEY, "", allow_overwrite=True)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop._all_have_begun.set()
        watcher.join()


def _is_set(key: str) -> bool:
    try:
        distributed.global_state.client.key_value_try_get(key)
    except jax.errors.JaxRuntimeError:  # The key does not exist.
        return False
    return True


def _print(line: str):
    """Prints on stderr, but not by `sys.stderr`: the interrupted code may be printing. The reader may be gone."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


def _exit(number: int, consequence: str):
    """Exits at once; process 0 prints the reason."""
    if distributed.global_state.process_id == 0:
        _print(f"dmm-jax train: stopped by {NAMES[number]}: {consequence}")
        if jax.distributed.is_initialized():
            time.sleep(PRINT_TIME_S)
    with contextlib.suppress(RuntimeError, OSError):
        sys.stderr.flush()
    os._exit(EXIT_CODES[number])
