"""Writes a latent cache shard by shard: the cache appears when it is complete, and an interrupted one is continued.

A shard is a fixed part of the source, so several processes write shards of one cache, each its own, and the cache is
the same for any number of them. A shard is complete when its note, NAME.json, exists.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from array_record.python import array_record_module
from jaxtyping import Float, Int

from dmm_jax.data.bucket_cache import HEADER, PREPARING, cache_location, host_folder, names_in, upload
from dmm_jax.data.cache import (
    LATENTS,
    TOKENS,
    CacheHeader,
    LatentCache,
    encode_record,
    partial_folder,
    read_header,
    write_header,
)
from dmm_jax.data.files import open_regular
from dmm_jax.runtime import processes, storage
from dmm_jax.runtime.errors import UserError, refuse
from dmm_jax.runtime.storage import bucket_errors, in_bucket

MAX_NOTE_BYTES = 1000


class CacheWriter:
    """Writes a cache to `folder + ".partial"`; `finish` moves it to `folder`.

    For a cache in a bucket the partial folder is this process's own, on this host; what is uploaded leaves it.

    In a run of several processes each of them has a writer of the same cache; process 0 makes and moves the folder.

    Raises:
        ValueError: the folder exists, or the interrupted cache has another header.
    """

    def __init__(self, folder: str | storage.Location, header: CacheHeader):
        """Opens the partial folder, and deletes shards in it that are not complete."""
        self.folder, self.header = cache_location(folder), header
        self.in_bucket = in_bucket(self.folder)
        if self.in_bucket:
            self.partial = host_folder("preparing", [str(self.folder), socket.gethostname(), jax.process_index()])
        else:
            self.partial = partial_folder(self.folder)
        if processes.is_first():
            self._open()
        processes.wait_for_all(f"opened {self.folder}")
        if self.in_bucket:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
            self._notes = {name for name in names_in(self.folder) if name.endswith(".json")}

    def _open(self) -> None:
        if (self.folder / HEADER if self.in_bucket else self.folder).exists():
            raise UserError(f"{self.folder} exists already. Delete it, or write elsewhere.")
        if self.in_bucket:
            self._open_in_bucket()
            return
        if self.partial.is_symlink():  # Another user may have put it there.
            raise UserError(f"{self.partial} is a link, and would lead the cache elsewhere. Delete it.")
        if (self.partial / "cache.json").exists():
            written = dataclasses.replace(read_header(self.partial), count=0, dropped=0, shards=())
            problems = written.differences(**dataclasses.asdict(self.header))
            refuse(f"{self.partial} has another recipe; delete it to start again", problems)
        with self._writing():
            self.partial.mkdir(parents=True, exist_ok=True)
            write_header(self.partial, self.header)
            for path in self.partial.glob("*.array_record"):
                if not path.with_suffix(".json").exists():
                    path.unlink()

    def _open_in_bucket(self) -> None:
        """Notes the recipe of the cache that is being prepared, or compares it with the noted one."""
        path, recipe = self.folder / PREPARING, json.dumps(dataclasses.asdict(self.header), sort_keys=True)
        with bucket_errors(self.folder):
            if not path.exists():
                storage.write_text(path, recipe)
        if storage.read_json(path) != json.loads(recipe):
            raise UserError(f"{self.folder} is being prepared by another recipe; delete it to start again.")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Adds the path and what to do to an error of the disk; array_record raises it as RuntimeError."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())[:200]
            raise UserError(
                f"{self.partial} cannot be written: {reason}. Free space and run prepare again; it continues after the "
                "last complete file."
            ) from error

    def _path(self, number: int, suffix: str) -> pathlib.Path:
        return self.partial / f"latents-{number:05d}{suffix}"

    def is_complete(self, number: int) -> bool:
        """Returns whether a shard has been written."""
        path = self._path(number, ".json")
        return path.name in self._notes if self.in_bucket else path.exists()

    @contextlib.contextmanager
    def shard(self, number: int) -> Iterator["Shard"]:
        """Opens a shard for the block, after which it is complete; if the block fails, the shard is deleted."""
        path = self._path(number, ".array_record")
        with self._writing():
            records = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        shard = Shard(self.header, records, self._writing)
        try:
            yield shard
            with self._writing():
                records.close()
        except BaseException:
            with contextlib.suppress(RuntimeError, OSError):  # The disk is full; the shard is incomplete anyway.
                records.close()
                path.unlink()
            raise
        with self._writing():
            if self.header.buckets:
                self._path(number, ".buckets").write_bytes(shard.buckets)
            note = json.dumps({"count": len(shard.buckets), "dropped": shard.dropped})
            storage.write_text(self._path(number, ".json"), note)
        for suffix in (".array_record", ".buckets", ".json") if self.in_bucket else ():
            if self._path(number, suffix).exists():
                upload(self._path(number, suffix), self.folder)

    def finish(self, num_shards: int) -> LatentCache:
        """Waits for all processes, moves the cache to its folder and opens it.

        Raises:
            ValueError: no shard has a record, or one is missing.
        """
        processes.wait_for_all(f"wrote {self.folder}")
        if processes.is_first():
            notes = [self._note(number) for number in range(num_shards)]
            shards = tuple((f"latents-{number:05d}.array_record", count) for number, (count, _) in enumerate(notes))
            count, dropped = np.sum(notes, axis=0).tolist()
            if not count:
                self.abandon()
                raise UserError(f"nothing was written to {self.partial}: no image could be read.")
            with self._writing():
                complete = dataclasses.replace(self.header, shards=shards, count=count, dropped=dropped)
                write_header(self.folder if self.in_bucket else self.partial, complete)
                if self.in_bucket:
                    (self.folder / PREPARING).unlink()
                else:
                    os.replace(self.partial, self.folder)
        processes.wait_for_all(f"finished {self.folder}")
        return LatentCache(self.folder)

    def _note(self, number: int) -> tuple[int, int]:
        """Returns how many records a shard has, and how many images it lacks."""
        path = self._path(number, ".json")
        if self.in_bucket:
            path = self.folder / path.name
        try:
            with path.open("rb") if self.in_bucket else open_regular(path) as stream:
                note = json.loads(stream.read(MAX_NOTE_BYTES))
            counts = note["count"], note["dropped"]
            if not all(type(count) is int and 0 <= count < 2**63 for count in counts):
                raise ValueError(f"wrong counts {counts}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}). Delete it and run prepare again.") from error
        return counts

    def abandon(self) -> None:
        """Deletes the folder of a cache of which no shard is complete."""
        if self.in_bucket:
            shutil.rmtree(self.partial, ignore_errors=True)
            if processes.is_first() and names_in(self.folder) == {PREPARING}:
                (self.folder / PREPARING).unlink()
        elif processes.is_first() and not any(self.partial.glob("latents-*.json")):
            shutil.rmtree(self.partial, ignore_errors=True)


class Shard:
    """A shard that is being written."""

    def __init__(self, header: CacheHeader, records, writing: Callable):
        """Takes array_record's writer, and a context that explains errors of the disk."""
        self.header, self._records, self._writing = header, records, writing
        self.buckets = bytearray()  # The bucket of each record.
        self.dropped = 0  # Images that could not be read.

    def add(
        self,
        latents: Float[np.ndarray, "B h w C"],
        input_ids: Int[np.ndarray, "B L"],
        frames: Int[np.ndarray, "B 4"],
        ids: Sequence[int],
        bucket: int = 0,
    ) -> None:
        """Writes a batch of examples of one bucket.

        Args:
            latents: scaled.
            frames: each image's original height and width, and top and left of the crop after scaling.
            ids: the images' ids in the source.

        Raises:
            ValueError: the cache cannot hold these shapes, token ids or values (NaN, beyond float16).
        """
        self._check(latents, input_ids, bucket)
        with self._writing():
            for example in zip(latents, input_ids, frames, ids, strict=True):
                self._records.write(encode_record(*example))
        self.buckets += bytes([bucket]) * len(latents)

    def _check(self, latents: np.ndarray, input_ids: np.ndarray, bucket: int) -> None:
        shape = self.header.shape_of(bucket)
        if latents.shape[1:] != shape or input_ids.shape[1:] != (self.header.num_tokens,):
            raise UserError(
                f"expected latents {shape} and {self.header.num_tokens} token ids per image; "
                f"got {latents.shape[1:]} and {input_ids.shape[1:]}. Check the VAE and the tokenizer."
            )
        limit = float(np.finfo(LATENTS).max)
        if not (np.abs(latents) <= limit).all():  # NaN fails too.
            raise UserError("latents hold NaN or values beyond float16. Run the networks in float32 or bfloat16.")
        if input_ids.min() < 0 or input_ids.max() > np.iinfo(TOKENS).max:
            raise UserError(f"token ids must be in 0 to 65535; got {input_ids.min()} to {input_ids.max()}.")
