"""The layout of single-file checkpoints (LDM, SGM): where each of our keys lies in one, and what its shapes say.

Written from the diffusers side: a rule from a network's structure, no table of tensors. The configuration is read off
the keys and shapes alone, so that a tiny checkpoint is recognised by the rule that recognises a full-size one.
"""

import re
from collections.abc import Iterable, Mapping

from dmm_jax.checkpoints.architecture import check_plain
from dmm_jax.checkpoints.errors import CheckpointError

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP_L, OPEN_CLIP_H = "cond_stage_model.transformer.", "cond_stage_model.model."  # Of Stable Diffusion 1 and 2.
XL_CLIP_L, XL_OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
SOLE_OPEN_CLIP = "conditioner.embedders.0.model."  # The one text encoder of SD 2.1 Turbo, and of XL's refiner.
PREFIXES = {
    "unet": (UNET,),
    "vae": (VAE, "vae."),
    "text_encoder": (CLIP_L, OPEN_CLIP_H, XL_CLIP_L, SOLE_OPEN_CLIP),
    "text_encoder_2": (XL_OPEN_CLIP,),
}
OPEN_CLIP = (
    OPEN_CLIP_H,
    SOLE_OPEN_CLIP,
    XL_OPEN_CLIP,
)  # Text encoders in OpenCLIP's own layout; the others lie in transformers'.
EMA = "model_ema."  # Averages kept for training; like everybody else we read the weights themselves.
# Of a text encoder; what else lies there (logit_scale, position_ids) conditions nothing.
CLIP_PARTS = ("embeddings", "encoder", "final_layer_norm")
OPEN_CLIP_PARTS = ("transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection")
# Below these lies what conditions a UNet, or is one; of it nothing is dropped but what is known to condition nothing.
CONDITIONING = ("cond_stage_model.", "conditioner.", "text_encoders.", "diffusion_model.")
INERT_PARTS = {
    "logit_scale", "logit_bias", "position_ids", "attn_mask", "text_projection", "visual_projection", "visual",
    "vision_model",
}  # fmt: skip
VAE_TRAINING = ("loss.", "model_ema.")  # Below the VAE: what trained it, and its averages.
# Empty or small tensors by which files say that their noise levels are EDM's (arXiv:2206.00364).
EDM = ("edm_vpred.sigma_max", "edm_vpred.sigma_min", "edm_mean", "edm_std")
CLASS_EMBEDDING = "label_emb.0.0.weight"  # Of XL's second conditioning; unCLIP's of images has the same name.
HEAD_SIZE = 64  # Of every CLIP, and of every UNet that projects by dense layers (SD2, SDXL).
SD1_HEADS = 8  # Of every UNet that projects by 1x1 convolutions.
NORM_GROUPS = 32

_UNET_TOP = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
# Converters left diffusers' names there, today's or those of old.
_VAE_ATTENTION_TODAY = _VAE_ATTENTION | {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}


def unet_key(key: str, config: Mapping) -> str:
    """Returns where a UNet's tensor lies in a single file, without the prefix. DMM's own keys keep their names."""
    module, leaf = key.rsplit(".", 1)
    merged = config.get("addition_embed_type") == "model_merge"
    if module in _UNET_TOP and not (merged and module.startswith("add_embedding")):
        return f"{_UNET_TOP[module]}.{leaf}"
    parts = module.split(".")
    if parts[0] == "mid_block":
        place = f"middle_block.{2 * int(parts[2]) if parts[1] == 'resnets' else 1}"
        return ".".join([place, *_inner(parts[1], parts[3:]), leaf])
    if parts[0] not in ("down_blocks", "up_blocks"):
        return key
    down, block, kind, layer = parts[0] == "down_blocks", int(parts[1]), parts[2], int(parts[3])
    period = _period(config)
    if kind == "downsamplers":
        return f"input_blocks.{period * (block + 1)}.0.op.{leaf}"
    if kind == "upsamplers":
        slot = 2 if "CrossAttn" in config["up_block_types"][block] else 1
        return f"output_blocks.{period * block + period - 1}.{slot}.conv.{leaf}"
    place = f"input_blocks.{1 + period * block + layer}" if down else f"output_blocks.{period * block + layer}"
    return ".".join([place, "0" if kind == "resnets" else "1", *_inner(kind, parts[4:]), leaf])


def _period(config):
    """Returns how many input blocks a level takes: its layers, and its downsampler."""
    layers = config["layers_per_block"]
    if isinstance(layers, int):
        return layers + 1
    if len(set(layers)) > 1:
        raise CheckpointError(f"single files have as many layers on every level; this UNet has {list(layers)}.")
    return layers[0] + 1


