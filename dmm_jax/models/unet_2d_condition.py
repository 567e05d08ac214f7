"""The denoising UNet of Stable Diffusion 1, 2 and XL (arXiv:2112.10752, 2307.01952), with DMM's style table on request.

Attributes are diffusers' state-dict keys. `addition_embed_type` "model_merge" (SDXL: "model_merge_xl") adds
`model_embedding`, one row per style, and an MLP whose output is added to the time embedding (arXiv:2504.12364, A.1).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from dmm_jax.models import layers
from dmm_jax.models.attention import IMPLEMENTATIONS
from dmm_jax.models.embeddings import TimestepEmbedding, timestep_sinusoids
from dmm_jax.models.unet_2d_blocks import DownBlock, MidBlock, UpBlock
from dmm_jax.runtime.errors import UserError

DOWN_TYPES = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}  # Does the level attend?
UP_TYPES = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
TEXT_TIME_TYPES = ("text_time", "model_merge_xl")  # SDXL's: pooled text, image size and crop join the time embedding.
MERGED_TYPES = ("model_merge", "model_merge_xl")
ADDITION_TYPES = (None, "text_time", *MERGED_TYPES)
INERT = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type_num_heads": (64, None),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "downsample_padding": (1,),
    "dropout": (0.0,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "resnet_out_scale_factor": (1.0,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
    "upcast_attention": (False, True, None),  # Logits and softmax are float32 always.
}


def merged_config(config: Mapping, num_styles: int) -> dict:
    """Returns a stock UNet's config with a style table of `num_styles` rows."""
    kind = {None: "model_merge", "text_time": "model_merge_xl"}[config.get("addition_embed_type")]
    return dict(config) | {"addition_embed_type": kind, "num_models": num_styles}


def style_mlp_name(config: Mapping) -> str:
    """Returns the attribute of the style MLP: SDXL already uses `add_embedding` for its text and time ids."""
    return "add_embedding2" if config["addition_embed_type"] == "model_merge_xl" else "add_embedding"


class UNetOutput(NamedTuple):
    """What one forward pass gives."""

    sample: Float[Array, "B2 h w C"]  # float32
    features: tuple[Array, ...]  # Outputs of the down blocks, the mid block and the up blocks, in the compute dtype.
    # Where a latent has several prompts, what comes before the first look at one is a row a latent.


class Encoded(NamedTuple):
    """The UNet's way down, and what its way up needs."""

    hidden: Float[Array, "B2 h w C"]  # The middle block's output.
    skips: list[Array]  # Finest first.
    features: list[Array]  # Outputs of the down blocks and the middle block.
    temb: Float[Array, "B E"]
    states: Float[Array, "B2 L D"]


