"""Fills a latent cache, from captioned images or from pictures that teachers draw from prompts alone."""

import functools
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from tqdm import tqdm

from dmm_jax.data.cache import CacheHeader, LatentCache
from dmm_jax.data.cache_writer import CacheWriter
from dmm_jax.data.files import Unused
from dmm_jax.data.images import UnreadableImage, crop_of, fit_square
from dmm_jax.data.prompts import Draws
from dmm_jax.data.sources import Example, ImageSource
from dmm_jax.runtime import locks
from dmm_jax.runtime.errors import UserError, refuse
from dmm_jax.runtime.processes import say
from dmm_jax.runtime.storage import check_local, check_writable

REPORT_S = 60  # Between the lines that report progress where stderr is not a terminal.
NAMED_IMAGES = 10  # Unreadable images that are named, for each reason.
Records = tuple[np.ndarray, np.ndarray, np.ndarray, Sequence[int], int]  # The arguments of `CacheWriter.add`.


def encode_images(
    source: ImageSource,
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
    unused: Unused | None = None,
    strict: bool = False,
) -> LatentCache:
    """Writes the latents and token ids of a source's images to a cache and opens it.

    An interrupted call continues after the last complete shard; a finished cache of the same recipe is opened as it is.
    Unreadable images are dropped and counted.

    Args:
        encode: maps uint8 images (B, H, W, 3) and one PRNG key per image (B,) to unscaled latents (B, h, w, C); B is
            always `batch_size`. An image's key depends only on `seed` and the image's id.
        tokenize: maps B captions to token ids (B, L), all chunks.
        resolution: pixels per side; images of another size are scaled by their short side and cropped at the centre.
        scaling_factor: the VAE's; the cache holds latents times this factor.
        vae: hash of the VAE's contents.
        tokenizer: hash of the tokenizers (`Tokenizers.digest`).
        shard_size: records per file; an interruption loses at most about this many.
        unused: counts the unreadable images by reason.
        strict: whether an unreadable image is an error.

    Raises:
        ValueError: `out` holds something else, the latents do not fit into float16, or no image could be read.
    """
    recipe = {"vae": vae, "tokenizer": tokenizer, "resolution": resolution, "scaling_factor": float(scaling_factor),
              "num_tokens": np.shape(tokenize([""]))[1], "seed": seed,
              "source": getattr(source, "digest", "")}  # fmt: skip

    def latent_shape() -> tuple[int, ...]:
        black: Example = {"image": np.zeros((resolution, resolution, 3), np.uint8), "caption": "", "id": 0}
        return encode_examples([black], encode, batch_size, seed=0).shape[1:]

    def records(writer: CacheWriter, bar: tqdm) -> Iterator[Records]:
        drop = functools.partial(_drop, writer, Unused() if unused is None else unused, strict)
        reader = grain.MapDataset.range(writer.next_index, len(source)).map(_LoadExample(source, resolution))
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * batch_size)
        for examples, next_index in _groups(reader.to_iter_dataset(options), writer.next_index, batch_size, drop):
            latents = encode_examples(examples, encode, batch_size, seed) * np.float32(scaling_factor)
            captions, ids, frames = ([example[name] for example in examples] for name in ("caption", "id", "frame"))
            yield latents, np.asarray(tokenize(captions)), np.array(frames, np.int32), ids, next_index
            bar.update(next_index - bar.n)

    return _fill(out, recipe, latent_shape, records, len(source), shard_size, "encoding")


def sample_prompts(
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
) -> LatentCache:
    """Writes latents that teachers draw from prompts to a cache and opens it, as `encode_images` does for images.

    Records have the order of `draws`. Within a shard all pictures of one teacher are drawn before the next teacher's,
    so that each teacher is loaded once per shard.

    Args:
        sample: maps a teacher's number, B prompts and B seeds to scaled latents (B, h, w, C); B is always `batch_size`.
        latent_shape: (h, w, C) of these latents.
        source: what else determines the latents: teachers, prompts, sampler.

    Raises:
        ValueError: `out` holds something else, or the latents do not fit into float16.
    """
    recipe = {"vae": vae, "tokenizer": tokenizer, "resolution": resolution, "scaling_factor": float(scaling_factor),
              "num_tokens": np.shape(tokenize([""]))[1], "seed": draws.seed, "source": source}  # fmt: skip

    def records(writer: CacheWriter, bar: tqdm) -> Iterator[Records]:
        for first in range(writer.next_index, len(draws), shard_size):
            ids = np.arange(first, min(first + shard_size, len(draws)))
            latents = np.empty((len(ids), *latent_shape), np.float32)
            for teacher, part in _batches_by_teacher(draws, ids, batch_size):
                padded = np.resize(part, batch_size)  # A fixed size, so that `sample` compiles once.
                prompts, _, seeds = zip(*(draws[int(k)] for k in padded), strict=True)
                latents[part - first] = sample(teacher, prompts, seeds)[: len(part)]
                bar.update(len(part))
            input_ids = np.asarray(tokenize([draws[int(k)].prompt for k in ids]))
            frames = np.tile(np.array([resolution, resolution, 0, 0], np.int32), (len(ids), 1))
            yield latents, input_ids, frames, ids.tolist(), int(ids[-1]) + 1

    return _fill(out, recipe, lambda: latent_shape, records, len(draws), shard_size, "drawing")


