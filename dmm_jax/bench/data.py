"""`dmm-jax bench prepare` and `bench data`: how fast images become a cache, and how fast a cache gives batches."""

import functools
import os
import pathlib
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from dmm_jax.bench import networks, timing
from dmm_jax.checkpoints.abstract import abstract_model
from dmm_jax.data import batches, prepare
from dmm_jax.data.buckets import bucket_sizes
from dmm_jax.data.cache import CacheHeader, LatentCache
from dmm_jax.data.cache_writer import CacheWriter
from dmm_jax.data.fill_cache import encode_images
from dmm_jax.data.images import fit, load_rgb
from dmm_jax.data.sources import FolderSource
from dmm_jax.models.autoencoder_kl import AutoencoderKL
from dmm_jax.runtime import sharding

PHOTO_SIDE, NUM_PHOTOS, QUALITY = 1024, 64, 90
EXAMPLES, NUM_HOSTS = 8192, 64
UNIT = 64


def measure_prepare(config, size: str, num_steps: int, batch_size: int) -> list[dict]:
    """Times decoding, fitting and encoding of JPEGs, each alone and then all together; arguments as in `jobs.bench`.

    Decoding and fitting alone run in one thread, `prepare` in several.
    """
    resolution = config.data.resolution
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        _write_photos(folder / "images")
        source = FolderSource(folder / "images")
        photo = np.asarray(load_rgb(source.rows[0][0]))
        encode = _random_encoder(config, size)
        rows = [
            {"job": "prepare: decode", "images_per_s": 1 / timing.median_s(lambda: load_rgb(source.rows[0][0]), 20)},
            {"job": "prepare: fit", "images_per_s": 1 / timing.median_s(lambda: fit(photo, (resolution,) * 2), 20)},
        ]
        images = np.zeros((batch_size, resolution, resolution, 3), np.uint8)
        keys = jax.random.split(jax.random.key(0), batch_size)
        encode_s = timing.median_s(lambda: encode(images, keys), num_steps)
        rows.append({"job": "prepare: encode", "images_per_s": batch_size / encode_s, "batch": batch_size})
        sizes = bucket_sizes(resolution, config.data.max_aspect_ratio, UNIT)
        options = {"sizes": sizes, "scaling_factor": 1.0, "vae": "", "tokenizer": ""}
        several = _Repeated(source, max(num_steps * batch_size // NUM_PHOTOS, 1))
        tokenize = functools.partial(_no_tokens, 77)
        encode_images(_Repeated(source, 1), encode, tokenize, folder / "first", batch_size, **options)  # Compiles.
        started = time.perf_counter()
        encode_images(several, encode, tokenize, folder / "cache", batch_size, **options)
        seconds = time.perf_counter() - started
        rows.append({"job": "prepare: all", "images_per_s": len(several) / seconds, "batch": batch_size})
    share = rows[-1]["images_per_s"] / rows[-2]["images_per_s"]
    return [*rows[:-1], rows[-1] | {"share_of_encode": share, "cpus": os.cpu_count()}]


def measure_data(config, size: str, num_steps: int) -> list[dict]:
    """Times the batches of a cache on one host, and counts what each of 64 hosts would read; `jobs.bench`'s arguments.

    The hosts are simulated one after the other: each reads its share of the same batches.
    """
    side = networks.abstract_checkpoint(size).unet_config["sample_size"]
    with tempfile.TemporaryDirectory() as name:
        cache = _random_cache(pathlib.Path(name) / "cache", side)
        rows = len(config.teachers)
        batch_size = config.batch_size
        ready = batches.iterate(batches.batches(cache, 0, rows, batch_size))
        for _ in range(timing.WARMUP):
            next(ready)
        started = time.perf_counter()
        for _ in range(10 * num_steps):
            next(ready)
        seconds = time.perf_counter() - started
        speed = {"job": "data", "images_per_s": 10 * num_steps * batch_size / seconds, "batch": batch_size}
        return [speed | {"cpus": os.cpu_count()}, _shares_of_hosts(cache, rows, num_steps)]


def _shares_of_hosts(cache: LatentCache, num_rows: int, num_steps: int) -> dict:
    """Returns how many examples each of NUM_HOSTS reads in some steps, and how many of them two hosts read."""
    per_row = NUM_HOSTS  # One column of the batch for each host.
    read = []
    for host in range(NUM_HOSTS):
        share = np.arange(num_rows), np.array([host])
        dataset = batches.batches(_Ids(cache), 0, num_rows, num_rows * per_row, share)
        read.append(np.concatenate([dataset[step].input_ids.ravel() for step in range(num_steps)]))
    counts = np.bincount(np.concatenate(read))
    epochs = -(-num_steps * num_rows * per_row // len(cache))
    return {
        "job": f"data, {NUM_HOSTS} hosts", "fewest_examples": min(map(len, read)), "most_examples": max(map(len, read)),
        "read_too_often": int((counts > epochs).sum()), "batch": num_rows * per_row,
    }  # fmt: skip


class _Ids:
    """A source whose token ids, latents and sizes are the example's number."""

    def __init__(self, cache: LatentCache):
        self.size, self.bucket_of = len(cache), cache.bucket_of

    def __len__(self) -> int:
        return self.size

    def gather(self, indices: np.ndarray) -> dict:
        return dict.fromkeys(("latents", "input_ids", "time_ids"), indices)


class _Repeated:
    """A source whose images come several times, each time with other ids."""

    def __init__(self, source: FolderSource, times: int):
        self.source, self.times = source, times

    def __len__(self) -> int:
        return len(self.source) * self.times

    def __getitem__(self, index: int):
        return self.source[index % len(self.source)] | {"id": index}


def _no_tokens(length: int, captions) -> np.ndarray:
    return np.zeros((len(captions), length), np.int32)


def _write_photos(folder: pathlib.Path) -> None:
    """Writes JPEGs with the spectrum of photographs: noise that is stronger the coarser it is."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(NUM_PHOTOS):
        pixels = np.full((PHOTO_SIDE, PHOTO_SIDE, 3), 128.0)
        for cells in (4, 16, 64, 256, 1024):
            noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
            enlarged = np.asarray(noise.resize((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.BICUBIC), float)
            pixels += (enlarged - 128.0) * 1.2 / cells**0.5
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(folder / f"{number}.jpg", quality=QUALITY)
        (folder / f"{number}.txt").write_text("a photograph")


def _random_encoder(config, size: str) -> Callable:
    """Returns `prepare`'s encoder with a VAE of random weights."""
    base, dtype = networks.abstract_checkpoint(size), jnp.dtype(config.dtype)
    graph, state = nnx.split(
        abstract_model(lambda rngs: AutoencoderKL.from_config(base.vae_config, dtype=dtype, rngs=rngs)), nnx.Param
    )
    mesh = sharding.make_mesh(data=jax.device_count())
    params = networks.random_params(nnx.to_pure_dict(state), mesh, dtype)
    return prepare.encoder(graph, sharding.on_each_device(params))


def _random_cache(folder: pathlib.Path, side: int) -> LatentCache:
    writer = CacheWriter(folder, CacheHeader("", "", 8 * side, 1.0, (side, side, 4), 77))
    latents = np.random.default_rng(0).standard_normal((256, side, side, 4), np.float32)
    with writer.shard(0) as shard:
        for first in range(0, EXAMPLES, len(latents)):
            ids = range(first, first + len(latents))
            shard.add(latents, _no_tokens(77, ids), np.zeros((len(latents), 4), np.int32), ids)
    return writer.finish(1)