class UNet2DEncoder(nnx.Module):
    """The UNet as far as its middle block, with the embeddings of time, style and sizes."""

    def __init__(self, config: "layers.Config", *, dtype, rngs: nnx.Rngs):
        """Builds the way down.

        Args:
          config: every argument of `UNet2DConditionModel`.
          dtype: of the arithmetic.

        Raises:
          ValueError: a field that does not fit the others.
        """
        _check(config)
        self.config, self.dtype, self.num_models = config, jnp.dtype(dtype), config["num_models"]
        common = {"dtype": dtype, "rngs": rngs}
        widths, levels = config["block_out_channels"], len(config["block_out_channels"])
        time_embed_dim = 4 * widths[0]
        num_layers = _per_level(config["layers_per_block"], levels)
        resnet = _resnet(config)
        self.conv_in = layers.conv(config["in_channels"], widths[0], 3, **common)
        self.time_embedding = TimestepEmbedding(widths[0], time_embed_dim, **common)
        self._add_embeddings(time_embed_dim, **common)
        blocks, remat = [], recomputed_blocks(config["remat"], levels)
        for level, (kind, width) in enumerate(zip(config["down_block_types"], widths, strict=True)):
            last = level + 1 == levels
            there = _attention(config, level) if DOWN_TYPES[kind] else None
            before = widths[max(level - 1, 0)]
            again = {"remat": f"down_blocks.{level}" in remat}
            blocks.append(DownBlock(before, width, num_layers[level], resnet, there, not last, **again, **common))
        self.down_blocks = nnx.List(blocks)
        there, again = _attention(config, levels - 1), {"remat": "mid_block" in remat}
        self.mid_block = MidBlock(widths[-1], resnet, there, **again, **common)

    def _add_embeddings(self, width, *, dtype, rngs):
        kind = self.config["addition_embed_type"]
        if kind in TEXT_TIME_TYPES:
            inputs = self.config["projection_class_embeddings_input_dim"]
            self.add_embedding = TimestepEmbedding(inputs, width, dtype=dtype, rngs=rngs)
        if kind in MERGED_TYPES:
            table = {"embedding_init": nnx.initializers.normal(1.0), "dtype": jnp.float32, "param_dtype": jnp.float32}
            self.model_embedding = nnx.Embed(self.num_models, width, **table, rngs=rngs)
            setattr(self, style_mlp_name(self.config), TimestepEmbedding(width, width, dtype=dtype, rngs=rngs))

    def encode(
        self,
        latents: Float[Array, "B h w C"],
        timesteps: Num[Array, " B"],
        encoder_hidden_states: Float[Array, "B2 L D"],
        style_embedding: Float[Array, "B E"] | None = None,
        added_cond: Mapping[str, Array] | None = None,
    ) -> Encoded:
        """Runs the way down; arguments and errors as of `UNet2DConditionModel.__call__`."""
        _check_size(*latents.shape[1:3], multiple=2 ** (len(self.down_blocks) - 1))
        _check_number(len(latents), len(encoder_hidden_states))
        _check_conditioning(self.config, style_embedding, added_cond)
        temb = self._time_embedding(timesteps, style_embedding, added_cond)
        states = encoder_hidden_states.astype(self.dtype)
        skips, features = [self.conv_in(latents.astype(self.dtype))], []
        for block in self.down_blocks:
            skips += block(skips[-1], temb, states)
            features.append(skips[-1])
        hidden = self.mid_block(skips[-1], temb, states)
        return Encoded(hidden, skips, [*features, hidden], temb, states)

    def _time_embedding(self, timesteps, style_embedding, added_cond) -> Float[Array, "B E"]:
        config = self.config
        waves = {"flip_sin_to_cos": config["flip_sin_to_cos"], "freq_shift": config["freq_shift"]}
        sinusoids = timestep_sinusoids(timesteps, config["block_out_channels"][0], **waves)
        temb = self.time_embedding(sinusoids.astype(self.dtype))
        if added_cond is not None:
            ids, ids_width = added_cond["time_ids"], config["addition_time_embed_dim"]
            sizes = timestep_sinusoids(ids.reshape(-1), ids_width, **waves).reshape(len(ids), -1)  # (B, 6 D)
            both = jnp.concatenate([added_cond["text_embeds"].astype(jnp.float32), sizes], axis=-1)
            temb = temb + self.add_embedding(both.astype(self.dtype))
        if style_embedding is not None:
            temb = temb + getattr(self, style_mlp_name(config))(style_embedding.astype(self.dtype))
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
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds the UNet.

        Args:
          attention_head_dim: the NUMBER of heads, per level or for all (diffusers' name for it is an old accident).
          num_models: rows of the style table, where `addition_embed_type` is one of the "model_merge" kinds.
          attention_implementation: one of `IMPLEMENTATIONS`; see `dmm_jax.models.attention`.
          remat: what is computed again in the backward pass; see `recomputed_blocks`.
          dtype: of the arithmetic.

        Raises:
          ValueError: a field that does not fit the others.
        """
        config = layers.all_arguments(UNet2DConditionModel.__init__, locals())
        super().__init__(config, dtype=dtype, rngs=rngs)
        common = {"dtype": dtype, "rngs": rngs}
        widths, levels = list(block_out_channels), len(block_out_channels)
        num_layers = _per_level(layers_per_block, levels)
        skips = [widths[0]]
        for level, width in enumerate(widths):
            skips += [width] * (num_layers[level] + (level + 1 < levels))
        blocks, recomputed = [], recomputed_blocks(remat, levels)
        for level, kind in zip(reversed(range(levels)), up_block_types, strict=True):
            taken = [skips.pop() for _ in range(num_layers[level] + 1)]
            there = _attention(config, level) if UP_TYPES[kind] else None
            before = widths[min(level + 1, levels - 1)]
            again = {"remat": f"up_blocks.{len(blocks)}" in recomputed}
            blocks.append(UpBlock(before, taken, widths[level], _resnet(config), there, level > 0, **again, **common))
        self.up_blocks = nnx.List(blocks)
        self.conv_norm_out = layers.group_norm(norm_num_groups, widths[0], epsilon=norm_eps, rngs=rngs)
        self.conv_out = layers.conv(widths[0], out_channels, 3, **common)

    @classmethod
    def from_config(cls, config: Mapping, *, rngs: nnx.Rngs, **options) -> "UNet2DConditionModel":
        """Builds the UNet that a diffusers config.json describes; `options` as in the constructor win over its fields.

        Raises:
          ValueError: fields or values that this port does not compute; all are named.
        """
        return cls(**(layers.constructor_arguments(cls.__init__, config, INERT) | options), rngs=rngs)

    @classmethod
    def arguments(cls, config: Mapping, **options) -> "layers.Config":
        """Returns every argument of the constructor, defaults too, that `from_config` would call it with."""
        return layers.all_arguments(cls.__init__, layers.constructor_arguments(cls.__init__, config, INERT) | options)

    def style_embedding(self, weights: Float[Array, "B N"]) -> Float[Array, "B E"]:
        """Mixes rows of the style table: what `__call__` takes as `style_embedding` (arXiv:2504.12364, 4.5).

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
        encoder_hidden_states: Float[Array, "B2 L D"],
        style_embedding: Float[Array, "B E"] | None = None,
        added_cond: Mapping[str, Array] | None = None,
    ) -> UNetOutput:
        """Predicts the noise (or velocity) in `latents`.

        Args:
          encoder_hidden_states: of a prompt for each latent; or of k, adjacent, as their predictions will be: what
            comes before the first look at a prompt is then computed once for the k.
          timesteps: int or float32, 0 to 999.
          style_embedding: mixed rows of the style table, before the MLP; needed by a merged model, refused by others.
          added_cond: SDXL's {"text_embeds": (B, P), "time_ids": (B, 6)}.

        Raises:
          ValueError: latents that the levels cannot halve or prompts cannot be shared out among, or conditioning that
            is missing or has no place.
        """
        down = self.encode(latents, timesteps, encoder_hidden_states, style_embedding, added_cond)
        hidden, skips, features = down.hidden, list(down.skips), list(down.features)
        for block in self.up_blocks:
            taken = [skips.pop() for _ in block.resnets]
            hidden = block(hidden, taken, down.temb, down.states)
            features.append(hidden)
        hidden = layers.normed(self.conv_norm_out, hidden, jax.nn.silu)
        return UNetOutput(self.conv_out(hidden).astype(jnp.float32), tuple(features))


