"""Fills the latent cache that training reads, once: encodes images with their captions, or samples prompts."""

import functools
import pathlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from tqdm import tqdm

from dmm_jax.data.cache import CacheHeader, LatentCache
from dmm_jax.data.cache_writer import CacheWriter
from dmm_jax.data.images import UnreadableImage, crop_of, fit_square
from dmm_jax.data.prompts import Draws
from dmm_jax.data.sources import Example, ImageSource
from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.storage import check_local, check_writable

Rows = tuple[np.ndarray, np.ndarray, np.ndarray, Sequence[int], int]  # The arguments of `CacheWriter.add`.


def prepare(
    image_source: ImageSource,
    encode: Callable[[np.ndarray, jax.Array], jax.Array | np.ndarray],
    tokenize: Callable[[Sequence[str]], np.ndarray],
    out: str | pathlib.Path,
    batch_size: int,
    *,
    resolution: int,
    scaling_factor: float,
    vae: str,
    tokenizer: str,
    seed: int = 0,
    shard_size: int = 8192,
    num_threads: int = 4,
    progress: bool | None = None,
) -> LatentCache:
    """Writes the cache of a source and opens it; work that was broken off goes on after the last whole shard.

    A finished cache of just these things is opened as it is. Unreadable images are named, dropped and counted.

    Args:
        encode: maps uint8 images (B, H, W, 3) and one PRNG key per image (B,) to unscaled latents (B, h, w, C); it
            always gets `batch_size` images. An image's key follows from `seed` and its place in the source alone.
        tokenize: maps B captions to token ids (B, L).
        resolution: pixels of a side; other images are scaled by their short side and cropped at the centre.
        scaling_factor: the VAE's; what is stored is latents times this.
        vae: hash of the VAE's contents.
        tokenizer: hash of the tokenizers (`Tokenizers.digest`).
        shard_size: records a file, and about how many are lost when work breaks off.
        progress: show a bar; None: when a terminal reads along.

    Raises:
        ValueError: `out` holds something else, the latents do not fit float16, or no image could be read.
    """
    wanted = {"vae": vae, "tokenizer": tokenizer, "resolution": resolution, "scaling_factor": float(scaling_factor),
              "seed": seed, "source": getattr(image_source, "digest", "")}  # fmt: skip

    def rows(writer: CacheWriter, bar: tqdm) -> Iterator[Rows]:
        for examples, next_index in _groups(image_source, writer, batch_size, resolution, num_threads):
            latents = encode_examples(examples, encode, batch_size, seed) * np.float32(scaling_factor)
            captions, ids, frames = ([example[name] for example in examples] for name in ("caption", "id", "frame"))
            yield latents, np.asarray(tokenize(captions)), np.array(frames, np.int32), ids, next_index
            bar.update(next_index - bar.n)

    shapes = functools.partial(_shapes, encode, tokenize, batch_size, resolution)
    return fill(out, wanted, shapes, rows, len(image_source), shard_size, progress, desc="encode")


def prepare_samples(
    draws: Draws,
    sample: Callable[[int, Sequence[str], Sequence[int]], np.ndarray],
    tokenize: Callable[[Sequence[str]], np.ndarray],
    out: str | pathlib.Path,
    batch_size: int,
    *,
    resolution: int,
    latent_shape: tuple[int, ...],
    scaling_factor: float,
    vae: str,
    tokenizer: str,
    source: str,
    shard_size: int = 1024,
    progress: bool | None = None,
) -> LatentCache:
    """Writes the cache of what teachers draw, as `prepare` writes that of images; the records are in the draws' order.

    Within a shard it goes teacher by teacher, so that each is loaded once a shard.

    Args:
        sample: maps a teacher's number, prompts and seeds to scaled latents (B, h, w, C); it always gets `batch_size`.
        latent_shape: (h, w, C) of these.
        source: what else the latents follow from: teachers, prompts, sampler.

    Raises:
        ValueError: `out` holds something else, or the latents do not fit float16.
    """
    wanted = {"vae": vae, "tokenizer": tokenizer, "resolution": resolution, "scaling_factor": float(scaling_factor),
              "seed": draws.seed, "source": source}  # fmt: skip

    def shapes() -> dict:
        return {"latent_shape": latent_shape, "num_tokens": int(np.asarray(tokenize([""])).shape[1])}

    def rows(writer: CacheWriter, bar: tqdm) -> Iterator[Rows]:
        for first in range(writer.next_index, len(draws), shard_size):
            ids = np.arange(first, min(first + shard_size, len(draws)))
            latents = np.empty((len(ids), *latent_shape), np.float32)
            for teacher, part in _batches_by_teacher(draws, ids, batch_size):
                full = np.resize(part, batch_size)  # Filled up, so that `sample` compiles once.
                prompts, _, seeds = zip(*(draws[int(k)] for k in full), strict=True)
                latents[part - first] = sample(teacher, prompts, seeds)[: len(part)]
                bar.update(len(part))
            input_ids = np.asarray(tokenize([draws[int(k)].prompt for k in ids]))
            frames = np.tile(np.array([resolution, resolution, 0, 0], np.int32), (len(ids), 1))
            yield latents, input_ids, frames, ids.tolist(), int(ids[-1]) + 1

    return fill(out, wanted, shapes, rows, len(draws), shard_size, progress, desc="sample")


