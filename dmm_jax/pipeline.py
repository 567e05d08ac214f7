"""Prompts and styles to images: three compiled programs (text encoders, denoiser, decoder), one compilation a shape.

Prompts, styles, seeds, the guidance scale and the solver's tables are arguments of the programs: only the shape of a
batch and the number of evaluations make a new one. A batch may hold another mix of styles in every image, and each
image another at every evaluation, since a style enters as one vector beside the timestep embedding (DMM,
arXiv:2504.12364, 4.5). A batch is divided among all devices of the process where their number divides it.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from dmm_jax.checkpoints.abstract import abstract_model
from dmm_jax.checkpoints.compare import whole_obstacles
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats.fitted_style import with_fitted_styles
from dmm_jax.checkpoints.open import Checkpoint, open_checkpoint
from dmm_jax.config import arguments
from dmm_jax.config.options import DTYPES
from dmm_jax.config.styles import Style, is_schedule, style_rows
from dmm_jax.diffusion import guidance, solvers
from dmm_jax.diffusion.schedule import NoiseSchedule
from dmm_jax.models import layers
from dmm_jax.models.autoencoder_kl import AutoencoderKL
from dmm_jax.models.text_encoders import TextConditioning, TextEncoders
from dmm_jax.models.unet_2d_condition import UNet2DConditionModel
from dmm_jax.runtime import sharding
from dmm_jax.runtime.errors import UserError
from dmm_jax.text.tokenizer import Tokenizers

PIXELS_DECODED = 2**21  # At once on a device: two images of 1024 x 1024, under 6 GiB by v5e's compiler.

Pixels = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Network:
    """One network: its structure and its parameters. Calling it computes, outside of any program of the pipeline."""

    graph: nnx.GraphDef
    params: Mapping

    def merged(self) -> nnx.Module:
        """Returns the NNX module."""
        return nnx.merge(self.graph, self.params)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.merged(), name)

    def __call__(self, *args, **kwargs):
        return self.merged()(*args, **kwargs)


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A checkpoint that draws. See `from_pretrained`; `unet`, `vae` and `text_encoders` can be called on their own."""

    unet: Network
    vae: Network
    text_encoders: Network  # Of the checkpoint: one, or SDXL's two.
    tokenizers: Tokenizers
    schedule: NoiseSchedule
    styles: tuple[str, ...]  # Names in row order; empty for a stock checkpoint.
    source: Checkpoint

    @property
    def name(self) -> str:
        """The checkpoint's name."""
        return self.source.name

    @classmethod
    def from_pretrained(
        cls, path, dtype: str = "float32", base=None, extra_styles: Sequence = (), prediction_type: str = ""
    ) -> "Pipeline":
        """Opens a diffusers folder (stock or DMM), a single file, or the workdir of a training run.

        Args:
          path: the checkpoint; nothing is fetched from a network.
          dtype: of the arithmetic and of the kernels in memory.
          base: another checkpoint, for what `path` lacks (a single file has no tokenizer).
          extra_styles: files of `dmm-jax fit-style`, a style each, after the checkpoint's own.
          prediction_type: "epsilon" or "v_prediction", of a single file that does not say it.

        Raises:
          ValueError: the checkpoint is damaged, incomplete or of an unknown architecture, or an extra style was fitted
            to another.
        """
        checkpoint = open_checkpoint(path, base=base, prediction_type=prediction_type)
        checkpoint = with_fitted_styles(checkpoint, extra_styles)
        names = tuple(checkpoint.styles or ())
        return cls.of_student(checkpoint, checkpoint.unet_config, names, dtype=dtype).with_unet(
            checkpoint.params("unet")
        )

    @classmethod
    def of_student(cls, base: Checkpoint, unet_config: Mapping, styles: Sequence[str], *, dtype: str) -> "Pipeline":
        """Builds a pipeline from `base`'s VAE, text encoders and tokenizers, for a UNet that `with_unet` will bring.

        Raises:
          CheckpointError: the base is incomplete, its text encoders do not fit its UNet, or nobody says what it
            predicts.
        """
        problems = whole_obstacles(str(base.path), base)
        if len(base.tokenizer_folders) > len(base.text_encoders):
            problems.append(
                f"{base.path} has {len(base.text_encoders)} text encoder and {len(base.tokenizer_folders)} tokenizers: "
                f"give a base of its own family, {base.architecture}."
            )
        if problems:
            raise CheckpointError(" ".join(problems))
        dtype = _dtype_of(dtype)
        attention = "cudnn" if jax.default_backend() == "gpu" and dtype == jnp.bfloat16 else "xla"
        builders = {
            "unet": lambda rngs: UNet2DConditionModel.from_config(
                unet_config, dtype=dtype, rngs=rngs, attention_implementation=attention
            ),
            "vae": lambda rngs: AutoencoderKL.from_config(base.vae_config, dtype=dtype, rngs=rngs),
            "text_encoders": lambda rngs: TextEncoders(base.text_configs, dtype=dtype, rngs=rngs),
        }
        graphs = {name: nnx.split(abstract_model(build))[0] for name, build in builders.items()}
        frozen = {"vae": base.params("vae"), "text_encoders": base.text_params()}
        return cls(
            unet=Network(graphs["unet"], {}),
            tokenizers=Tokenizers.from_folders(base.tokenizer_folders),
            schedule=NoiseSchedule.from_config(base.scheduler_config),
            styles=tuple(styles),
            source=base,
            **{name: Network(graphs[name], in_memory(params, dtype)) for name, params in frozen.items()},
        )

    def with_unet(self, params: Mapping) -> "Pipeline":
        """Returns the same pipeline around other UNet parameters; nothing is compiled again."""
        return dataclasses.replace(self, unet=Network(self.unet.graph, in_memory(params, self._dtype)))

    def with_text_encoders(self, params: Mapping) -> "Pipeline":
        """Returns the same pipeline behind other text encoders (by name); nothing is compiled again."""
        encoders = Network(self.text_encoders.graph, in_memory(params, self._dtype))
        return dataclasses.replace(self, text_encoders=encoders)

    @property
    def _dtype(self):
        return self.vae.params["decoder"]["conv_in"]["kernel"].dtype

    def style_weights(
        self, styles: Style | Sequence[Style], batch_size: int, timesteps: Float[np.ndarray, " S"]
    ) -> np.ndarray | None:
        """Turns names, mixes and schedules into weights at each timestep (B, S, N); None for a stock checkpoint.

        Raises:
          ValueError: a name that is not there (the nearest is suggested), none given, or one for a stock checkpoint.
        """
        if styles is None or isinstance(styles, (str, Mapping)) or is_schedule(styles):
            styles = [styles] * batch_size
        styles = arguments.each("styles", styles, batch_size)
        if not self.styles:
            if any(style is not None for style in styles):
                raise UserError("this checkpoint has no styles: it is a stock one. Leave styles out.")
            return None
        last = self.schedule.num_train_timesteps
        return np.stack([style_rows(style, self.styles, timesteps, last) for style in styles])

    def encode_prompts(self, prompts: Sequence[str | None]) -> TextConditioning:
        """Returns encoder_hidden_states (B, 77, D) and pooled (B, P), float32; pooled is None but for SDXL.

        A prompt that is None is no prompt: "" for Stable Diffusion 1 and 2, zeros for XL.
        """
        input_ids = sharding.spread(self.tokenizers(prompts))
        return _encode(self.text_encoders.graph, self.text_encoders.params, input_ids)

    def decode(self, latents):
        """Decodes scaled latents (B, h, w, 4) to uint8 images (B, H, W, 3); large batches in parts (PIXELS_DECODED)."""
        latents = jnp.asarray(latents, jnp.float32)
        at_once = max(PIXELS_DECODED // (math.prod(latents.shape[1:3]) * self.cells**2), 1)
        return sharding.in_parts(functools.partial(_decode, self.vae.graph, self.vae.params), at_once, latents)

    @property
    def cells(self) -> int:
        """Pixels along the side of one latent cell."""
        return 2 ** (len(self.vae.params["encoder"]["down_blocks"]) - 1)

    def __call__(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str | None] | str | None = None,
        styles: Style | Sequence[Style] = None,
        seeds: Sequence[int] | None = None,
        latents=None,
        height: int = 0,
        width: int = 0,
        num_inference_steps: int = 25,
        guidance_scale: float | Sequence[float] = 7.0,
        solver: str = "dpmpp_2m",
        output: str = "images",
        original_size: Pixels | None = None,
        crops_coords_top_left: Pixels = (0, 0),
        target_size: Pixels | None = None,
    ) -> np.ndarray:
        """Draws one image per prompt.

        Args:
          prompts: B of them.
          negative_prompts: one for all, one each, or None for none: "", and zeros for Stable Diffusion XL.
          styles: a name, a mix such as {"anime": 0.7, "photo": 0.3} (rows are mixed before the MLP), a schedule of
            these over timesteps such as [(1000, "photo"), (600, "anime")] (`config.styles.style_rows`), or one of them
            per prompt. Needed by a merged model; a stock one takes none.
          seeds: one per prompt, 0 to 2**32 - 1 (default 0, 1, ...). A seed draws the same noise, bit for bit, whatever
            batch it is in. The image is then the same to float rounding, which depends on the batch's size: one of its
            values of 0 to 255 may differ by 1.
          latents: unit noise (B, h, w, C) instead of seeds.
          height, width: pixels; 0 is the size of `latents`, or that which the model was trained at.
          num_inference_steps: of the solver.
          guidance_scale: one, or one each; 1.0 is off (arXiv:2207.12598).
          solver: a name in `dmm_jax.diffusion.solvers.SOLVERS`.
          output: "images", uint8 (B, H, W, 3), or "latents", float32 scaled latents (B, h, w, C).
          original_size, crops_coords_top_left, target_size: what Stable Diffusion XL is told of the picture, (height,
            width) or (top, left) in pixels (arXiv:2307.01952, 2.2); the sizes are (height, width) if left out. Other
            models are not told.

        Raises:
          ValueError: any of these does not fit; says what to give.
        """
        if output not in ("images", "latents"):
            raise UserError(f"output must be 'images' or 'latents'; got {output!r}.")
        prompts = arguments.texts("prompts", prompts)
        batch_size = len(prompts)
        if isinstance(negative_prompts, (str, type(None))):
            negative_prompts = [negative_prompts] * batch_size
        negatives = arguments.each(
            "negative_prompts", arguments.texts("negative_prompts", negative_prompts), batch_size
        )
        arguments.whole("num_inference_steps", num_inference_steps, 1)
        plan = solvers.plan(str(solver), self.schedule, num_inference_steps)
        weights = self.style_weights(styles, batch_size, plan.timesteps)
        seeds = arguments.each("seeds", range(batch_size) if seeds is None else seeds, batch_size)
        seeds = [arguments.whole("a seed", seed, 0, arguments.MAX_SEED) for seed in seeds]
        keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
        scales = [guidance_scale] * batch_size if np.ndim(guidance_scale) == 0 else guidance_scale
        scales = arguments.each("guidance_scale", scales, batch_size)
        scales = np.array([arguments.number("guidance_scale", scale) for scale in scales], np.float32)
        guided = bool(np.any(scales != 1.0))
        height, width = self._sides(height, width, latents)
        latents = self._noise(keys, latents, height, width)
        text = self.encode_prompts(
            [text for pair in zip(negatives, prompts, strict=True) for text in pair] if guided else prompts
        )
        told = [original_size or (height, width), crops_coords_top_left, target_size or (height, width)]
        names = ("original_size", "crops_coords_top_left", "target_size")
        told = [pixels for name, given in zip(names, told, strict=True) for pixels in arguments.pair(name, given)]
        added = text.added_cond(jnp.tile(jnp.array(told, jnp.float32), (len(text.encoder_hidden_states), 1)))
        states = text.encoder_hidden_states
        latents, keys, weights, scales = sharding.spread((latents, keys, weights, scales))
        drawn = _denoise(self.unet.graph, guided, self.unet.params, plan, latents, keys, states, added, weights, scales)
        return np.asarray(drawn if output == "latents" else self.decode(drawn))

    def _sides(self, height, width, latents) -> tuple[int, int]:
        """Returns height and width in pixels: as given, or where they are 0 those of the latents, or the model's."""
        shape = np.shape(latents)
        side = self.unet.merged().config["sample_size"] * self.cells
        own = [cells * self.cells for cells in shape[1:3]] if len(shape) == 4 else (side, side)
        sides = {"height": height or own[0], "width": width or own[1]}
        return tuple(arguments.size(name, pixels, self.cells) for name, pixels in sides.items())

    def _noise(self, keys, latents, height, width):
        shape = (height // self.cells, width // self.cells, self.unet.merged().config["in_channels"])
        if latents is None:
            return _unit_noise(keys, shape)
        latents = jnp.asarray(latents, jnp.float32)
        if latents.shape != (len(keys), *shape) or not jnp.isfinite(latents).all():
            raise UserError(f"latents must be finite unit noise of shape {(len(keys), *shape)}; got {latents.shape}.")
        return latents


def _dtype_of(dtype) -> np.dtype:
    if str(dtype) not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}.")
    return jnp.dtype(dtype)


