"""Where files live: on a file system or in a bucket; outputs are checked before any work is done."""

import contextlib
import glob
import importlib.util
import json
import os
import pathlib
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from typing import IO, Any

from etils import epath

from dmm_jax.runtime.errors import UserError

Location = pathlib.Path | epath.Path  # On a file system, or in a bucket; both have the methods of pathlib.
MAX_TEXT_BYTES = 2**27  # Of a config, or of a log: a line of metrics.jsonl takes about a kilobyte.
_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+")  # pathlib folds the two slashes into one.


def in_bucket(path: str | os.PathLike) -> bool:
    """Returns whether a path names an object store, SCHEME://..., instead of a file system."""
    return bool(_URL.match(os.fspath(path)))


def locate(path: str | os.PathLike) -> Location:
    """Returns the path of a run, which is a folder or gs://BUCKET/NAME; does not look whether it exists.

    Raises:
      UserError: the scheme is not gs, the bucket or the name in it is missing, or the package gcsfs is.
    """
    url = _URL.match(os.fspath(path))
    if not url:
        return pathlib.Path(path)
    scheme, inside = url[1], os.fspath(path)[url.end() :].strip("/")
    path = f"{scheme}://{inside}"
    if scheme != "gs":
        raise UserError(
            f"{path}: runs and latent caches are kept on a file system or in Google Cloud Storage, gs://BUCKET/NAME; "
            f"{scheme}:// has not been tried. Give a folder that all hosts share."
        )
    if "/" not in inside:
        raise UserError(f"{path} names a whole bucket. Give a place in it: {path.rstrip('/') or 'gs:/'}/NAME.")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{path} needs the package gcsfs: pip install gcsfs")
    os.environ["EPATH_USE_TF"] = "false"  # epath would load TensorFlow if it is installed.
    return epath.Path(path)


def check_bucket(path: Location) -> None:
    """Looks whether the bucket of a path can be used; does nothing for a folder.

    Raises:
      UserError: the bucket does not exist, no user is logged in, or the permission is missing.
    """
    if in_bucket(path):
        with bucket_errors(path):
            epath.Path(_bucket(path)).stat()


@contextlib.contextmanager
def bucket_errors(path: Location) -> Iterator[None]:
    """Turns errors of the block into one that tells how to make `path` usable, if `path` is in a bucket.

    Raises:
      UserError: the bucket does not exist, no user is logged in, or the permission is missing.
    """
    try:
        yield
    except Exception as error:  # gcsfs, google.auth and aiohttp have no common class.
        if isinstance(error, UserError) or not in_bucket(path):
            raise
        bucket, reason = _bucket(path), " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, FileNotFoundError):
            reason = f"there is no bucket {bucket}, or it is empty and may not be listed ({reason})"
        raise UserError(
            f"{path} cannot be used: {reason}. Make the bucket: gcloud storage buckets create {bucket}; log in here: "
            "gcloud auth application-default login; or let a cloud machine's service account use it: gcloud storage "
            f"buckets add-iam-policy-binding {bucket} --member=serviceAccount:NAME --role=roles/storage.admin"
        ) from error


def _bucket(path):
    return "/".join(os.fspath(path).split("/")[:3])


def read_text(path: Location) -> str:
    """Reads a text file; a byte order mark is dropped.

    Raises:
      UserError: the file is not UTF-8, is larger than MAX_TEXT_BYTES, or is no regular file (a FIFO blocks for ever).
    """
    if not in_bucket(path) and os.path.exists(path) and not os.path.isfile(path):  # For epath, a FIFO is a file.
        raise UserError(f"{path} is no regular file. Restore it from a copy, or move it away.")
    with path.open("rb") as file:
        raw = file.read(MAX_TEXT_BYTES + 1)
    if len(raw) > MAX_TEXT_BYTES:
        raise UserError(f"{path} is larger than {MAX_TEXT_BYTES} bytes. Restore it from a copy, or move it away.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8, or restore it."
        ) from None