def recomputed_blocks(remat: str, levels: int) -> frozenset[str]:
    """Returns the blocks whose inner values are not kept for the backward pass, but computed again.

    Args:
      remat: "none", "finest" (the two blocks of the first level), "all", or blocks joined by commas:
        "down_blocks.0,mid_block".

    Raises:
      ValueError: blocks that a UNet of so many levels does not have.
    """
    blocks = [f"{way}_blocks.{level}" for way in ("down", "up") for level in range(levels)] + ["mid_block"]
    groups = {"none": [], "finest": ["down_blocks.0", f"up_blocks.{levels - 1}"], "all": blocks}
    chosen = frozenset(groups.get(remat, remat.split(",")))
    if unknown := sorted(chosen.difference(blocks)):
        raise UserError(
            f"remat must be {', '.join(groups)}, or some of {','.join(blocks)}; got {', '.join(map(repr, unknown))}."
        )
    return chosen


def _resnet(config: Mapping) -> dict[str, Any]:
    """Returns what all resnets of a UNet share."""
    return {
        "temb_channels": 4 * config["block_out_channels"][0],
        "num_groups": config["norm_num_groups"],
        "epsilon": config["norm_eps"],
    }


def _attention(config: Mapping, level: int) -> dict[str, Any]:
    """Returns the arguments of a level's transformers."""
    levels = len(config["block_out_channels"])
    return {
        "context_width": config["cross_attention_dim"],
        "num_heads": _per_level(config["attention_head_dim"], levels)[level],
        "num_layers": _per_level(config["transformer_layers_per_block"], levels)[level],
        "use_linear_projection": config["use_linear_projection"],
        "num_groups": config["norm_num_groups"],
        "implementation": config["attention_implementation"],
    }


