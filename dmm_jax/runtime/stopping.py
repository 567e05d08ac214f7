"""SIGTERM stops a run at a saved step: clouds send it before they take a machine away.

Before the first step there is nothing to save, and the process exits at once with code 0, even while it compiles. After
it, the training loop asks after every step whether to stop. All processes of a run stop at the same step.
"""

import contextlib
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import jax
from jax._src import distributed
from jax.experimental import multihost_utils

from dmm_jax.runtime.processes import PRINT_TIME_S, wait_for_all

POLL_S = 0.5  # How often a process looks, before its first step, whether another process received SIGTERM.
# Keys in the store that all processes share. The preemption service of JAX writes the first.
NOTICE_KEY, EXIT_KEY = "RECEIVED_PREEMPTION_NOTICE", "dmm_jax_leaves"


class StopRequests:
    """Answers whether the run shall stop, in all its processes alike.

    Every process calls `begin()` before its first step, and then the object itself after the same steps.
    """

    def __init__(self):
        self._lock = threading.RLock()  # The signal handler may interrupt a thread that has it.
        self._has_begun, self._all_have_begun, self._requested = False, threading.Event(), threading.Event()
        # After a signal before the first call, JAX proposes to stop at 1. A run that resumes at step 8 never reaches
        # step 1, so calls are counted instead of steps.
        self._calls = itertools.count(1) if jax.distributed.is_initialized() else None

    def begin(self) -> None:
        """Waits for all processes; from here on SIGTERM no longer ends the process at once."""
        with self._lock:
            self._has_begun = True
        wait_for_all("first step")
        self._all_have_begun.set()

    def __call__(self) -> bool:
        """Returns whether to stop."""
        if self._calls:
            return multihost_utils.reached_preemption_sync_point(next(self._calls))
        return self._requested.is_set()


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Receives SIGTERM for the block.

    Under jax.distributed its preemption service receives the signal in any process. Otherwise a handler of Python
    does, which only the main thread can have; in another thread the signal keeps its usual effect.
    """
    if jax.distributed.is_initialized():
        receive = _from_any_process
    elif threading.current_thread() is threading.main_thread():
        receive = _from_signal_handler
    else:
        receive = contextlib.nullcontext
    stop = StopRequests()
    with receive(stop):
        yield stop


@contextlib.contextmanager
def _from_signal_handler(stop: StopRequests) -> Iterator[None]:
    """Receives SIGTERM in this process.

    Python runs a handler only when the main thread returns from C++, for example after minutes of compiling. It writes
    a byte to the wake-up pipe at once, so a thread that reads the pipe handles the signal then.
    """

    def handle(*_):
        with stop._lock:
            if not stop._has_begun:
                _exit()
            stop._requested.set()

    def listen():
        with open(reading_end, "rb", buffering=0) as pipe:
            while byte := pipe.read(1):
                if byte[0] == signal.SIGTERM:
                    handle()

    reading_end, writing_end = os.pipe()
    os.set_blocking(writing_end, False)
    threading.Thread(target=listen, daemon=True).start()
    previous_pipe = signal.set_wakeup_fd(writing_end, warn_on_full_buffer=False)
    previous_handler = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_pipe)
        signal.signal(signal.SIGTERM, previous_handler)
        os.close(writing_end)


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
                _exit()
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


def _exit():
    """Exits with code 0 before the first step; process 0 prints the reason."""
    if distributed.global_state.process_id == 0:
        print("dmm-jax train: stopped by SIGTERM: nothing had to be saved.", file=sys.stderr)
        if jax.distributed.is_initialized():
            time.sleep(PRINT_TIME_S)
    sys.stderr.flush()
    os._exit(0)
