"""A lock that one process holds: two runs in one folder would destroy each other's files."""

import contextlib
import fcntl
import os
import pathlib
import socket
from collections.abc import Callable, Iterator

from dmm_jax.runtime import processes
from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.storage import Location, bucket_errors, in_bucket

NAME = ".lock"  # The lock in a workdir.


@contextlib.contextmanager
def lock(folder: Location, path: Location | None = None) -> Iterator[Callable[[], None]]:
    """Holds a folder for the block; yields a function that raises UserError if another process has taken it over.

    On a file system the kernel holds the lock (flock) and frees it when the process ends, however it ends: the file of
    a killed process is taken over. A bucket, and a file system without flock, hold nothing: the newest process takes
    over, and the older one ends when it looks.

    Args:
      path: the lock file; by default `NAME` in the folder.

    Raises:
      UserError: another process holds the folder; names its host and number.
    """
    path = path or folder / NAME
    if not processes.is_first():
        yield lambda: None
        return
    owner = f"process {os.getpid()} on {socket.gethostname()}"

    with bucket_errors(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:

        def take():
            stack.enter_context((_in_bucket if in_bucket(path) else _on_disk)(folder, path, owner))

        def check():
            if not path.is_file():  # Somebody has deleted it, and no other process has taken the folder.
                take()
            elif (other := path.read_text()) != owner:
                raise UserError(f"{folder} was taken over by {other}: this process ends, and saves nothing more.")

        take()
        try:
            yield check
        finally:
            if path.is_file() and path.read_text() == owner:
                path.unlink()


@contextlib.contextmanager
def _in_bucket(folder: Location, path: Location, owner: str) -> Iterator[None]:
    with bucket_errors(folder):
        if path.is_file():
            processes.say(
                f"{folder} is in use by {path.read_text()}, or that process was killed. This one takes over; the "
                "other, if it still runs, ends at its next save."
            )
        path.write_text(owner)
    yield


@contextlib.contextmanager
def _on_disk(folder: pathlib.Path, path: pathlib.Path, owner: str) -> Iterator[None]:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise UserError(
                f"{folder} is in use by {path.read_text() or 'another process'}, and two in one folder would destroy "
                "each other's files. Wait for it or stop it, or give another folder."
            ) from None
        except OSError:  # The file system has no locks.
            pass
        if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
            break
        os.close(file)  # Its last owner has just deleted it.
    try:
        os.truncate(file, 0)
        os.write(file, owner.encode())
        yield
    finally:
        os.close(file)
