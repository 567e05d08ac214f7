"""Keeps compiled programs on disk between runs, in a folder that only this user can write: JAX executes its files."""

import contextlib
import json
import os
import pathlib
import stat
import sys
import time
from collections.abc import Iterator

import jax

from dmm_jax.runtime import processes
from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.storage import write_text

TIMES = "compile_times.json"  # {what a program is: seconds of its last compilation}, in the folder of programs.
MAX_TIMES = 200
MINUTES = "this can take a minute or more"
FIRST = f"{MINUTES} the first time; later starts load what is compiled from the cache"
MIN_COMPILE_TIME_S = 0.1  # Programs that compile faster are not kept.


def use_cache() -> pathlib.Path | None:
    """Makes JAX load programs that an earlier run compiled and keep new ones; returns the folder, or None.

    The folder is $JAX_COMPILATION_CACHE_DIR, or `per_user_folder()`. JAX_ENABLE_COMPILATION_CACHE=0 keeps nothing.
    """
    if not jax.config.jax_enable_compilation_cache:
        return None
    if jax.config.jax_compilation_cache_dir:
        return pathlib.Path(jax.config.jax_compilation_cache_dir)
    try:
        path = per_user_folder()
        make_private(path)
    except (OSError, RuntimeError, UserError) as error:  # RuntimeError: the user has no home folder.
        print(f"Compiled programs are not kept: {error}", file=sys.stderr)
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_TIME_S)
    return path


def per_user_folder() -> pathlib.Path:
    """Returns `dmm_jax/xla` under $XDG_CACHE_HOME, or under ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(cache) if cache else pathlib.Path.home() / ".cache") / "dmm_jax" / "xla"


def make_private(path: pathlib.Path) -> None:
    """Makes a folder that only this user can write.

    Raises:
      UserError: the folder exists and belongs to another user, or other users may write to it.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UserError(
            f"{path} contains programs that would be executed, and others may write to it "
            f"({stat.filemode(status.st_mode)}, owner {status.st_uid}). chmod 700 it, or set JAX_COMPILATION_CACHE_DIR."
        )


@contextlib.contextmanager
def announced(title: str, program: str) -> Iterator[None]:
    """Prints that the block compiles a program, how long its last compilation took, and how long this one takes.

    Args:
      program: what the program depends on; equal texts are expected to take equally long.
    """
    folder = use_cache()
    path = folder and folder / TIMES
    times = _read_times(path)
    program = f"{program}, jax {jax.__version__}, {jax.device_count()} x {jax.devices()[0].device_kind}"
    last = f"the last time: {times[program]:.0f} s" if program in times else FIRST if path else MINUTES
    processes.say(f"Compiling {title} ({last})")
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    processes.say(f"Compiled {title} in {seconds:.0f} s")
    if path and processes.is_first():
        times = {name: value for name, value in _read_times(path).items() if name != program} | {program: seconds}
        with contextlib.suppress(OSError, UserError):  # A figure for the eye.
            folder.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(dict(list(times.items())[-MAX_TIMES:])))


def _read_times(path: pathlib.Path | None) -> dict[str, float]:
    try:
        times = json.loads(path.read_text(encoding="utf-8")) if path else {}
        return {name: float(seconds) for name, seconds in times.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
