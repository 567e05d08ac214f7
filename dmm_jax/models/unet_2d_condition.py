"""The denoising UNet of Stable Diffusion 1, 2 and XL (arXiv:2112.10752, 2307.01952), with DMM's style table on request.

Attributes are diffusers' state-dict keys. `addition_embed_type` "model_merge" (SDXL: "model_merge_xl") adds
`model_embedding`, one row per style, and an MLP whose output is added to the time embedding (arXiv:2504.12364, A.1).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from dmm_jax.models import config_json, layers, lora, unet_config
from dmm_jax.models.embeddings import TimestepEmbedding, timestep_sinusoids
from dmm_jax.models.unet_2d_blocks import DownBlock, MidBlock, UpBlock
from dmm_jax.models.unet_config import DOWN_TYPES, MERGED_TYPES, TEXT_TIME_TYPES, UP_TYPES
from dmm_jax.runtime.errors import UserError


class UNetOutput(NamedTuple):
    """The results of a forward pass; with several prompts per latent, one row per prompt."""

    sample: Float[Array, "BP h w C"]  # float32
    # Outputs of the down blocks, the mid block and the up blocks, in the compute dtype. Blocks before the first
    # cross-attention have one row per latent.
    features: tuple[Array, ...]


class Encoded(NamedTuple):
    """The results of the UNet's way down, which its way up reads."""

    hidden: Float[Array, "BP h w C"]  # The middle block's output.
    skips: list[Array]  # Finest first.
    features: list[Array]  # Outputs of the down blocks and the middle block.
    temb: Float[Array, "B E"]
    states: Float[Array, "BP L D"]


class UNet2DEncoder(nnx.Module):
    """The UNet as far as its middle block, with the embeddings of time, style and sizes."""

    def __init__(self, config: config_json.Config, *, dtype, rngs: nnx.Rngs):
        """Builds the way down.

        Args:
          config: every argument of `UNet2DConditionModel`.
          dtype: the dtype of the arithmetic.

        Raises:
          ValueError: fields that contradict each other.
        """
        unet_config.check(config)
        self.config, self.dtype, self.num_models = config, jnp.dtype(dtype), config["num_models"]
        common = {"dtype": dtype, "rngs": rngs}
        widths, levels = config["block_out_channels"], len(config["block_out_channels"])
        num_layers = unet_config.per_level(config["layers_per_block"], levels)
        resnet = unet_config.resnet_arguments(config)
        recomputed = unet_config.recomputed_blocks(config["remat"], levels)

        self.conv_in = layers.Conv(config["in_channels"], widths[0], 3, **common)
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0], **common)
        self._build_other_embeddings(4 * widths[0], **common)
        blocks = []
        for level, (kind, width) in enumerate(zip(config["down_block_types"], widths, strict=True)):
            attention = unet_config.attention_arguments(config, level) if DOWN_TYPES[kind] else None
            sizes = widths[max(level - 1, 0)], width, num_layers[level]
            downsample, remat = level + 1 < levels, f"down_blocks.{level}" in recomputed
            blocks.append(DownBlock(*sizes, resnet, attention, downsample, remat=remat, **common))
        self.down_blocks = nnx.List(blocks)
        attention = unet_config.attention_arguments(config, levels - 1)
        self.mid_block = MidBlock(widths[-1], resnet, attention, remat="mid_block" in recomputed, **common)

    def _build_other_embeddings(self, width, *, dtype, rngs):
        """Builds SDXL's embedding of text and sizes, and DMM's style table with its MLP."""
        kind = self.config["addition_embed_type"]
        if kind in TEXT_TIME_TYPES:
            inputs = self.config["projection_class_embeddings_input_dim"]
            self.add_embedding = TimestepEmbedding(inputs, width, dtype=dtype, rngs=rngs)
        if kind in MERGED_TYPES:
            table = {"embedding_init": nnx.initializers.normal(1.0), "dtype": jnp.float32, "param_dtype": jnp.float32}
            self.model_embedding = nnx.Embed(self.num_models, width, **table, rngs=rngs)
            style_mlp = TimestepEmbedding(width, width, dtype=dtype, rngs=rngs)
            setattr(self, unet_config.style_mlp_name(self.config), style_mlp)

    def encode(
        self,
        latents: Float[Array, "B h w C"],
        timesteps: Num[Array, " B"],
        encoder_hidden_states: Float[Array, "BP L D"],
        style_embedding: Float[Array, "B E"] | None = None,
        added_cond: Mapping[str, Array] | None = None,
        num_states: Int[Array, " BP"] | None = None,
    ) -> Encoded:
        """Runs the way down; arguments and errors are those of `UNet2DConditionModel.__call__`."""
        _check_shapes(latents, encoder_hidden_states, multiple=2 ** (len(self.down_blocks) - 1))
        _check_conditioning(self.config, style_embedding, added_cond)
        temb = self._time_embedding(timesteps, style_embedding, added_cond)
        states = encoder_hidden_states.astype(self.dtype)
        skips, features = [self.conv_in(latents.astype(self.dtype))], []
        for block in self.down_blocks:
            skips += block(skips[-1], temb, states, num_states)
            features.append(skips[-1])
        hidden = self.mid_block(skips[-1], temb, states, num_states)
        return Encoded(hidden, skips, [*features, hidden], temb, states)

    def _time_embedding(self, timesteps, style_embedding, added_cond) -> Float[Array, "B E"]:
        """Returns the sum of the embeddings of timestep, text and sizes (SDXL), and style (DMM)."""
        config = self.config
        waves = {"flip_sin_to_cos": config["flip_sin_to_cos"], "freq_shift": config["freq_shift"]}
        sinusoids = timestep_sinusoids(timesteps, config["block_out_channels"][0], **waves)
        temb = self.time_embedding(sinusoids.astype(self.dtype))
        if added_cond is not None:
            ids, ids_width = added_cond["time_ids"], config["addition_time_embed_dim"]
            sizes = timestep_sinusoids(ids.reshape(-1), ids_width, **waves).reshape(len(ids), -1)  # (B, 6 D)
            joined = jnp.concatenate([added_cond["text_embeds"].astype(jnp.float32), sizes], axis=-1)
            temb = temb + self.add_embedding(joined.astype(self.dtype))
        if style_embedding is not None:
            temb = temb + getattr(self, unet_config.style_mlp_name(config))(style_embedding.astype(self.dtype))
        return temb