def fill(
    out: str | pathlib.Path,
    wanted: Mapping[str, Any],
    shapes: Callable[[], dict],
    rows: Callable[[CacheWriter, tqdm], Iterator[Rows]],
    total: int,
    shard_size: int,
    progress: bool | None,
    desc: str,
) -> LatentCache:
    """Writes the cache and opens it; a finished one of just `wanted` is opened as it is.

    Args:
        wanted: fields of the header that say what is asked for.
        shapes: finds the fields that say what a record holds.
        rows: yields the arguments of `CacheWriter.add` from `writer.next_index` on, and moves the bar.
        total: where the source ends.
    """
    out = check_place(out)
    if out.exists():
        cache = LatentCache(out)
        if problems := cache.header.differences(**wanted):
            listed = "\n  ".join(problems)
            raise UserError(f"{out} is a cache of other things:\n  {listed}\nDelete it, or set another data.cache.")
        return cache
    writer = CacheWriter(out, CacheHeader(**wanted, **shapes()), shard_size)
    hidden = not sys.stderr.isatty() if progress is None else not progress
    try:
        with tqdm(total=total, initial=writer.next_index, desc=desc, unit="image", disable=hidden) as bar:
            for arguments in rows(writer, bar):
                writer.add(*arguments)
        return writer.finish()
    finally:
        writer.abandon()


def check_place(out: str | pathlib.Path) -> pathlib.Path:
    """Returns where a cache is to be, if nothing else is there and it can be written.

    Raises:
        ValueError: other things are there, it cannot be written, or lies in a bucket.
    """
    out = check_local(out, "a latent cache")
    if out.exists() and not (out / "cache.json").is_file():
        raise UserError(
            f"{out} is there and is no latent cache (it holds no cache.json). Set data.cache to a new folder, which "
            "prepare makes."
        )
    check_writable(out)
    return out


def _batches_by_teacher(draws: Draws, ids: np.ndarray, batch_size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields teacher by teacher the places of up to `batch_size` draws."""
    teachers = np.array([draws[int(k)].teacher for k in ids])
    for teacher in range(draws.num_teachers):
        own = ids[teachers == teacher]
        for first in range(0, len(own), batch_size):
            yield teacher, own[first : first + batch_size]


def encode_examples(examples: Sequence[Example], encode: Callable, batch_size: int, seed: int) -> np.ndarray:
    """Returns the unscaled latents (B, h, w, C) of examples; the batch is filled up so that `encode` compiles once."""
    rows = np.minimum(np.arange(batch_size), len(examples) - 1)
    images = np.stack([examples[row]["image"] for row in rows])
    ids = np.array([examples[row]["id"] for row in rows], np.uint32)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), ids)
    return np.asarray(encode(images, keys), np.float32)[: len(examples)]


def _shapes(encode, tokenize, batch_size: int, resolution: int) -> dict:
    """Finds what a record holds, from a black image without words."""
    black: Example = {"image": np.zeros((resolution, resolution, 3), np.uint8), "caption": "", "id": 0}
    latents = encode_examples([black], encode, batch_size, seed=0)
    return {"latent_shape": latents.shape[1:], "num_tokens": int(np.asarray(tokenize([""])).shape[1])}


def _groups(
    source: ImageSource, writer: CacheWriter, batch_size: int, resolution: int, num_threads: int
) -> Iterator[tuple[list[Example], int]]:
    """Yields up to `batch_size` readable examples, and the place where the source goes on after them."""
    if writer.next_index >= len(source):
        return
    reader = grain.MapDataset.range(writer.next_index, len(source)).map(_Load(source, resolution))
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * batch_size)
    group: list[Example] = []
    for index, example in enumerate(reader.to_iter_dataset(options), start=writer.next_index):
        if isinstance(example, UnreadableImage):
            warnings.warn(f"dropped: {example}", stacklevel=2)
            writer.drop(1)
        else:
            group.append(example)
        if len(group) == batch_size:
            yield group, index + 1
            group = []
    if group:
        yield group, len(source)


class _Load:
    """Reads and fits one image, its frame noted; a failure is handed on, not raised in a reader's thread."""

    def __init__(self, source: ImageSource, resolution: int):
        self.source, self.resolution = source, resolution

    def __call__(self, index: int) -> Example | UnreadableImage:
        try:
            example = self.source[int(index)]
        except UnreadableImage as error:
            return error
        height, width = example["image"].shape[:2]
        frame = (height, width, *crop_of(height, width, self.resolution)[1])
        return {**example, "image": fit_square(example["image"], self.resolution), "frame": frame}
