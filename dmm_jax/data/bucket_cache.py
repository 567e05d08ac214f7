"""A latent cache in a bucket, gs://BUCKET/NAME: `prepare` uploads complete files, and readers copy all of them once.

The bucket holds the same files as a folder. Until all are there, it has `preparing.json` instead of `cache.json`. Every
complete file of records has a note, so any host can continue an interrupted `prepare`. Objects appear as a whole, and
the note comes after what it describes.
"""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.processes import say
from dmm_jax.runtime.storage import Location, bucket_errors, check_local, errors_name, in_bucket, locate, staged_folder

HEADER, PREPARING = "cache.json", "preparing.json"
COPY_BYTES = 2**24


def cache_location(folder: str | os.PathLike) -> Location:
    """Returns the place of a latent cache: a folder, or gs://BUCKET/NAME.

    Raises:
      UserError: it is in another object store, or the package gcsfs is missing.
    """
    return locate(folder) if in_bucket(folder) else check_local(folder, "a latent cache")


def copy_of(bucket: Location, names: Iterable[str], header: Mapping) -> pathlib.Path:
    """Returns a folder of this host with a finished cache's files; they are copied once.

    The folder is `~/.cache/dmm_jax/latents/HASH`; HASH is of the place and the header.

    Args:
      names: of the files, which the caller has checked to be plain names.
      header: the contents of cache.json.

    Raises:
      UserError: the bucket lacks a file, or cannot be read.
    """
    names = list(dict.fromkeys(names))
    folder = host_folder("latents", [str(bucket), header])
    if folder.exists():
        return folder
    say(f"copying {len(names)} files of {bucket} to {folder}")
    with staged_folder(folder) as stage:
        for name in names:
            with (stage / name).open("xb") as file:
                for part in _parts(bucket / name):
                    file.write(part)
    return folder


def _parts(path: Location) -> Iterator[bytes]:
    """Yields the contents of an object; an error of the bucket says so, and one of this host's disk does not."""
    with bucket_errors(path):
        try:
            with path.open("rb") as file:
                while part := file.read(COPY_BYTES):
                    yield part
        except FileNotFoundError:
            raise UserError(f"{path.parent} lacks its file {path.name!r}. Delete it and run prepare again.") from None


def host_folder(kind: str, facts: Any) -> pathlib.Path:
    """Returns a folder `dmm_jax/KIND/HASH` under $XDG_CACHE_HOME, or under ~/.cache; HASH is of the facts, JSON."""
    cache = os.environ.get("XDG_CACHE_HOME")
    mark = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]
    return (pathlib.Path(cache) if cache else pathlib.Path.home() / ".cache") / "dmm_jax" / kind / mark


def upload(path: pathlib.Path, bucket: Location) -> None:
    """Moves a file to the bucket."""
    with bucket_errors(bucket), errors_name(path), path.open("rb") as file, (bucket / path.name).open("wb") as target:
        shutil.copyfileobj(file, target, COPY_BYTES)
    path.unlink()


def names_in(bucket: Location) -> set[str]:
    """Returns the names of the objects directly in a cache's place."""
    with bucket_errors(bucket):
        return {path.name for path in bucket.iterdir()} if bucket.exists() else set()


def check_unfinished(bucket: Location) -> None:
    """Raises UserError if a place in a bucket holds something else than a cache, finished or not."""
    names = names_in(bucket)
    if names and not names & {HEADER, PREPARING}:
        raise UserError(
            f"{bucket} is not empty and holds no latent cache ({', '.join(sorted(names)[:3])}). Set data.cache to a "
            "new place, which prepare makes."
        )
