"""Compiled programs are kept between runs, in a folder that nobody else can write to: JAX runs what it finds there."""

import os
import pathlib
import stat
import sys

import jax

from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.storage import check_local

MIN_COMPILE_TIME_S = 0.1  # What compiles faster is not kept.
OFF, PER_USER = "off", ""


def use_cache(folder: str = PER_USER) -> pathlib.Path | None:
    """Has JAX load the programs that an earlier run compiled, and keep those of this one; returns where, if anywhere.

    JAX_COMPILATION_CACHE_DIR and JAX_ENABLE_COMPILATION_CACHE, where they are set, come first.

    Args:
      folder: "": `per_user_folder()`; "off": keep nothing.

    Raises:
      ValueError: `folder` cannot be made, or somebody else may write to it.
    """
    if folder == OFF or not jax.config.jax_enable_compilation_cache:
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    if jax.config.jax_compilation_cache_dir:
        return pathlib.Path(jax.config.jax_compilation_cache_dir)
    try:
        path = checked(check_local(folder, "what is compiled").expanduser().absolute() if folder else per_user_folder())
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: there is no home.
        if folder:
            raise UserError(f"compilation_cache: {error}") from error
        print(f"Compiled programs are not kept: {error}", file=sys.stderr)
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_TIME_S)
    return path


def per_user_folder() -> pathlib.Path:
    """Returns `dmm_jax/xla` under $XDG_CACHE_HOME, or under ~/.cache."""
    told = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(told) if told else pathlib.Path.home() / ".cache") / "dmm_jax" / "xla"


def checked(path: pathlib.Path) -> pathlib.Path:
    """Makes the folder for this user alone.

    Raises:
      ValueError: it is there and is another user's, or others may write to it.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UserError(
            f"{path} holds programs that would be run, and others may write to it ({stat.filemode(found.st_mode)}, "
            f"owner {found.st_uid}). chmod 700 it, or name another folder."
        )
    return path
