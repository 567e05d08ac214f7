"""Keeps compiled programs on disk between runs, in a folder that only this user can write: JAX executes its files."""

import os
import pathlib
import stat
import sys

import jax

from dmm_jax.runtime.errors import UserError

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
