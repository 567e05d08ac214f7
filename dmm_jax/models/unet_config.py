"""The fields of a UNet's config.json: what they mean for its blocks, and which values are refused."""

from collections.abc import Mapping, Sequence
from typing import Any

from dmm_jax.kernels.attention import IMPLEMENTATIONS
from dmm_jax.models.block_loops import is_looped
from dmm_jax.runtime.errors import UserError

DOWN_TYPES = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}  # Whether the level attends.
UP_TYPES = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
TEXT_TIME_TYPES = ("text_time", "model_merge_xl")  # SDXL's: pooled text, image size and crop join the time embedding.
MERGED_TYPES = ("model_merge", "model_merge_xl")
MAX_CELLS = 4096  # Latent cells along a side that a config can claim as its training size.
ADDITION_TYPES = (None, "text_time", *MERGED_TYPES)
# Fields that the constructor does not take, with the values under which they change nothing.
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
    "upcast_attention": (False, True, None),  # Logits and softmax are always float32.
}


def merged_config(config: Mapping, num_styles: int) -> dict:
    """Returns a stock UNet's config with a style table of `num_styles` rows."""
    kind = {None: "model_merge", "text_time": "model_merge_xl"}[config.get("addition_embed_type")]
    return dict(config) | {"addition_embed_type": kind, "num_models": num_styles}


def style_mlp_name(config: Mapping) -> str:
    """Returns the attribute of the style MLP: SDXL already uses `add_embedding` for its text and time ids."""
    return "add_embedding2" if config["addition_embed_type"] == "model_merge_xl" else "add_embedding"


def recomputed_blocks(remat: str, levels: int) -> frozenset[str]:
    """Returns the blocks whose inner values the backward pass computes again instead of keeping them.

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


def resnet_arguments(config: Mapping) -> dict[str, Any]:
    """Returns the arguments that all resnets of a UNet share."""
    return {
        "temb_channels": 4 * config["block_out_channels"][0],
        "num_groups": config["norm_num_groups"],
        "epsilon": config["norm_eps"],
    }


def attention_arguments(config: Mapping, level: int) -> dict[str, Any]:
    """Returns the arguments of a level's transformers."""
    levels = len(config["block_out_channels"])
    num_layers = per_level(config["transformer_layers_per_block"], levels)[level]
    return {
        "context_width": config["cross_attention_dim"],
        "num_heads": per_level(config["attention_head_dim"], levels)[level],
        "num_layers": num_layers,
        "looped": is_looped(num_layers, config["loop_blocks"]),
        "use_linear_projection": config["use_linear_projection"],
        "num_groups": config["norm_num_groups"],
        "implementation": config["attention_implementation"],
    }


def per_level(value, levels: int) -> list:
    """Returns one value per level from a field that is a number for all levels or a list."""
    return [value] * levels if isinstance(value, int) else list(value)


def per_axis(sample_size: int | Sequence[int]) -> tuple:
    """Returns a UNet's `sample_size` as height and width in latent cells."""
    pair = tuple(sample_size) if isinstance(sample_size, (list, tuple)) else (sample_size,) * 2
    return pair if len(pair) == 2 else (None, None)


def check(config: Mapping) -> None:
    """Checks the fields against each other.

    Raises:
      ValueError: names every field that does not fit.
    """
    problems = [*_level_problems(config), *_addition_problems(config)] or _width_problems(config)
    size, width = config["sample_size"], config["cross_attention_dim"]
    if size is not None and not all(type(side) is int and 0 < side <= MAX_CELLS for side in per_axis(size)):
        problems.append(f"sample_size must be null, a number of latent cells up to {MAX_CELLS}, or two; got {size!r}")
    if type(width) is not int:
        problems.append(f"cross_attention_dim must be one number; got {width!r}")
    if config["num_attention_heads"] is not None:
        problems.append("num_attention_heads must be null: diffusers keeps the number of heads in attention_head_dim")
    implementation = config["attention_implementation"]
    if implementation not in IMPLEMENTATIONS:
        problems.append(f"attention_implementation must be one of {IMPLEMENTATIONS}; got {implementation!r}")
    if problems:
        raise UserError("this UNet cannot be built: " + "; ".join(problems) + ".")


def _level_problems(config) -> list[str]:
    levels, problems = len(config["block_out_channels"]), []
    for name, types in (("down_block_types", DOWN_TYPES), ("up_block_types", UP_TYPES)):
        if len(config[name]) != levels or any(kind not in types for kind in config[name]):
            problems.append(f"{name} must be {levels} of {', '.join(types)}; got {list(config[name])}")
    for name in ("layers_per_block", "transformer_layers_per_block", "attention_head_dim"):
        values = per_level(config[name], levels)
        if len(values) != levels or not all(isinstance(value, int) for value in values):
            problems.append(f"{name} must be one number or {levels}; got {values}")
    return problems


def _width_problems(config) -> list[str]:
    widths, groups, problems = config["block_out_channels"], config["norm_num_groups"], []
    all_heads = per_level(config["attention_head_dim"], len(widths))
    for level, (width, heads) in enumerate(zip(widths, all_heads, strict=True)):
        up = config["up_block_types"][len(widths) - 1 - level]
        attends = level == len(widths) - 1 or DOWN_TYPES[config["down_block_types"][level]] or UP_TYPES[up]
        if attends and width % heads:
            problems.append(f"attention_head_dim is the number of heads and must divide {width} channels; got {heads}")
        if width % groups:
            problems.append(f"norm_num_groups must divide {width} channels; got {groups}")
    return problems


def _addition_problems(config) -> list[str]:
    kind, num_models, problems = config["addition_embed_type"], config["num_models"], []
    if kind not in ADDITION_TYPES:
        problems.append(f"addition_embed_type must be one of {ADDITION_TYPES}; got {kind!r}")
    if (kind in MERGED_TYPES) != bool(num_models):
        problems.append(f"num_models must be positive for a merged UNet and absent otherwise; got {num_models}")
    for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
        if kind in TEXT_TIME_TYPES and not config[name]:
            problems.append(f"{name} must be given with addition_embed_type {kind!r}")
    return problems