def read_json(path: Location) -> Any:
    """Reads a JSON file.

    Raises:
      UserError: the file is not JSON in UTF-8, or is nested too deeply.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}). Restore it from a copy.") from None


def check_local(path: str | os.PathLike, description: str) -> pathlib.Path:
    """Returns the path.

    Args:
      description: of the files there, for the error.

    Raises:
      UserError: the path is in a bucket.
    """
    if in_bucket(path):
        path = _URL.sub(r"\1://", os.fspath(path), count=1)
        raise UserError(
            f"{path}: {description} must be on a file system, not in a bucket. Copy it to a local disk: "
            f"gcloud storage cp -r {path} FOLDER"
        )
    return pathlib.Path(path)


def check_output(folder: str | os.PathLike) -> pathlib.Path:
    """Returns `folder` if it is new or empty and can be written; makes nothing.

    Raises:
      UserError: it is a file or has a file's name, is not empty, cannot be written, or is in a bucket.
    """
    if pathlib.Path(folder).suffix == ".safetensors":
        raise UserError(f"{folder} is the name of a file; the output is a folder. Give a folder's name.")
    if in_bucket(folder):
        raise UserError(f"{folder}: an output is written to a folder. Give one, and copy it: gcloud storage cp -r")
    folder = pathlib.Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; the output is a folder. Give another path.")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; nothing is overwritten. Give a new folder or empty this one.")
    check_writable(folder)
    return folder


def check_output_file(path: pathlib.Path) -> pathlib.Path:
    """Returns `path` if nothing has that name and a file can be written there; makes nothing.

    Raises:
      UserError: it exists, its folder does not, or it cannot be written.
    """
    if path.exists():
        raise UserError(f"{path} exists; nothing is overwritten. Give another name.")
    if not path.absolute().parent.is_dir():
        raise UserError(f"there is no folder {path.parent} to write {path.name} in. Make it first.")
    check_writable(path)
    return path


def check_writable(path: pathlib.Path) -> None:
    """Looks at the nearest existing parent of `path` whether a file or folder can be made there; makes nothing.

    Raises:
      UserError: it cannot.
    """
    parent = path
    while not parent.exists():
        parent = parent.absolute().parent
    writable = os.access(parent, os.W_OK | os.X_OK)
    if parent != path and not parent.is_dir():
        raise UserError(f"{path} cannot be written: {parent} is a file. Give a path in a folder.")
    if not writable:
        raise UserError(f"{path} cannot be written: no permission in {parent}. Give a path that you may write.")


def part_of(path: pathlib.Path) -> pathlib.Path:
    """Returns the name under which this process writes a file or folder until it is complete.

    It is free: what an earlier process left under such a name is deleted, unless that process still runs.
    """
    host = socket.gethostname()
    own = path.with_name(f".{path.name}.{host}.{os.getpid()}.part")
    for part in path.parent.glob(f".{glob.escape(f'{path.name}.{host}')}.*.part"):
        pid = part.name.split(".")[-2]
        if part == own or (pid.isdecimal() and not _is_running(int(pid))):
            shutil.rmtree(part) if part.is_dir() and not part.is_symlink() else part.unlink()
    return own


@contextlib.contextmanager
def whole_file(path: Location, mode: str = "x") -> Iterator[IO]:
    """Yields a new file that becomes `path` at the end of the block, or is deleted after an error.

    Readers see a complete file or none. A link that another user puts in its place is replaced and not followed. An
    object of a bucket always appears as a whole.

    Args:
      mode: "x" for text in UTF-8, "xb" for bytes.
    """
    encoding = None if "b" in mode else "utf-8"
    if in_bucket(path):
        with path.open(mode.replace("x", "w"), encoding=encoding) as file:
            yield file
        return
    if path.is_dir():
        raise UserError(f"{path} is a folder, and a file is to be written there. Move it away.")
    temporary = part_of(path)
    try:
        with errors_name(path, temporary), temporary.open(mode, encoding=encoding) as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # Another user's.
        pass
    return True


@contextlib.contextmanager
def errors_name(path: str | os.PathLike, part: str | os.PathLike | None = None) -> Iterator[None]:
    """Adds a path to errors of the block that name none, such as that of a full disk, or that name one in `part`."""
    try:
        yield
    except OSError as error:
        if error.filename is None or (part and str(error.filename).startswith(os.fspath(part))):
            error.filename = os.fspath(path)
        raise


def write_text(path: Location, text: str) -> None:
    """Writes a text as `whole_file` does: a reader sees the old text or the new one."""
    with whole_file(path) as file:
        file.write(text)


@contextlib.contextmanager
def staged_folder(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary folder that becomes `folder` at the end of the block, or is deleted after an error.

    If `folder` exists, its other files remain: the new ones are moved in, `index.html` last. Into a bucket the files
    are copied.
    """
    if in_bucket(folder):
        with tempfile.TemporaryDirectory() as stage:
            yield pathlib.Path(stage)
            for path in _page_last(pathlib.Path(stage)):
                (locate(folder) / path.name).write_bytes(path.read_bytes())
        return
    folder = pathlib.Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    stage = part_of(folder)
    stage.mkdir()
    try:
        with errors_name(folder, stage):
            yield stage
        if folder.is_dir():
            for path in _page_last(stage):
                os.replace(path, folder / path.name)
        else:
            os.replace(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _page_last(folder):
    return sorted(folder.iterdir(), key=lambda path: path.name == "index.html")