def _fill(
    out: str | pathlib.Path,
    recipe: Mapping[str, Any],
    latent_shape: Callable[[], tuple[int, ...]],
    records: Callable[[CacheWriter, tqdm], Iterator[Records]],
    total: int,
    shard_size: int,
    stage: str,
) -> LatentCache:
    """Writes a cache and opens it; a finished cache of the same recipe is opened as it is.

    Args:
        recipe: the fields of `CacheHeader` that determine the latents.
        latent_shape: computes the shape (h, w, C) of the latents.
        records: yields the arguments of `CacheWriter.add` from `writer.next_index` on, and advances the bar.
        total: the number of examples.
    """
    out = check_place(out)
    if out.exists():
        cache = LatentCache(out)
        problems = cache.header.differences(**recipe)
        refuse(f"{out} is a cache of another recipe; delete it, or set another data.cache", problems)
        return cache
    with locks.lock(out, out.with_name(f".{out.name}.lock")):
        writer = CacheWriter(out, CacheHeader(**recipe, latent_shape=latent_shape()), shard_size)
        first = writer.next_index
        say(f"{stage} {total:,d} images into {out}" + (f"; {first:,d} are finished" if first else ""))
        start = reported = time.perf_counter()
        try:
            with tqdm(total=total, initial=first, desc=stage, unit="image", disable=None) as bar:  # On terminals only.
                for arguments in records(writer, bar):
                    writer.add(*arguments)
                    if bar.disable and time.perf_counter() - reported > REPORT_S:
                        reported = time.perf_counter()
                        rate = (writer.next_index - first) / (reported - start)
                        say(f"{writer.next_index:,d} of {total:,d} images, {rate:.1f} images/s")
            cache = writer.finish()
        finally:
            writer.abandon()
    seconds = time.perf_counter() - start
    say(f"{out}: {len(cache):,d} images; {seconds:.0f} s, {(total - first) / seconds:.1f} images/s")
    return cache


def check_place(out: str | pathlib.Path) -> pathlib.Path:
    """Returns the path of a cache to write or to open.

    Raises:
        ValueError: the folder holds something else, cannot be written, or is in a bucket.
    """
    out = check_local(out, "a latent cache")
    if out.exists() and not (out / "cache.json").is_file():
        raise UserError(
            f"{out} exists and is not a latent cache (it has no cache.json). Set data.cache to a new folder, which "
            "prepare makes."
        )
    check_writable(out)
    return out


def _batches_by_teacher(draws: Draws, ids: np.ndarray, batch_size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (teacher, up to `batch_size` numbers of its draws), teacher by teacher."""
    teachers = np.array([draws[int(k)].teacher for k in ids])
    for teacher in range(draws.num_teachers):
        own = ids[teachers == teacher]
        for first in range(0, len(own), batch_size):
            yield teacher, own[first : first + batch_size]


def encode_examples(examples: Sequence[Example], encode: Callable, batch_size: int, seed: int) -> np.ndarray:
    """Returns the unscaled latents (B, h, w, C) of examples, float32; pads the batch so that `encode` compiles once."""
    rows = np.minimum(np.arange(batch_size), len(examples) - 1)
    images = np.stack([examples[row]["image"] for row in rows])
    ids = np.array([examples[row]["id"] for row in rows], np.uint32)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), ids)
    return np.asarray(encode(images, keys), np.float32)[: len(examples)]


def _groups(
    examples: Iterable[Example | UnreadableImage], first: int, batch_size: int, drop: Callable[[UnreadableImage], None]
) -> Iterator[tuple[list[Example], int]]:
    """Yields up to `batch_size` readable examples, and the source's index after the last of them."""
    group, index = [], first
    for index, example in enumerate(examples, start=first + 1):
        if isinstance(example, UnreadableImage):
            drop(example)
        else:
            group.append(example)
        if len(group) == batch_size:
            yield group, index
            group = []
    if group:
        yield group, index


def _drop(writer: CacheWriter, unused: Unused, strict: bool, image: UnreadableImage) -> None:
    """Counts an unreadable image, and names the first ones of each reason."""
    if strict:
        raise image
    writer.drop(1)
    unused.add(image.reason, image.name)
    if unused.counts[image.reason] <= NAMED_IMAGES:
        say(f"not used: {image}")


class _LoadExample:
    """Reads one image, fits it to the square and adds its frame; returns an `UnreadableImage` instead of raising it."""

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
