"""Fills a latent cache, from captioned images or from pictures that teachers draw from prompts alone."""

import functools
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np

from dmm_jax.data.bucket_cache import HEADER, cache_location, check_unfinished
from dmm_jax.data.buckets import Size, nearest_bucket
from dmm_jax.data.cache import CacheHeader, LatentCache
from dmm_jax.data.cache_writer import CacheWriter, Shard
from dmm_jax.data.files import Unused
from dmm_jax.data.images import UnreadableImage, crop_of, fit
from dmm_jax.data.prompts import Draws
from dmm_jax.data.sources import Example, ImageSource
from dmm_jax.runtime import locks
from dmm_jax.runtime.errors import UserError, refuse
from dmm_jax.runtime.processes import say
from dmm_jax.runtime.progress import Progress
from dmm_jax.runtime.storage import Location, check_bucket, check_writable, in_bucket

NUM_THREADS = min(max(os.cpu_count() or 1, 4), 32)  # Pillow decodes and scales images outside the interpreter's lock.
NAMED_IMAGES = 10  # Unreadable images that are named, for each reason.
Records = tuple[np.ndarray, np.ndarray, np.ndarray, Sequence[int], int]  # The arguments of `Shard.add`.


def encode_images(
    source: ImageSource,
    encode: Callable[[np.ndarray, jax.Array], jax.Array | np.ndarray],
    tokenize: Callable[[Sequence[str]], np.ndarray],
    out: str | Location,
    batch_size: int,
    *,
    sizes: Sequence[Size],
    scaling_factor: float,
    vae: str,
    tokenizer: str,
    seed: int = 0,
    shard_size: int = 8192,
    num_threads: int = NUM_THREADS,
    unused: Unused | None = None,
    strict: bool = False,
) -> LatentCache:
    """Writes the latents and token ids of a source's images to a cache and opens it.

    An interrupted call goes on with the shards that are missing; a finished cache of the same recipe is opened as it
    is. Unreadable images are dropped and counted. Of several processes each writes its share of the shards.

    Args:
        encode: maps uint8 images (B, H, W, 3) and one PRNG key per image (B,) to unscaled latents (B, h, w, C); B is
            always `batch_size`. An image's key depends only on `seed` and the image's id.
        tokenize: maps B captions to token ids (B, L), all chunks.
        sizes: height and width of the buckets, the square first. An image is scaled until it covers the bucket whose
            ratio of sides is nearest, and cropped at its centre.
        scaling_factor: the VAE's; the cache holds latents times this factor.
        vae: hash of the VAE's contents.
        tokenizer: hash of the tokenizers (`Tokenizers.digest`).
        shard_size: images of the source per file; an interruption loses at most this many.
        unused: counts the unreadable images by reason.
        strict: whether an unreadable image is an error.

    Raises:
        ValueError: `out` holds something else, the latents do not fit into float16, or no image could be read.
    """
    recipe = {"vae": vae, "tokenizer": tokenizer, "resolution": sizes[0][0], "buckets": tuple(sizes[1:]),
              "scaling_factor": float(scaling_factor), "num_tokens": np.shape(tokenize([""]))[1], "seed": seed,
              "source": getattr(source, "digest", "")}  # fmt: skip

    def latent_shape() -> tuple[int, ...]:
        black: Example = {"image": np.zeros((*sizes[0], 3), np.uint8), "caption": "", "id": 0}
        return encode_examples([black], encode, batch_size, seed=0).shape[1:]

    def records(shard: Shard, first: int, last: int, progress: Progress) -> Iterator[Records]:
        drop = functools.partial(_drop, shard, Unused() if unused is None else unused, strict)
        reader = grain.MapDataset.range(first, last).map(_LoadExample(source, sizes))
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * batch_size)
        for examples in _groups(reader.to_iter_dataset(options), batch_size, drop, progress):
            latents = encode_examples(examples, encode, batch_size, seed) * np.float32(scaling_factor)
            captions, ids, frames = ([example[name] for example in examples] for name in ("caption", "id", "frame"))
            yield latents, np.asarray(tokenize(captions)), np.array(frames, np.int32), ids, examples[0]["bucket"]

    return _fill(out, recipe, latent_shape, records, len(source), shard_size, "encoding")