def _per_level(value, levels: int) -> list:
    return [value] * levels if isinstance(value, int) else list(value)


def _check_size(height: int, width: int, multiple: int) -> None:
    if height % multiple or width % multiple:
        raise UserError(
            f"latents' height and width must be multiples of {multiple} cells, since every level halves them; "
            f"got {height} x {width}."
        )


def _check_number(latents: int, prompts: int) -> None:
    if prompts % latents:
        raise UserError(f"each latent needs as many prompts as the next; got {prompts} for {latents} latents.")


def _check_conditioning(config: Mapping, style_embedding, added_cond) -> None:
    kind, given = config["addition_embed_type"], None if added_cond is None else sorted(added_cond)
    needed = ["text_embeds", "time_ids"] if kind in TEXT_TIME_TYPES else None
    if needed and given != needed:
        raise UserError(f"a UNet of addition_embed_type={kind!r} needs added_cond with {needed}; got {given}.")
    if given is not None and not needed:
        raise UserError(f"a UNet of addition_embed_type={kind!r} takes no added_cond, only SDXL's does; got {given}.")
    if style_embedding is None and kind in MERGED_TYPES:
        raise UserError("a merged UNet needs a style_embedding: pass unet.style_embedding(weights), a row per image.")
    if style_embedding is not None and kind not in MERGED_TYPES:
        raise UserError(f"a UNet of addition_embed_type={kind!r} takes no style_embedding: it has no style table.")


def _check(config: Mapping) -> None:
    problems = [*_level_problems(config), *_addition_problems(config)] or _width_problems(config)
    if config["num_attention_heads"] is not None:
        problems.append("num_attention_heads must be null: diffusers keeps the number of heads in attention_head_dim")
    if config["attention_implementation"] not in IMPLEMENTATIONS:
        found = config["attention_implementation"]
        problems.append(f"attention_implementation must be one of {IMPLEMENTATIONS}; got {found!r}")
    if problems:
        raise UserError("this UNet cannot be built: " + "; ".join(problems) + ".")


def _level_problems(config) -> list[str]:
    levels, problems = len(config["block_out_channels"]), []
    for name, types in (("down_block_types", DOWN_TYPES), ("up_block_types", UP_TYPES)):
        if len(config[name]) != levels or any(kind not in types for kind in config[name]):
            problems.append(f"{name} must be {levels} of {', '.join(types)}; got {list(config[name])}")
    for name in ("layers_per_block", "transformer_layers_per_block", "attention_head_dim"):
        values = _per_level(config[name], levels)
        if len(values) != levels or not all(isinstance(value, int) for value in values):
            problems.append(f"{name} must be one number or {levels}; got {values}")
    return problems


def _width_problems(config) -> list[str]:
    widths, groups, problems = config["block_out_channels"], config["norm_num_groups"], []
    all_heads = _per_level(config["attention_head_dim"], len(widths))
    for level, (width, heads) in enumerate(zip(widths, all_heads, strict=True)):
        up = config["up_block_types"][len(widths) - 1 - level]
        attends = level == len(widths) - 1 or DOWN_TYPES[config["down_block_types"][level]] or UP_TYPES[up]
        if attends and width % heads:
            problems.append(f"attention_head_dim is the number of heads and must divide {width} channels; got {heads}")
        if width % groups:
            problems.append(f"norm_num_groups must divide {width} channels; got {groups}")
    return problems


def _addition_problems(config) -> list[str]:
    kind, problems = config["addition_embed_type"], []
    if kind not in ADDITION_TYPES:
        problems.append(f"addition_embed_type must be one of {ADDITION_TYPES}; got {kind!r}")
    if (kind in MERGED_TYPES) != bool(config["num_models"]):
        found = config["num_models"]
        problems.append(f"num_models must be positive for a merged UNet and absent otherwise; got {found}")
    for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
        if kind in TEXT_TIME_TYPES and not config[name]:
            problems.append(f"{name} must be given with addition_embed_type {kind!r}")
    return problems