class UNet2DConditionModel(UNet2DEncoder):
    """The network; arguments are the fields of its config.json, with diffusers' defaults."""

    def __init__(
        self,
        sample_size: int | None = None,
        in_channels: int = 4,
        out_channels: int = 4,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        down_block_types: Sequence[str] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types: Sequence[str] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int | Sequence[int] = 2,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int = 1280,
        transformer_layers_per_block: int | Sequence[int | Sequence[int]] = 1,
        attention_head_dim: int | Sequence[int] = 8,
        num_attention_heads: int | Sequence[int] | None = None,
        use_linear_projection: bool = False,
        addition_embed_type: str | None = None,
        addition_time_embed_dim: int | None = None,
        projection_class_embeddings_input_dim: int | None = None,
        num_models: int | None = None,
        *,
        attention_implementation: str = "xla",
        remat: str = "none",
        loop_blocks: int = 0,
        lora_rank: int = 0,
        lora_conv_rank: int = 0,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds the UNet.

        Args:
          attention_head_dim: the NUMBER of heads, per level or for all (diffusers' name for it is an old accident).
          num_models: rows of the style table, for the "model_merge" kinds of `addition_embed_type`.
          attention_implementation: "xla", "cudnn" or "flash"; see `dmm_jax.kernels.attention`.
          remat: the blocks that the backward pass computes again; see `unet_config.recomputed_blocks`.
          loop_blocks: the smallest group of equal transformer blocks that runs as a loop over parameters that
            `block_loops.stack_blocks` made; 0: none does.
          lora_rank, lora_conv_rank: of the factors next to the layers, as in `lora.add_factors`.
          dtype: the dtype of the arithmetic.

        Raises:
          ValueError: fields that contradict each other.
        """
        config = config_json.all_arguments(UNet2DConditionModel.__init__, locals())
        super().__init__(config, dtype=dtype, rngs=rngs)
        common = {"dtype": dtype, "rngs": rngs}
        widths, levels = list(block_out_channels), len(block_out_channels)
        num_layers = unet_config.per_level(layers_per_block, levels)
        resnet, recomputed = unet_config.resnet_arguments(config), unet_config.recomputed_blocks(remat, levels)

        skip_widths = [widths[0]]
        for level, width in enumerate(widths):
            skip_widths += [width] * (num_layers[level] + (level + 1 < levels))
        blocks = []
        for level, kind in zip(reversed(range(levels)), up_block_types, strict=True):
            attention = unet_config.attention_arguments(config, level) if UP_TYPES[kind] else None
            taken = [skip_widths.pop() for _ in range(num_layers[level] + 1)]
            sizes = widths[min(level + 1, levels - 1)], taken, widths[level]
            upsample, recompute = level > 0, f"up_blocks.{len(blocks)}" in recomputed
            blocks.append(UpBlock(*sizes, resnet, attention, upsample, remat=recompute, **common))
        self.up_blocks = nnx.List(blocks)
        self.conv_norm_out = layers.GroupNorm(norm_num_groups, widths[0], epsilon=norm_eps, rngs=rngs)
        self.conv_out = layers.Conv(widths[0], out_channels, 3, **common)
        lora.add_factors(self, lora_rank, lora_conv_rank, rngs)

    @classmethod
    def from_config(cls, config: Mapping, *, rngs: nnx.Rngs, **options) -> "UNet2DConditionModel":
        """Builds the UNet that a diffusers config.json describes; `options` of the constructor win over its fields.

        Raises:
          ValueError: fields or values that this port does not compute; all are named.
        """
        fields = config_json.constructor_arguments(cls.__init__, config, unet_config.INERT)
        return cls(**(fields | options), rngs=rngs)

    @classmethod
    def arguments(cls, config: Mapping, **options) -> config_json.Config:
        """Returns every argument of the constructor, defaults too, that `from_config` would call it with."""
        fields = config_json.constructor_arguments(cls.__init__, config, unet_config.INERT)
        return config_json.all_arguments(cls.__init__, fields | options)

    def style_embedding(self, weights: Float[Array, "B N"]) -> Float[Array, "B E"]:
        """Mixes rows of the style table: the `style_embedding` that `__call__` takes (arXiv:2504.12364, 4.5).

        Raises:
          ValueError: a UNet without a style table, or another number of weights than it has rows.
        """
        if self.num_models is None:
            raise UserError("this UNet has no style table (num_models is absent); only a merged UNet has styles.")
        if weights.shape[1] != self.num_models:
            raise UserError(f"one weight per style is needed: {self.num_models}; got {weights.shape[1]}.")
        # Full float32: fast matmul modes would round the rows, and a baked style would not be the mixed one.
        return jnp.matmul(weights, self.model_embedding.embedding[...], precision=jax.lax.Precision.HIGHEST)

    def __call__(
        self,
        latents: Float[Array, "B h w C"],
        timesteps: Num[Array, " B"],
        encoder_hidden_states: Float[Array, "BP L D"],
        style_embedding: Float[Array, "B E"] | None = None,
        added_cond: Mapping[str, Array] | None = None,
        num_states: Int[Array, " BP"] | None = None,
    ) -> UNetOutput:
        """Predicts the noise (or velocity) in `latents`.

        Args:
          timesteps: int or float32, 0 to 999.
          encoder_hidden_states: one prompt per latent; or P prompts per latent, adjacent, which give P adjacent
            predictions and share the features before the first cross-attention.
          style_embedding: mixed rows of the style table, before the MLP; needed by a merged model, refused by others.
          added_cond: SDXL's {"text_embeds": (B, P), "time_ids": (B, 6)}.
          num_states: the number of states of each prompt, if padding follows them: attention does not see padding, so
            that prompts of several lengths share a batch.

        Raises:
          ValueError: latents that the levels cannot halve, a number of prompts that is not a multiple of the latents',
            or conditioning that is missing or that the model does not take.
        """
        down = self.encode(latents, timesteps, encoder_hidden_states, style_embedding, added_cond, num_states)
        hidden, skips, features = down.hidden, list(down.skips), list(down.features)
        for block in self.up_blocks:
            taken = [skips.pop() for _ in block.resnets]
            hidden = block(hidden, taken, down.temb, down.states, num_states)
            features.append(hidden)
        hidden = self.conv_norm_out(hidden, activation=jax.nn.silu)
        return UNetOutput(self.conv_out(hidden).astype(jnp.float32), tuple(features))


def _check_shapes(latents: Array, encoder_hidden_states: Array, multiple: int) -> None:
    (batch_size, height, width), num_prompts = latents.shape[:3], len(encoder_hidden_states)
    if height % multiple or width % multiple:
        raise UserError(
            f"latents' height and width must be multiples of {multiple} cells, since every level halves them; "
            f"got {height} x {width}."
        )
    if num_prompts % batch_size:
        raise UserError(f"each latent needs equally many prompts; got {num_prompts} for {batch_size} latents.")


def _check_conditioning(config: Mapping, style_embedding, added_cond) -> None:
    kind, names = config["addition_embed_type"], None if added_cond is None else sorted(added_cond)
    needed = ["text_embeds", "time_ids"] if kind in TEXT_TIME_TYPES else None
    if needed and names != needed:
        raise UserError(f"a UNet of addition_embed_type={kind!r} needs added_cond with {needed}; got {names}.")
    if names is not None and not needed:
        raise UserError(f"a UNet of addition_embed_type={kind!r} takes no added_cond, only SDXL's does; got {names}.")
    if style_embedding is None and kind in MERGED_TYPES:
        raise UserError("a merged UNet needs a style_embedding: pass unet.style_embedding(weights), a row per image.")
    if style_embedding is not None and kind not in MERGED_TYPES:
        raise UserError(f"a UNet of addition_embed_type={kind!r} takes no style_embedding: it has no style table.")
