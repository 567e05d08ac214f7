"""Folders: where a run lives, here or in a bucket; what must lie here; outputs, looked at before any work is done."""

import contextlib
import importlib.util
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator

from etils import epath

from dmm_jax.runtime.errors import UserError

Location = pathlib.Path | epath.Path  # On a file system; in a bucket. Both have pathlib's methods.
_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+")  # pathlib folds the two slashes into one.


def in_bucket(path: str | os.PathLike) -> bool:
    """Tells whether a path names an object store, SCHEME://..., and no file system."""
    return bool(_URL.match(os.fspath(path)))


def locate(path: str | os.PathLike) -> Location:
    """Returns the path of a run: a folder, or gs://BUCKET/NAME; asks nobody whether it is there.

    Raises:
      ValueError: another scheme than gs, no bucket or no name in it, or the package that reads buckets is missing.
    """
    url = _URL.match(os.fspath(path))
    if not url:
        return pathlib.Path(path)
    scheme, inside = url[1], os.fspath(path)[url.end() :].strip("/")
    path = f"{scheme}://{inside}"
    if scheme != "gs":
        raise UserError(
            f"{path}: a run is kept on a file system or in Google Cloud Storage, gs://BUCKET/NAME; "
            f"{scheme}:// has not been tried. Give a folder that all hosts share."
        )
    if "/" not in inside:
        raise UserError(f"{path} names a whole bucket. Give a place in it: {path.rstrip('/') or 'gs:/'}/NAME.")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{path} needs the package gcsfs: pip install gcsfs")
    os.environ["EPATH_USE_TF"] = "false"  # Where TensorFlow is installed, epath would load it for this.
    return epath.Path(path)


def check_bucket(path: Location) -> None:
    """Asks the store of a path in a bucket for the bucket; does nothing for a folder.

    Raises:
      ValueError: there is no such bucket, nobody is logged in, or the permission is missing.
    """
    if not in_bucket(path):
        return
    with bucket_errors(path):
        epath.Path(_bucket(path)).stat()


@contextlib.contextmanager
def bucket_errors(path: Location) -> Iterator[None]:
    """Says of what goes wrong in the block with a path in a bucket what to do; of a folder's errors nothing is changed.

    Raises:
      ValueError: there is no such bucket, nobody is logged in, or the permission is missing.
    """
    try:
        yield
    except Exception as error:  # gcsfs, google.auth and aiohttp have no common class.
        if not in_bucket(path):
            raise
        bucket, said = _bucket(path), " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, FileNotFoundError):
            said = f"there is no bucket {bucket}, or it is empty and may not be looked at ({said})"
        raise UserError(
            f"{path} cannot be used: {said}. Make the bucket: gcloud storage buckets create {bucket}; log in here: "
            "gcloud auth application-default login; or let a cloud machine's service account use it: gcloud storage "
            f"buckets add-iam-policy-binding {bucket} --member=serviceAccount:NAME --role=roles/storage.admin"
        ) from error


def _bucket(path):
    return "/".join(os.fspath(path).split("/")[:3])


def check_local(path: str | os.PathLike, what: str) -> pathlib.Path:
    """Returns the path of `what` is read here.

    Raises:
      ValueError: it is in a bucket.
    """
    if in_bucket(path):
        path = _URL.sub(r"\1://", os.fspath(path), count=1)
        raise UserError(
            f"{path}: {what} must lie on a file system, not in a bucket. Copy it to a local disk: "
            f"gcloud storage cp -r {path} FOLDER"
        )
    return pathlib.Path(path)


def check_output(folder: str | os.PathLike) -> pathlib.Path:
    """Returns `folder` if it is new or empty and can be written; makes nothing.

    Raises:
      ValueError: it is a file, is not empty, lies where nothing can be written, or in a bucket.
    """
    if in_bucket(folder):
        raise UserError(f"{folder}: an output is written to a folder. Give one, and copy it: gcloud storage cp -r")
    folder = pathlib.Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; the output is a folder. Give another path.")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; nothing is overwritten. Give a new folder or empty this one.")
    check_writable(folder)
    return folder


def check_writable(path: pathlib.Path) -> None:
    """Looks whether a file or folder can be written at `path`, by its nearest parent that is there; makes nothing.

    Raises:
      ValueError: it cannot.
    """
    parent = path
    while not parent.exists():
        parent = parent.absolute().parent
    writable = os.access(parent, os.W_OK | os.X_OK)
    if parent != path and not parent.is_dir():
        raise UserError(f"{path} cannot be written: {parent} is a file. Give a path in a folder.")
    if not writable:
        raise UserError(f"{path} cannot be written: no permission in {parent}. Give a path that you may write.")


@contextlib.contextmanager
def staged_folder(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary folder beside `folder`, which takes its place at the end, or is deleted on an error.

    A folder that is there already keeps its other files: the new ones are moved in, `index.html` last. Into a bucket
    they are copied.
    """
    if in_bucket(folder):
        with tempfile.TemporaryDirectory() as part:
            yield pathlib.Path(part)
            for path in _page_last(pathlib.Path(part)):
                (locate(folder) / path.name).write_bytes(path.read_bytes())
        return
    folder = pathlib.Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.parent / f".{folder.name}.{os.getpid()}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        if folder.is_dir():
            for path in _page_last(part):
                os.replace(path, folder / path.name)
        else:
            os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _page_last(folder):
    return sorted(folder.iterdir(), key=lambda path: path.name == "index.html")