def in_memory(params: Mapping, dtype):
    """Puts parameters on every device of this process, as `in_dtype` has them."""
    return sharding.on_each_device(in_dtype(params, dtype))


def in_dtype(params: Mapping, dtype):
    """Returns parameters as layers of this compute dtype keep them (`layers.stored_dtype`)."""
    return jax.tree.map_with_path(lambda path, leaf: jnp.asarray(leaf, layers.stored_dtype(path, dtype)), params)


@functools.partial(jax.jit, static_argnums=1)
def _unit_noise(keys, shape):
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


@functools.partial(jax.jit, static_argnums=0)
def _encode(graph, params, input_ids):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), nnx.merge(graph, params)(input_ids))


@functools.partial(jax.jit, static_argnums=0)
def _decode(graph, params, latents):
    vae = nnx.merge(graph, params)
    images = vae.decode(latents / vae.scaling_factor)
    return jnp.round(jnp.clip(images.astype(jnp.float32) * 127.5 + 127.5, 0.0, 255.0)).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _denoise(graph, guided, params, plan, noise, keys, text, added, weights, guidance_scales):
    """Runs the solver; an image's pair (negative, prompt) stays adjacent, so that a sharded batch stays put.

    The UNet itself makes two of a latent where its two prompts come in. SDXL's come in at once, beside the timestep.
    """
    unet = nnx.merge(graph, params)
    repeats = 1 if added is None else len(text) // len(noise)

    def denoise(latents, timestep, weights=None):
        style = None if weights is None else jnp.repeat(unet.style_embedding(weights), repeats, axis=0)
        latents = jnp.repeat(latents, repeats, axis=0)
        timesteps = jnp.broadcast_to(timestep, latents.shape[:1])
        prediction = unet(latents, timesteps, text, style_embedding=style, added_cond=added).sample
        return guidance.guide(prediction[0::2], prediction[1::2], guidance_scales) if guided else prediction

    return solvers.sample(plan, denoise, noise, keys, *([] if weights is None else [jnp.swapaxes(weights, 0, 1)]))
