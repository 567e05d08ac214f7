"""`dmm-jax prepare` for images: a config's images and captions become a latent cache (latents and token ids)."""

import functools
import math
import warnings
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dmm_jax.checkpoints.architecture import CELL
from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.checkpoints.parents import open_base
from dmm_jax.config import arguments, checks
from dmm_jax.config.options import SHAPES_WORLD
from dmm_jax.data.buckets import Size, bucket_sizes
from dmm_jax.data.cache import LatentCache
from dmm_jax.data.files import IGNORED, Unused
from dmm_jax.data.fill_cache import check_place, encode_images
from dmm_jax.data.sources import FolderSource, ImageSource
from dmm_jax.models.autoencoder_kl import AutoencoderKL
from dmm_jax.models.network import place_params
from dmm_jax.runtime import sharding
from dmm_jax.runtime.errors import UserError, refuse
from dmm_jax.runtime.processes import say
from dmm_jax.text.tokenizer import Tokenizers
from dmm_jax.world.source import ShapesSource

IMAGES_AT_ONCE = 32
PIXELS_ENCODED = 2**23  # Per call on one device: eight images of 1024 x 1024, under 9 GiB by v5e's compiler.


def prepare_images(config, strict: bool = False, dry_run: bool = False) -> LatentCache | None:
    """Encodes `config.data.source` with the base's VAE and tokenizers into `config.data.cache`, and opens the cache.

    Prints the stages, and a table of how many files are used and not used.

    Args:
      strict: whether a file that is not used is an error.
      dry_run: lists and checks everything, prints the table, and writes nothing.

    Raises:
      ValueError: the source, the base or the cache folder cannot be used.
    """
    check_config(config)
    base = open_base(config)
    sizes = sizes_of(config, base)
    tokenizers = base.tokenizers()
    say(f"reading {config.data.source or config.data.kind}")
    source = open_source(config)
    captions = CaptionTokens(tokenizers, config.data.num_chunks)
    unused = getattr(source, "unused", Unused())
    refuse("--strict: some files are not used", unused.lines(but=IGNORED) if strict else [])
    if dry_run:
        for line in (f"{len(source):9,d} images would be encoded into {config.data.cache}", *unused.lines()):
            say(line)
        return None
    listed = sum(unused.counts.values())
    scaling_factor, encode = build_encoder(base, config.dtype)
    cache = encode_images(
        source,
        encode,
        captions,
        config.data.cache,
        min(IMAGES_AT_ONCE, len(source)),
        sizes=sizes,
        scaling_factor=scaling_factor,
        vae=base.digest("vae"),
        tokenizer=tokenizers.digest,
        seed=config.seed,
        unused=unused,
        strict=strict,
    )
    if earlier := cache.header.dropped + listed - sum(unused.counts.values()):
        unused.add("unreadable, found by an earlier call or another process", count=earlier)
    for line in (f"{len(cache):9,d} images used", *bucket_lines(cache), *unused.lines(), *captions.lines()):
        say(line)
    return cache


def sizes_of(config, base: Checkpoint) -> tuple[Size, ...]:
    """Returns height and width in pixels of a config's buckets.

    Raises:
      UserError: the UNet cannot halve them as often as it does, or the resolution is no multiple of a latent cell.
    """
    arguments.pixels("data.resolution", config.data.resolution, CELL)
    unit = CELL * 2 ** (len(base.unet_config["block_out_channels"]) - 1)
    return bucket_sizes(config.data.resolution, config.data.max_aspect_ratio, unit)


def bucket_lines(cache: LatentCache) -> list[str]:
    """Returns a line for each bucket of several: its height and width, and how many images it has."""
    if not cache.header.buckets:
        return []
    counts = np.bincount(cache.bucket_of, minlength=len(cache.header.sizes))
    sizes = zip(cache.header.sizes, counts, strict=True)
    return [f"{count:9,d} of {height} x {width} pixels" for (height, width), count in sizes]


class CaptionTokens:
    """Turns captions into rows of token ids, and counts those that are too long."""

    def __init__(self, tokenizers: Tokenizers, num_chunks: int):
        """Takes the number of chunks of a row."""
        self.tokenizers, self.num_chunks = tokenizers, num_chunks
        self.num_cut, self.longest = 0, num_chunks

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """Returns ids (B, L); a caption that is too long is cut at its end."""
        sizes = [self.tokenizers.num_chunks(caption) for caption in captions]
        self.num_cut += sum(size > self.num_chunks for size in sizes)
        self.longest = max([self.longest, *sizes])
        with warnings.catch_warnings():  # The tokenizers name each cut text; a data set has too many.
            warnings.simplefilter("ignore")
            return self.tokenizers(captions, self.num_chunks)

    def lines(self) -> list[str]:
        """Returns a line if captions were cut since the start: how many, and what to set."""
        room = self.num_chunks * self.tokenizers.tokenizers[0].room
        advice = f"data.num_chunks={self.longest} would keep all of the longest"
        return [f"{self.num_cut:9,d} captions cut after {room} tokens; {advice}"] if self.num_cut else []


def check_config(config) -> None:
    """Raises ValueError if an option is out of range, or the cache folder is not set or cannot be written."""
    checks.check_values(config)
    if not config.data.cache:
        raise UserError("data.cache is empty: set the folder that the latent cache is written to.")
    check_place(config.data.cache)


def open_source(config) -> ImageSource:
    """Opens the images that a config names.

    Raises:
      ValueError: no source is set, or the source has no captioned images.
    """
    if config.data.kind == SHAPES_WORLD:
        return ShapesSource(config.data.num_examples, seed=config.seed, shuffled=True)
    if not config.data.source:
        raise UserError(
            "data.source is empty: set a folder of images and captions, or data.kind='prompts' and a file of prompts."
        )
    source = FolderSource(config.data.source, where=config.data.where)
    if 0 < config.data.num_examples < len(source):
        surplus = len(source) - config.data.num_examples
        source.unused.add("beyond data.num_examples", source.rows[-1][0].name, surplus)
        del source.rows[config.data.num_examples :]
    return source


def build_encoder(base: Checkpoint, dtype: str):
    """Returns scaling factor and `encode(images uint8 (B, H, W, 3), keys (B,)) -> unscaled latents (B, h, w, C)`."""
    model = nnx.eval_shape(lambda: AutoencoderKL.from_config(base.vae_config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))
    return model.scaling_factor, encoder(nnx.split(model)[0], place_params(base.params("vae"), jnp.dtype(dtype)))


def encoder(graph: nnx.GraphDef, params) -> Callable:
    """Returns `encode(images uint8 (B, H, W, 3), keys (B,)) -> unscaled latents (B, h, w, C)` of a VAE."""
    run = functools.partial(_encode, graph, params)

    def encode(images, keys):
        at_once = max(PIXELS_ENCODED // math.prod(images.shape[1:3]), 1)
        return sharding.in_parts(run, at_once, images, keys)

    return encode


@functools.partial(jax.jit, static_argnums=0)
def _encode(graph, params, images, keys):
    """Samples the VAE's posterior of each image with the image's own key."""
    posterior = nnx.merge(graph, params).encode(images.astype(jnp.float32) / 127.5 - 1.0)
    noise = jax.vmap(lambda key: jax.random.normal(key, posterior.mean.shape[1:]))(keys)
    return posterior.mean + posterior.std * noise
