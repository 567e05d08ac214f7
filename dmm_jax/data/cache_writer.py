"""Writes a latent cache shard by shard: the cache appears when it is complete, and an interrupted one is continued."""

import contextlib
import dataclasses
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence

import numpy as np
from array_record.python import array_record_module
from jaxtyping import Float, Int

from dmm_jax.data.cache import (
    LATENTS,
    TOKENS,
    CacheHeader,
    LatentCache,
    buckets_file,
    encode_record,
    partial_folder,
    read_header,
    write_header,
)
from dmm_jax.runtime.errors import UserError, refuse
from dmm_jax.runtime.storage import check_local


class CacheWriter:
    """Writes a cache to `folder + ".partial"` and moves it to `folder` when it is complete.

    A new writer for an interrupted cache continues after its last complete shard.

    Raises:
        ValueError: the folder exists, or the interrupted cache has another header.
    """

    def __init__(self, folder: str | pathlib.Path, header: CacheHeader):
        """Opens the partial folder; the writer fills in the header's `count`, `dropped` and `shards`."""
        self.folder = check_local(folder, "a latent cache")
        self.partial = partial_folder(self.folder)
        self.header, self.next_index = header, 0
        self._shard, self._buckets = None, bytearray()
        if self.folder.exists():
            raise UserError(f"{self.folder} exists already. Delete it, or write elsewhere.")
        if (self.partial / "cache.json").exists():
            self._resume(header)
        with self._writing():
            self.partial.mkdir(parents=True, exist_ok=True)
            complete = {name for name, _ in self.header.shards}
            for name in {path.name for path in self.partial.glob("*.array_record")} - complete:
                (self.partial / name).unlink()

    def _resume(self, header: CacheHeader) -> None:
        written, extra = read_header(self.partial)
        recipe = dataclasses.replace(written, count=0, dropped=0, shards=())
        problems = recipe.differences(**dataclasses.asdict(header))
        refuse(f"{self.partial} has another recipe; delete it to start again", problems)
        self.header, self.next_index = written, extra.get("next_index")
        if type(self.next_index) is not int or self.next_index < 0:
            raise UserError(f"{self.partial / 'cache.json'} is damaged: wrong next_index. Delete {self.partial}.")

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

    def add(
        self,
        latents: Float[np.ndarray, "B h w C"],
        input_ids: Int[np.ndarray, "B L"],
        frames: Int[np.ndarray, "B 4"],
        ids: Sequence[int],
        bucket: int = 0,
    ) -> None:
        """Writes a batch of examples of one bucket to the open shard.

        Args:
            latents: scaled.
            frames: each image's original height and width, and top and left of the crop after scaling.
            ids: the images' ids in the source.

        Raises:
            ValueError: the cache cannot hold these shapes, token ids or values (NaN, beyond float16).
        """
        self._check(latents, input_ids, bucket)
        with self._writing():
            if self._shard is None:
                path = self.partial / f"latents-{len(self.header.shards):05d}.array_record"
                self._shard = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
            for example in zip(latents, input_ids, frames, ids, strict=True):
                self._shard.write(encode_record(*example))
        self._buckets += bytes([bucket]) * len(latents)

    def drop(self, count: int) -> None:
        """Counts images that could not be read."""
        self.header = dataclasses.replace(self.header, dropped=self.header.dropped + count)

    def finish(self) -> LatentCache:
        """Closes the last shard, moves the cache to its folder and opens it."""
        self.close_shard(self.next_index)
        if not self.header.count:
            raise UserError(f"nothing was written to {self.partial}: no image could be read.")
        with self._writing():
            write_header(self.partial, self.header)
            os.replace(self.partial, self.folder)
        return LatentCache(self.folder)

    def abandon(self) -> None:
        """Discards the open shard. Complete shards stay for the next writer; without any, the folder is deleted."""
        if self._shard is not None:
            with contextlib.suppress(RuntimeError):  # The disk is full; the shard is incomplete anyway.
                self._shard.close()
            self._shard, self._buckets = None, bytearray()
        if not self.header.shards and self.partial.exists():
            shutil.rmtree(self.partial)

    def close_shard(self, next_index: int) -> None:
        """Completes the open shard; an interrupted cache continues at the source's index `next_index`."""
        self.next_index = next_index
        if self._shard is None:
            return
        with self._writing():
            self._shard.close()
            name, count = f"latents-{len(self.header.shards):05d}.array_record", len(self._buckets)
            if self.header.buckets:
                (self.partial / buckets_file(name)).write_bytes(self._buckets)
            shards = (*self.header.shards, (name, count))
            header = dataclasses.replace(self.header, shards=shards, count=self.header.count + count)
            write_header(self.partial, header, next_index=next_index)
        self.header, self._shard, self._buckets = header, None, bytearray()

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