def sample_prompts(
    draws: Draws,
    sample: Callable[[int, Sequence[str], Sequence[int], Size], np.ndarray],
    tokenize: Callable[[Sequence[str]], np.ndarray],
    out: str | Location,
    batch_size: int,
    *,
    sizes: Sequence[Size],
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
        sample: maps a teacher's number, B prompts, B seeds and height and width in pixels to scaled latents
            (B, h, w, C); B is always `batch_size`.
        sizes: height and width of the buckets, the square first.
        latent_shape: (h, w, C) of the square's latents.
        source: what else determines the latents: teachers, prompts, sampler.

    Raises:
        ValueError: `out` holds something else, or the latents do not fit into float16.
    """
    recipe = {"vae": vae, "tokenizer": tokenizer, "resolution": sizes[0][0], "buckets": tuple(sizes[1:]),
              "scaling_factor": float(scaling_factor), "num_tokens": np.shape(tokenize([""]))[1], "seed": draws.seed,
              "source": source}  # fmt: skip

    def records(shard: Shard, first: int, last: int, progress: Progress) -> Iterator[Records]:
        latents = {}
        for teacher, bucket, ids in _draws_by_teacher(draws, np.arange(first, last), batch_size):
            padded = np.resize(ids, batch_size)  # A fixed size, so that `sample` compiles once.
            prompts, _, seeds, _ = zip(*(draws[int(k)] for k in padded), strict=True)
            latents |= zip(ids.tolist(), sample(teacher, prompts, seeds, sizes[bucket]), strict=False)
            progress.add(len(ids))
        for index in range(first, last):
            frame = np.array([[*sizes[draws[index].bucket], 0, 0]], np.int32)
            input_ids = np.asarray(tokenize([draws[index].prompt]))
            yield np.asarray(latents[index], np.float32)[None], input_ids, frame, [index], draws[index].bucket

    return _fill(out, recipe, lambda: latent_shape, records, len(draws), shard_size, "drawing")


def _fill(
    out: str | Location,
    recipe: Mapping[str, Any],
    latent_shape: Callable[[], tuple[int, ...]],
    records: Callable[[Shard, int, int, Progress], Iterator[Records]],
    total: int,
    shard_size: int,
    stage: str,
) -> LatentCache:
    """Writes a cache and opens it; a finished cache of the same recipe is opened as it is.

    Args:
        recipe: the fields of `CacheHeader` that determine the latents.
        latent_shape: computes the shape (h, w, C) of the latents.
        records: yields the arguments of `Shard.add` for the examples `first` to `last` - 1, and counts them.
        total: the number of examples.
    """
    out = check_place(out)
    if (out / HEADER).exists():
        cache = LatentCache(out)
        problems = cache.header.differences(**recipe)
        refuse(f"{out} is a cache of another recipe; delete it, or set another data.cache", problems)
        return cache
    with locks.lock(out, out.with_name(f".{out.name}.lock")):
        writer = CacheWriter(out, CacheHeader(**recipe, latent_shape=latent_shape()))
        shards = [(first, min(first + shard_size, total)) for first in range(0, total, shard_size)]
        missing = [number for number in range(len(shards)) if not writer.is_complete(number)]
        num_missing = sum(shards[number][1] - shards[number][0] for number in missing)
        finished = f"; {total - num_missing:,d} are finished" if num_missing < total else ""
        say(f"{stage} {total:,d} images into {out}{finished}")
        start = time.perf_counter()
        own = missing[jax.process_index() :: jax.process_count()]
        progress = Progress(sum(shards[number][1] - shards[number][0] for number in own), stage)
        try:
            with progress.bar:
                for number in own:
                    with writer.shard(number) as shard:
                        for arguments in records(shard, *shards[number], progress):
                            shard.add(*arguments)
            cache = writer.finish(len(shards))
        except BaseException:
            writer.abandon()
            raise
    seconds = time.perf_counter() - start
    say(f"{out}: {len(cache):,d} images; {seconds:.0f} s, {num_missing / seconds:.1f} images/s")
    return cache


def check_place(out: str | Location) -> Location:
    """Returns the path of a cache to write or to open.

    Raises:
        ValueError: the folder or the place in a bucket holds something else, or cannot be written.
    """
    out = cache_location(out)
    if in_bucket(out):
        check_bucket(out)
        check_unfinished(out)
        return out
    if out.exists() and not (out / "cache.json").is_file():
        raise UserError(
            f"{out} exists and is not a latent cache (it has no cache.json). Set data.cache to a new folder, which "
            "prepare makes."
        )
    check_writable(out)
    return out


def _draws_by_teacher(draws: Draws, ids: np.ndarray, batch_size: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yields (teacher, bucket, up to `batch_size` numbers of its draws), teacher by teacher."""
    kinds = np.array([(draws[int(k)].teacher, draws[int(k)].bucket) for k in ids])
    for teacher, bucket in np.unique(kinds, axis=0).tolist():
        own = ids[(kinds == (teacher, bucket)).all(axis=1)]
        for first in range(0, len(own), batch_size):
            yield teacher, bucket, own[first : first + batch_size]


def encode_examples(examples: Sequence[Example], encode: Callable, batch_size: int, seed: int) -> np.ndarray:
    """Returns the unscaled latents (B, h, w, C) of examples, float32; pads the batch so that `encode` compiles once."""
    rows = np.minimum(np.arange(batch_size), len(examples) - 1)
    images = np.stack([examples[row]["image"] for row in rows])
    ids = np.array([examples[row]["id"] for row in rows], np.uint32)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), ids)
    return np.asarray(encode(images, keys), np.float32)[: len(examples)]


def _groups(
    examples: Iterable[Example | UnreadableImage],
    batch_size: int,
    drop: Callable[[UnreadableImage], None],
    progress: Progress,
) -> Iterator[list[Example]]:
    """Yields up to `batch_size` readable examples of one bucket; what does not fill a batch comes last."""
    groups = defaultdict(list)
    for example in examples:
        progress.add()
        if isinstance(example, UnreadableImage):
            drop(example)
            continue
        group = groups[example["bucket"]]
        group.append(example)
        if len(group) == batch_size:
            yield groups.pop(example["bucket"])
    yield from (groups[bucket] for bucket in sorted(groups))


def _drop(shard: Shard, unused: Unused, strict: bool, image: UnreadableImage) -> None:
    """Counts an unreadable image, and names the first ones of each reason."""
    if strict:
        raise image
    shard.dropped += 1
    unused.add(image.reason, image.name)
    if unused.counts[image.reason] <= NAMED_IMAGES:
        say(f"not used: {image}")


class _LoadExample:
    """Reads one image, fits it to its bucket and adds its frame; returns an `UnreadableImage` instead of raising it."""

    def __init__(self, source: ImageSource, sizes: Sequence[Size]):
        self.source, self.sizes = source, tuple(sizes)

    def __call__(self, index: int) -> Example | UnreadableImage:
        try:
            example = self.source[int(index)]
        except UnreadableImage as error:
            return error
        height, width = example["image"].shape[:2]
        bucket = nearest_bucket(height, width, self.sizes)
        size = self.sizes[bucket]
        frame = (height, width, *crop_of(height, width, size)[1])
        return {**example, "image": fit(example["image"], size), "frame": frame, "bucket": bucket}
