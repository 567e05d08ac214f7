"""Pipeline: draws images from prompts and styles with one checkpoint.

Three programs are compiled once per batch shape: text encoders, denoiser, decoder. Prompts, styles, seeds, guidance
scales and the solver's tables are their arguments, so new values compile nothing. A style enters the UNet as one vector
added to the timestep embedding (DMM, arXiv:2504.12364, 4.5); each image of a batch may have its own mix of styles, and
another mix at every evaluation of the UNet. The process's devices share a batch if their number divides it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float
from PIL import Image

from dmm_jax.checkpoints.abstract import abstract_graph, abstract_model
from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.checkpoints.compare import standalone_problems
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats.embedding import read_embeddings
from dmm_jax.checkpoints.formats.fitted_style import with_fitted_styles
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.recorded_sampling import recorded_sampling
from dmm_jax.checkpoints.vae import with_vae
from dmm_jax.config import arguments
from dmm_jax.config.options import DTYPES
from dmm_jax.config.styles import Style, image_names, is_schedule, single_styles, style_rows
from dmm_jax.diffusion import solvers
from dmm_jax.diffusion.schedule import NoiseSchedule
from dmm_jax.kernels.attention import choose_implementation
from dmm_jax.models import drawing, text_encoders
from dmm_jax.models.network import Network, place_params
from dmm_jax.models.preview import Preview, fit_preview, patches
from dmm_jax.models.text_encoders import TextConditioning, TextEncoders
from dmm_jax.models.unet_config import per_axis
from dmm_jax.runtime import sharding
from dmm_jax.runtime.errors import UserError
from dmm_jax.text.prompt_chunks import PromptTokens, tokenize
from dmm_jax.text.prompt_grammar import A1111, GRAMMARS
from dmm_jax.text.tokenizer import Tokenizers

PIXELS_DECODED = 2**21  # Per device and call: two images of 1024 x 1024, under 6 GiB by v5e's compiler.
OUTPUTS, MIXINGS = ("images", "pil", "latents"), ("rows", "predictions")
# {argument of other libraries: what it is called here}
OTHER_NAMES = {
    "prompt": "prompts", "seed": "seeds", "generator": "seeds", "output_type": "output", "scheduler": "solver",
    "sampler": "solver", "steps": "num_inference_steps", "cfg_scale": "guidance_scale", "style": "styles",
    "callback_on_step_end": "callback", "clip_skip": "an argument of Pipeline.from_pretrained",
}  # fmt: skip
Pixels = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A checkpoint that draws; `from_pretrained` opens one. `unet`, `vae` and `text_encoders` are callable as well."""

    unet: Network
    vae: Network
    text_encoders: Network  # One text encoder, or SDXL's two.
    tokenizers: Tokenizers
    schedule: NoiseSchedule
    styles: tuple[str, ...]  # Names in row order; empty for a stock checkpoint.
    source: Checkpoint
    # {name: its number of vectors}, in the order of their rows in the text encoders' tables.
    embeddings: Mapping[str, int] = dataclasses.field(default_factory=dict)
    prompt_grammar: str = A1111  # How prompts are read; "plain": as text, cut after one chunk.
    default_sampling: Mapping | None = None  # How it draws where a call does not say; None: as `source` records.

    def __repr__(self) -> str:
        unet = f"{self.unet.num_parameters:,} UNet parameters"
        return f"Pipeline({self.name!r}, styles={self.styles}, dtype={self.dtype}, {unet})"

    @property
    def name(self) -> str:
        """The checkpoint's name."""
        return self.source.name

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the arithmetic."""
        return self.vae.params["decoder"]["conv_in"]["kernel"].dtype

    @functools.cached_property
    def sampling(self) -> dict[str, object]:
        """How it draws where a call does not say: as its training run, else 25 steps of dpmpp_2m at guidance 7."""
        return recorded_sampling(self.source) if self.default_sampling is None else dict(self.default_sampling)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels along the side of one latent cell."""
        return 2 ** (len(self.vae.params["encoder"]["down_blocks"]) - 1)

    @classmethod
    def from_pretrained(
        cls,
        path,
        dtype: str = "float32",
        base=None,
        extra_styles: Sequence = (),
        prediction_type: str = "",
        clip_skip: int = 1,
        embeddings: Sequence = (),
        prompt_grammar: str = A1111,
        vae="",
    ) -> "Pipeline":
        """Opens a diffusers folder (stock or DMM), a single file, or the workdir of a training run.

        Args:
          path: a checkpoint on disk; the network is not used.
          dtype: dtype of the arithmetic and of the stored kernels.
          base: a second checkpoint that provides what `path` lacks (a single file has no tokenizer).
          extra_styles: files written by `dmm-jax fit-style`; each adds one style after the checkpoint's own.
          prediction_type: "epsilon" or "v_prediction", for a single file that does not record it.
          clip_skip: the layer of Stable Diffusion 1's text encoder that conditions, from its end: 1 is the last.
          embeddings: files of textual inversion, or "NAME=FILE"; prompts use them by name, in the grammar "a1111".
          prompt_grammar: "a1111", the weights and chunks of `text.prompt_grammar`, or "plain".
          vae: a file, folder or checkpoint whose VAE replaces the checkpoint's own.

        Raises:
          ValueError: the checkpoint is damaged, incomplete or of an unknown architecture, or an extra style was fitted
            to another checkpoint.
        """
        arguments.whole_number("clip_skip", clip_skip, 1)
        checkpoint = open_checkpoint(path, base=base, prediction_type=prediction_type, clip_skip=clip_skip)
        checkpoint = with_vae(with_fitted_styles(checkpoint, extra_styles), vae)
        options = {"dtype": dtype, "prompt_grammar": prompt_grammar}
        pipeline = cls.for_unet(checkpoint, checkpoint.unet_config, checkpoint.styles or (), **options)
        return pipeline.with_unet(checkpoint.params("unet")).with_embeddings(embeddings)

    @classmethod
    def for_unet(
        cls,
        base: Checkpoint,
        unet_config: Mapping,
        styles: Sequence[str],
        *,
        dtype: str,
        prompt_grammar: str = A1111,
        default_sampling: Mapping | None = None,
    ) -> "Pipeline":
        """Returns a pipeline with `base`'s VAE, text encoders and tokenizers; `with_unet` adds the UNet's parameters.

        Raises:
          CheckpointError: the base is incomplete, its text encoders do not fit its UNet, or its prediction type is
            unknown.
        """
        problems = standalone_problems(base, str(base.path))
        if len(base.tokenizer_folders) > len(base.text_encoders):
            problems.append(
                f"{base.path} has {len(base.text_encoders)} text encoder and {len(base.tokenizer_folders)} tokenizers: "
                f"give a base of its own family, {base.architecture}."
            )
        if problems:
            raise CheckpointError(" ".join(problems))
        if str(dtype) not in DTYPES:
            raise UserError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}.")
        if prompt_grammar not in GRAMMARS:
            raise UserError(f"prompt_grammar must be one of {', '.join(GRAMMARS)}; got {prompt_grammar!r}.")
        dtype = jnp.dtype(dtype)
        implementation = choose_implementation("auto", dtype, num_devices=jax.local_device_count())
        texts = abstract_model(lambda rngs: TextEncoders(base.text_configs, dtype=dtype, rngs=rngs))
        graphs = {
            "unet": abstract_graph("unet", unet_config, dtype=dtype, attention_implementation=implementation),
            "vae": abstract_graph("vae", base.vae_config, dtype=dtype),
            "text_encoders": nnx.split(texts)[0],
        }
        return cls(
            unet=Network(graphs["unet"], {}),
            vae=Network(graphs["vae"], place_params(base.params("vae"), dtype)),
            text_encoders=Network(graphs["text_encoders"], place_params(base.text_params(), dtype)),
            tokenizers=base.tokenizers(),
            schedule=NoiseSchedule.from_config(base.scheduler_config),
            styles=tuple(styles),
            source=base,
            prompt_grammar=prompt_grammar,
            default_sampling=default_sampling,
        )

    def with_unet(self, params: Mapping) -> "Pipeline":
        """Returns this pipeline with other UNet parameters; nothing is compiled again."""
        return dataclasses.replace(self, unet=Network(self.unet.graph, place_params(params, self.dtype)))

    def with_text_encoders(self, params: Mapping) -> "Pipeline":
        """Returns this pipeline with other text encoders, keyed by name, without embeddings; compiles nothing again."""
        encoders = Network(self.text_encoders.graph, place_params(params, self.dtype))
        return dataclasses.replace(self, text_encoders=encoders, embeddings={})

    def with_checkpoint(self, checkpoint: Checkpoint, base: Checkpoint, embeddings: Sequence = ()) -> "Pipeline":
        """Returns this pipeline with a checkpoint's UNet, text encoders (or else the base's) and embeddings."""
        schedule = dataclasses.replace(self.schedule, prediction_type=checkpoint.prediction_beside(base))
        pipeline = (
            dataclasses.replace(self, schedule=schedule)
            .with_unet(checkpoint.params("unet"))
            .with_text_encoders(checkpoint.text_params(base))
        )
        return pipeline.with_embeddings(embeddings)

    def with_embeddings(self, files: Sequence) -> "Pipeline":
        """Returns this pipeline with more embeddings, as rows after those of the text encoders' tables.

        Raises:
          CheckpointError: a file cannot be read (`formats.embedding`), or is for other text encoders.
        """
        if not files:
            return self
        tables = text_encoders.token_tables(self.text_encoders.params)
        widths = {name: table.shape[1] for name, table in tables.items()}
        added = read_embeddings(files, widths, min(tokenizer.room for tokenizer in self.tokenizers.tokenizers))
        rows = {name: [embedding.vectors[name] for embedding in added] for name in tables}
        pipeline = self.with_text_encoders(text_encoders.with_rows(self.text_encoders.params, rows))
        counts = {embedding.name: embedding.num_vectors for embedding in added}
        if taken := set(counts) & set(self.embeddings):
            raise CheckpointError(f"two embeddings are called {', '.join(taken)}: give one a name, NAME=FILE.")
        return dataclasses.replace(pipeline, embeddings={**self.embeddings, **counts})

    def style_weights(
        self, styles: Style | Sequence[Style], batch_size: int, timesteps: Float[np.ndarray, " S"], repeats: int = 1
    ) -> np.ndarray | None:
        """Returns the weight of each style at each timestep (B, S, N); None for a stock checkpoint.

        Args:
          repeats: consecutive images that one of the styles may be for, if there are fewer than images.

        Raises:
          ValueError: an unknown name (the message suggests the nearest), no style for a merged model, or a style for a
            stock checkpoint.
        """
        if styles is None or isinstance(styles, (str, Mapping)) or is_schedule(styles):
            styles = [styles] * batch_size
        styles = arguments.per_prompt("styles", styles, batch_size, repeats)
        if not self.styles:
            if any(style is not None for style in styles):
                raise UserError("this checkpoint has no styles: it is a stock one. Leave styles out.")
            return None
        last = self.schedule.num_train_timesteps
        return np.stack([style_rows(style, self.styles, timesteps, last) for style in styles])

    def tokenize(self, prompts: Sequence[str | None], num_chunks: int = 1) -> PromptTokens:
        """Returns the token ids and weights of prompts, all of as many chunks as the longest, at least `num_chunks`.

        Raises:
          UserError: a prompt does not follow the grammar, or the text encoder has no row for one of its tokens.
        """
        ids_of_names = text_encoders.embedding_ids(self.text_encoders.params, self.embeddings)
        tokens = tokenize(self.tokenizers, prompts, self.prompt_grammar, num_chunks, ids_of_names)
        text_encoders.check_rows(self.text_encoders.params, self.tokenizers.tokenizers, tokens.input_ids)
        return tokens

    def num_chunks(self, prompts: Sequence[str | None]) -> int:
        """Returns the chunks of the longest prompt. Images do not depend on their batch if all batches have so many."""
        return self.tokenize(list(dict.fromkeys(prompts))).input_ids.shape[1]

    def encode_prompts(self, prompts: Sequence[str | None], num_chunks: int = 1) -> TextConditioning:
        """Returns encoder_hidden_states (B, 77 K, D) and, for SDXL, pooled (B, P), both float32; pooled is else None.

        K is the number of chunks of the longest prompt, at least `num_chunks`. The prompt None means "no prompt": ""
        for Stable Diffusion 1 and 2, zeros for SDXL.
        """
        tokens = sharding.spread(self.tokenize(prompts, num_chunks))
        return drawing.encode(self.text_encoders.graph, self.text_encoders.params, *tokens)

    def decode(self, latents, names: Sequence[str] = ()):
        """Decodes scaled latents (B, h, w, 4) to uint8 images (B, H, W, 3); large batches in parts (PIXELS_DECODED).

        Raises:
          UserError: an image is not finite; `names` says which.
        """
        latents = jnp.asarray(latents, jnp.float32)
        at_once = max(PIXELS_DECODED // (math.prod(latents.shape[1:3]) * self.vae_scale_factor**2), 1)
        decode = functools.partial(drawing.decode, self.vae.graph, self.vae.params)
        images, finite = sharding.in_parts(decode, at_once, latents)
        drawing.check_finite("pixels", finite, names)
        return images

    def preview(self, latents: np.ndarray) -> np.ndarray:
        """Returns small pictures of latents (B, h, w, C), uint8 (B, h, w, 3): cheap, for a callback."""
        return np.asarray(self._preview.draw(np.asarray(latents, np.float32)))

    @functools.cached_property
    def _preview(self) -> Preview:
        config = self.unet.merged().config
        latents = patches((1, *per_axis(config["sample_size"]), config["in_channels"]))
        return fit_preview(latents, np.asarray(self.decode(latents)))

    def __call__(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str | None] | str | None = None,
        styles: Style | Sequence[Style] = None,
        seeds: Sequence[int] | None = None,
        latents=None,
        height: int = 0,
        width: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        guidance_rescale: float | Sequence[float] | None = None,
        solver: str | None = None,
        mixing: str = "rows",
        output: str = "images",
        original_size: Pixels | None = None,
        crops_coords_top_left: Pixels = (0, 0),
        target_size: Pixels | None = None,
        num_chunks: int = 1,
        num_images_per_prompt: int = 1,
        callback: Callable[[int, float, np.ndarray], bool | None] | None = None,
        **others,
    ) -> np.ndarray | list:
        """Draws one image per prompt, or `num_images_per_prompt`. What is "per image" may also be per prompt.

        What is None of num_inference_steps, guidance_scale, guidance_rescale and solver is as `sampling` says.

        Args:
          prompts: texts, or one text.
          negative_prompts: one for all images, one per image, or None for none: "", and zeros for SDXL. Also as
            `negative_prompt`.
          styles: a name, a mix such as {"anime": 0.7, "photo": 0.3} (rows are mixed before the MLP), a schedule of
            these over timesteps such as [(1000, "photo"), (600, "anime")] (`config.styles.style_rows`), or one of them
            per prompt. A merged model requires it; a stock one takes none.
          seeds: one per image, 0 to 2**32 - 1 (default 0, 1, ...). A seed draws the same noise, bit for bit, in any
            batch. The image is the same to float rounding, which depends on the batch's size: a uint8 value may differ
            by 1.
          latents: unit noise (B, h, w, C) instead of seeds.
          height, width: pixels; 0 takes the size from `latents`, or from the model's training size.
          num_inference_steps: steps of the solver.
          guidance_scale: one number, or one per image; 1.0 is off (arXiv:2207.12598).
          guidance_rescale: one share from 0 to 1, or one per image; 0.7 keeps models with zero terminal SNR from
            overexposure (arXiv:2305.08891, 3.4).
          solver: a name in `dmm_jax.diffusion.solvers.SOLVERS`, or A1111's, such as "DPM++ 2M SDE Karras".
          mixing: what of a mix is averaged: "rows" of the style table, free, or "predictions" of its styles: then every
            image of the batch costs as many as its largest mix has styles, and unlike styles mix more evenly.
          output: "images", uint8 (B, H, W, 3), "pil", a list, or "latents", float32 scaled latents (B, h, w, C).
          original_size, crops_coords_top_left, target_size: SDXL's size conditioning, (height, width) or (top, left) in
            pixels (arXiv:2307.01952, 2.2); the sizes default to (height, width). Other models ignore it.
          num_chunks: empty chunks fill every prompt up to the longest of the batch, and to this number. Batches of one
            number share a compiled program, and an image is the same in each.
          callback: called after every evaluation of the network with its number, its timestep and the noisy latents
            (B, h, w, C), of which `preview` makes pictures; drawing stops if it returns False. Evaluations then run one
            by one, a little slower.

        Raises:
          ValueError: an argument does not fit; the message names what does.
        """
        negative_prompts = others.pop("negative_prompt", negative_prompts)
        arguments.refuse_unknown(others, Pipeline.__call__, OTHER_NAMES)
        if output not in OUTPUTS:
            raise UserError(f"output must be one of {', '.join(OUTPUTS)}; got {output!r}.")
        if mixing not in MIXINGS:
            raise UserError(f"mixing must be one of {', '.join(MIXINGS)}; got {mixing!r}.")
        arguments.whole_number("num_images_per_prompt", num_images_per_prompt, 1)
        prompts = [text for text in arguments.texts("prompts", prompts) for _ in range(num_images_per_prompt)]
        batch_size = len(prompts)
        if isinstance(negative_prompts, (str, type(None))):
            negative_prompts = [negative_prompts] * batch_size
        negatives = arguments.texts("negative_prompts", negative_prompts)
        negatives = arguments.per_prompt("negative_prompts", negatives, batch_size, num_images_per_prompt)
        num_inference_steps = self._or_default("num_inference_steps", num_inference_steps)
        guidance_scale = self._or_default("guidance_scale", guidance_scale)
        guidance_rescale = self._or_default("guidance_rescale", guidance_rescale)
        solver = self._or_default("solver", solver)
        arguments.whole_number("num_inference_steps", num_inference_steps, 1)
        plan = solvers.plan(str(solver), self.schedule, num_inference_steps)
        weights = self.style_weights(styles, batch_size, plan.timesteps, num_images_per_prompt)
        if mixing == "predictions":
            if weights is None:
                raise UserError("this checkpoint has no styles whose predictions could be mixed: leave mixing out.")
            weights = single_styles(weights)
        names = image_names(prompts, styles)
        keys = _keys(seeds, batch_size)
        scales = arguments.per_image("guidance_scale", guidance_scale, batch_size, num_images_per_prompt)
        rescales = arguments.per_image(
            "guidance_rescale", guidance_rescale, batch_size, num_images_per_prompt, 0.0, 1.0
        )
        guided = bool(np.any(scales != 1.0))
        height, width = self._image_size(height, width, latents)
        noise = self._noise(keys, latents, height, width)
        if guided:
            prompts = [text for pair in zip(negatives, prompts, strict=True) for text in pair]
        text = self.encode_prompts(prompts, num_chunks)
        time_ids = (
            *arguments.pixel_pair("original_size", original_size or (height, width)),
            *arguments.pixel_pair("crops_coords_top_left", crops_coords_top_left),
            *arguments.pixel_pair("target_size", target_size or (height, width)),
        )
        states = text.encoder_hidden_states
        added = text.added_cond(jnp.tile(jnp.array(time_ids, jnp.float32), (len(states), 1)))
        scales = scales, rescales if np.any(rescales) else None
        noise, keys, weights, scales = sharding.spread((noise, keys, weights, scales))
        denoise = drawing.denoise if callback is None else functools.partial(drawing.denoise_watched, callback)
        network = self.unet.graph, guided, self.unet.params
        latents = denoise(*network, plan, noise, keys, states, added, weights, *scales)
        drawing.check_finite("latents", np.isfinite(latents).all(axis=(1, 2, 3)), names)
        if output == "latents":
            return np.asarray(latents)
        images = np.asarray(self.decode(latents, names))
        return [Image.fromarray(image) for image in images] if output == "pil" else images

    def _or_default(self, name, value):
        return self.sampling[name] if value is None else value

    def _image_size(self, height, width, latents) -> Pixels:
        """Returns height and width in pixels; a 0 takes the side from the latents, or from the model's config."""
        shape, factor = np.shape(latents), self.vae_scale_factor
        cells = shape[1:3] if len(shape) == 4 else per_axis(self.unet.merged().config["sample_size"])
        height = arguments.pixels("height", height or cells[0] * factor, factor)
        return height, arguments.pixels("width", width or cells[1] * factor, factor)

    def _noise(self, keys, latents, height, width):
        """Returns the unit noise (B, h, w, C) that denoising starts from: `latents`, or drawn with one key per image.

        Raises:
          UserError: the latents have another shape, or are not finite.
        """
        factor = self.vae_scale_factor
        shape = (height // factor, width // factor, self.unet.merged().config["in_channels"])
        if latents is None:
            return drawing.unit_noise(keys, shape)
        latents = jnp.asarray(latents, jnp.float32)
        if latents.shape != (len(keys), *shape) or not jnp.isfinite(latents).all():
            raise UserError(f"latents must be finite unit noise of shape {(len(keys), *shape)}; got {latents.shape}.")
        return latents


def default_dtype() -> str:
    """Returns the compute dtype for this machine: bfloat16 on accelerators, float32 on CPUs."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def _keys(seeds, batch_size):
    """Returns one random key per image; seeds default to 0, 1, ..."""
    seeds = arguments.per_prompt("seeds", range(batch_size) if seeds is None else seeds, batch_size)
    seeds = [arguments.whole_number("a seed", seed, 0, arguments.MAX_SEED) for seed in seeds]
    return jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
