"""Writes a latent cache so that it is whole or not there, and so that broken-off work is taken up again."""

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Sequence

import numpy as np
from array_record.python import array_record_module
from jaxtyping import Float, Int

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
from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.storage import check_local


class CacheWriter:
    """Writes a cache beside its place, shard by shard, and moves it there when it is whole.

    A writer that is opened on what another left takes up after the last whole shard.

    Raises:
        ValueError: the place is taken, or an unfinished cache there is of other things.
    """

    def __init__(self, folder: str | pathlib.Path, header: CacheHeader, shard_size: int = 8192):
        """Opens `folder + ".partial"`; `header` says what will be written, its count and shards are filled in."""
        self.folder, self.shard_size = check_local(folder, "a latent cache"), shard_size
        self.partial = partial_folder(self.folder)
        self.header, self.next_index = header, 0
        self._shard, self._in_shard = None, 0
        if self.folder.exists():
            raise UserError(f"{self.folder} exists already. Delete it, or write elsewhere.")
        if (self.partial / "cache.json").exists():
            self._take_up(header)
        self.partial.mkdir(parents=True, exist_ok=True)
        for name in {path.name for path in self.partial.glob("*.array_record")} - {name for name, _ in self._shards}:
            (self.partial / name).unlink()

    @property
    def _shards(self) -> tuple[tuple[str, int], ...]:
        return self.header.shards

    def _take_up(self, header: CacheHeader) -> None:
        left, more = read_header(self.partial)
        blank = dataclasses.replace(left, count=0, dropped=0, shards=())
        if problems := blank.differences(**dataclasses.asdict(header)):
            listed = "\n  ".join(problems)
            raise UserError(f"{self.partial} was begun with other things:\n  {listed}\nDelete it to start anew.")
        self.header, self.next_index = left, int(more["next_index"])

    def add(
        self,
        latents: Float[np.ndarray, "B h w C"],
        input_ids: Int[np.ndarray, "B L"],
        frames: Int[np.ndarray, "B 4"],
        ids: Sequence[int],
        next_index: int,
    ) -> None:
        """Writes a batch of scaled latents; `next_index` is where the source goes on after it.

        Args:
            frames: each image's height and width before it was scaled, and top and left of the square after.

        Raises:
            ValueError: shapes, token ids or values that the cache cannot hold (NaN, beyond float16).
        """
        self._check(latents, input_ids)
        if self._shard is None:
            name = f"latents-{len(self._shards):05d}.array_record"
            self._shard = array_record_module.ArrayRecordWriter(str(self.partial / name), "group_size:1,uncompressed")
        for example in zip(latents, input_ids, frames, ids, strict=True):
            self._shard.write(encode_record(*example))
        self._in_shard += len(latents)
        self.next_index = next_index
        if self._in_shard >= self.shard_size:
            self._close_shard()

    def drop(self, count: int) -> None:
        """Counts images that could not be read."""
        self.header = dataclasses.replace(self.header, dropped=self.header.dropped + count)

    def finish(self) -> LatentCache:
        """Closes the last shard, moves the cache to its place and opens it."""
        self._close_shard()
        if not self.header.count:
            raise UserError(f"nothing was written to {self.partial}: no image could be read.")
        write_header(self.partial, self.header)
        os.replace(self.partial, self.folder)
        return LatentCache(self.folder)

    def abandon(self) -> None:
        """Lets go of the open shard; the whole ones stay for the next writer, and where there is none nothing does."""
        if self._shard is not None:
            self._shard.close()
            self._shard, self._in_shard = None, 0
        if not self._shards and self.partial.exists():
            shutil.rmtree(self.partial)

    def _close_shard(self) -> None:
        if self._shard is None:
            return
        self._shard.close()
        shards = (*self._shards, (f"latents-{len(self._shards):05d}.array_record", self._in_shard))
        self.header = dataclasses.replace(self.header, shards=shards, count=self.header.count + self._in_shard)
        self._shard, self._in_shard = None, 0
        write_header(self.partial, self.header, next_index=self.next_index)

    def _check(self, latents: np.ndarray, input_ids: np.ndarray) -> None:
        if latents.shape[1:] != self.header.latent_shape or input_ids.shape[1:] != (self.header.num_tokens,):
            raise UserError(
                f"expected latents {self.header.latent_shape} and {self.header.num_tokens} token ids per image; "
                f"got {latents.shape[1:]} and {input_ids.shape[1:]}. Check the VAE and the tokenizer."
            )
        limit = float(np.finfo(LATENTS).max)
        if not (np.abs(latents) <= limit).all():  # NaN fails too.
            raise UserError("latents hold NaN or values beyond float16. Run the networks in float32 or bfloat16.")
        if input_ids.min() < 0 or input_ids.max() > np.iinfo(TOKENS).max:
            raise UserError(f"token ids must lie in 0 to 65535; got {input_ids.min()} to {input_ids.max()}.")