def _inner(kind, parts):
    return [_RESNET[parts[0]]] if kind == "resnets" else parts


def vae_key(key: str, config: Mapping) -> str:
    """Returns where a VAE's tensor lies in a single file, prefix not included."""
    module, leaf = key.rsplit(".", 1)
    parts = module.split(".")
    if parts[0] in ("quant_conv", "post_quant_conv"):
        return key
    side, name = parts[0], parts[1]
    if name == "mid_block" and parts[2] == "attentions":
        rest = f"mid.attn_1.{_VAE_ATTENTION['.'.join(parts[4:])]}"
    elif name == "mid_block":
        rest = f"mid.block_{int(parts[3]) + 1}.{_shortcut(parts[4])}"
    elif name in ("down_blocks", "up_blocks"):
        # The decoder's levels are numbered from the finest in single files.
        level = int(parts[2]) if name == "down_blocks" else len(config["block_out_channels"]) - 1 - int(parts[2])
        where = f"{name.removesuffix('_blocks')}.{level}"
        if parts[3] == "resnets":
            rest = f"{where}.block.{parts[4]}.{_shortcut(parts[5])}"
        else:
            rest = f"{where}.{_RESAMPLE[parts[3]]}.conv"
    else:
        rest = {"conv_norm_out": "norm_out"}.get(name, name)
    return f"{side}.{rest}.{leaf}"


_RESAMPLE = {"downsamplers": "downsample", "upsamplers": "upsample"}


def _shortcut(name):
    return "nin_shortcut" if name == "conv_shortcut" else name


KEYS = {"unet": unet_key, "vae": vae_key}


def today(component: str, key: str) -> str:
    """Returns a key below a component's prefix as LDM writes it: its attention in a VAE is also found otherwise."""
    side, found, rest = key.partition(".mid.attn_1.")
    module, _, leaf = rest.rpartition(".")
    if component != "vae" or not found or module not in _VAE_ATTENTION_TODAY:
        return key
    return f"{side}{found}{_VAE_ATTENTION_TODAY[module]}.{leaf}"


def unplaced(keys: Iterable[str]) -> list[str]:
    """Returns those keys, of the ones that no network takes, which may not be dropped in silence."""
    return [key for key in keys if key.startswith(CONDITIONING) and not INERT_PARTS & set(key.split("."))]


def prefix_of(component: str, keys: Iterable[str]) -> str | None:
    """Returns the prefix under which a component lies in a file, or None."""
    keys = list(keys)
    return next((prefix for prefix in PREFIXES[component] if any(key.startswith(prefix) for key in keys)), None)


def unet_config(shapes: Mapping[str, tuple[int, ...]], where: str) -> dict:
    """Reads a UNet's config off its keys and shapes (prefix removed).

    Raises:
      CheckpointError: an inpainting model, or no UNet that we know.
    """
    try:
        return _unet_config(shapes, where)
    except CheckpointError:
        raise
    except (KeyError, IndexError, ValueError) as error:
        raise _unknown("UNet", error, where) from None


def _unknown(network, error, where):
    lacks = f"it has no {error}" if isinstance(error, KeyError) else "the shapes of its tensors fit no other"
    return CheckpointError(
        f"{where}: the {network} is of no known architecture ({lacks}). Known are Stable Diffusion 1, 2 and XL."
    )


def _unet_config(shapes, where):
    in_channels = shapes["input_blocks.0.0.weight"][1]
    check_plain(in_channels, where)
    num_blocks = 1 + max(_numbers(shapes, r"input_blocks\.(\d+)\."))
    downsamplers = sorted(_numbers(shapes, r"input_blocks\.(\d+)\.0\.op\."))
    period = downsamplers[0] if downsamplers else num_blocks
    levels = range(len(downsamplers) + 1)
    ins = [f"input_blocks.{1 + period * level}" for level in levels]
    outs = [f"output_blocks.{period * level}" for level in levels]
    widths = [shapes[f"{place}.0.in_layers.2.weight"][0] for place in ins]
    attends = {place: f"{place}.1.norm.weight" in shapes for place in (*ins, *outs)}
    depths = [len(_numbers(shapes, re.escape(place) + r"\.1\.transformer_blocks\.(\d+)\.")) for place in ins]
    depths = [depth or 1 for depth in depths[:-1]]
    depths.append(len(_numbers(shapes, r"middle_block\.1\.transformer_blocks\.(\d+)\.")))
    linear = len(shapes["middle_block.1.proj_in.weight"]) == 2
    config = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": in_channels,
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": period - 1,
        "down_block_types": [("CrossAttn" if attends[place] else "") + "DownBlock2D" for place in ins],
        "up_block_types": [("CrossAttn" if attends[place] else "") + "UpBlock2D" for place in outs],
        "cross_attention_dim": shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
        "transformer_layers_per_block": depths if set(depths) != {1} else 1,
        "attention_head_dim": [max(width // HEAD_SIZE, 1) for width in widths] if linear else SD1_HEADS,
        "use_linear_projection": linear,
        "norm_num_groups": NORM_GROUPS,
        "sample_size": 64,
    }
    if CLASS_EMBEDDING in shapes and attends[ins[0]]:  # XL has no attention at its first level.
        raise CheckpointError(
            f"{where} is an unCLIP model, a Stable Diffusion 2 that is also conditioned on images: it cannot be merged "
            "with others. Use the plain model."
        )
    if CLASS_EMBEDDING in shapes:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": shapes[CLASS_EMBEDDING][1],
            "sample_size": 128,
        }
    elif linear:
        config["sample_size"] = 96
    return config


def vae_config(shapes: Mapping[str, tuple[int, ...]], where: str) -> dict:
    """Reads a VAE's config off its keys and shapes (prefix removed); raises CheckpointError where it cannot."""
    try:
        levels = range(1 + max(_numbers(shapes, r"encoder\.down\.(\d+)\.")))
        return {
            "_class_name": "AutoencoderKL",
            "in_channels": shapes["encoder.conv_in.weight"][1],
            "out_channels": shapes["decoder.conv_out.weight"][0],
            "latent_channels": shapes["post_quant_conv.weight"][0],
            "block_out_channels": [shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in levels],
            "down_block_types": ["DownEncoderBlock2D"] * len(levels),
            "up_block_types": ["UpDecoderBlock2D"] * len(levels),
            "layers_per_block": len(_numbers(shapes, r"encoder\.down\.0\.block\.(\d+)\.")),
            "norm_num_groups": NORM_GROUPS,
            "act_fn": "silu",
            "scaling_factor": 0.18215,
        }
    except (KeyError, IndexError, ValueError) as error:
        raise _unknown("VAE", error, where) from None


def text_config(shapes: Mapping[str, tuple[int, ...]], where: str, *, open_clip: bool = False) -> dict:
    """Reads a text encoder's config off its keys and shapes; raises CheckpointError where it cannot.

    Args:
      shapes: by the keys of its layout, prefix not included.
      open_clip: the layout is OpenCLIP's, whose encoders have another activation, and perhaps a projection.
    """
    shapes = {key.removeprefix("text_model."): shape for key, shape in shapes.items()}
    # XL's second encoder: a bare matrix, or, in some files, a dense layer's weight, its outputs first.
    linear = shapes.get("text_projection.weight")
    projection = shapes.get("text_projection", linear and linear[::-1]) if open_clip else None
    layers = r"transformer\.resblocks\.(\d+)\." if open_clip else r"encoder\.layers\.(\d+)\."
    tokens, positions, hidden = (
        ("token_embedding.weight", "positional_embedding", "transformer.resblocks.0.mlp.c_fc.weight")
        if open_clip
        else ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight",
              "encoder.layers.0.mlp.fc1.weight")
    )  # fmt: skip
    try:
        vocab_size, width = shapes[tokens]
        return {
            "architectures": ["CLIPTextModelWithProjection" if projection else "CLIPTextModel"],
            "model_type": "clip_text_model",
            "vocab_size": vocab_size,
            "hidden_size": width,
            "projection_dim": projection[1] if projection else width,
            "intermediate_size": shapes[hidden][0],
            "num_hidden_layers": 1 + max(_numbers(shapes, layers)),
            "num_attention_heads": width // HEAD_SIZE,
            "max_position_embeddings": shapes[positions][0],
            "hidden_act": "gelu" if open_clip else "quick_gelu",
            "layer_norm_eps": 1e-5,
            "bos_token_id": vocab_size - 2,
            "eos_token_id": vocab_size - 1,
            "pad_token_id": 0 if open_clip else vocab_size - 1,
        }
    except (KeyError, IndexError, ValueError) as error:
        raise _unknown("text encoder", error, where) from None


def config(component: str, shapes: Mapping[str, tuple[int, ...]], prefix: str, where: str) -> dict:
    """Reads a component's config off its keys and shapes (prefix removed); raises CheckpointError where it cannot."""
    if component in KEYS:
        return {"unet": unet_config, "vae": vae_config}[component](shapes, where)
    return text_config(shapes, where, open_clip=prefix in OPEN_CLIP)


def _numbers(keys, pattern):
    found = (re.match(pattern, key) for key in keys)
    return {int(match.group(1)) for match in found if match}
