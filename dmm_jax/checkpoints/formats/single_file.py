"""Single-file checkpoints (LDM for Stable Diffusion 1 and 2, SGM for XL): the file's key for each key of diffusers.

The keys follow from a network's structure, without a table of tensors.
"""

from collections.abc import Iterable, Mapping

from dmm_jax.checkpoints.errors import CheckpointError

# The prefixes of the networks.
UNET, VAE = "model.diffusion_model.", "first_stage_model."
BARE = ""  # A file that holds nothing but a UNet.
CLIP_L, OPEN_CLIP_H = "cond_stage_model.transformer.", "cond_stage_model.model."  # Stable Diffusion 1, and 2.
XL_CLIP_L, XL_OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
SOLE_OPEN_CLIP = "conditioner.embedders.0.model."  # The one text encoder of SD 2.1 Turbo, and of XL's refiner.
PREFIXES = {
    "unet": (UNET, "diffusion_model.", BARE),
    "vae": (VAE, "vae."),
    "text_encoder": (CLIP_L, OPEN_CLIP_H, XL_CLIP_L, SOLE_OPEN_CLIP),
    "text_encoder_2": (XL_OPEN_CLIP,),
}
# Text encoders below these prefixes have OpenCLIP's layout (`open_clip`), all others that of transformers.
OPEN_CLIP = (OPEN_CLIP_H, SOLE_OPEN_CLIP, XL_OPEN_CLIP)
EMA = "model_ema."  # Averages from training; like other tools we read the weights themselves.
# The parts of a text encoder that condition the UNet; logit_scale and position_ids, for example, do not.
CLIP_PARTS = ("embeddings", "encoder", "final_layer_norm")
OPEN_CLIP_PARTS = ("transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection")
# Tensors below these prefixes belong to a UNet or condition one. Only those in INERT_PARTS may be dropped.
CONDITIONING = ("cond_stage_model.", "conditioner.", "text_encoders.", "diffusion_model.")
INERT_PARTS = {
    "logit_scale", "logit_bias", "position_ids", "attn_mask", "text_projection", "visual_projection", "visual",
    "vision_model",
}  # fmt: skip
VAE_TRAINING = ("loss.", "model_ema.")  # Below the VAE's prefix: its discriminator, and averages from training.
# Small or empty tensors which mark a model whose noise levels are EDM's (arXiv:2206.00364).
EDM = ("edm_vpred.sigma_max", "edm_vpred.sigma_min", "edm_mean", "edm_std")
FIRST_CONVOLUTION = "input_blocks.0.0.weight"  # In every UNet of this layout.
CONTROL_NET = "input_hint_block.0.weight"
VAE_ALONE, _EMBEDDING = "a VAE alone, for `sample --vae`", "a textual inversion, for `sample --embedding`"
# {the start of a key: the kind of network that has such keys}
OTHER_NETWORKS = {
    "control_model.": "a ControlNet", "controlnet_": "a ControlNet", CONTROL_NET: "a ControlNet",
    "down_blocks.": "the UNet of a diffusers folder: give the folder of the whole model",
    "encoder.mid": VAE_ALONE, "encoder.down": VAE_ALONE, "decoder.": VAE_ALONE,
    "text_model.": "a text encoder alone", "emb_params": _EMBEDDING, "clip_l": _EMBEDDING,
    "clip_g": _EMBEDDING, "double_blocks.": "a Flux", "model.diffusion_model.double_blocks.": "a Flux",
    "joint_blocks.": "a Stable Diffusion 3", "model.diffusion_model.joint_blocks.": "a Stable Diffusion 3",
    "transformer_blocks.": "a transformer and not a UNet", "ip_adapter.": "an IP-Adapter",
    "image_proj.": "an IP-Adapter",
}  # fmt: skip
CLASS_EMBEDDING = "label_emb.0.0.weight"  # XL's pooled text and sizes enter here; in unCLIP, the image.

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
# Some converters kept diffusers' names of the VAE's attention, today's or older ones.
_DIFFUSERS_VAE_ATTENTION = _VAE_ATTENTION | {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}


def unet_key(key: str, config: Mapping) -> str:
    """Returns the file's key, without the prefix, for a UNet's key. DMM's own keys keep their names."""
    module, leaf = key.rsplit(".", 1)
    merged = config.get("addition_embed_type") == "model_merge"
    if module in _UNET_TOP and not (merged and module.startswith("add_embedding")):
        return f"{_UNET_TOP[module]}.{leaf}"
    parts = module.split(".")
    if parts[0] == "mid_block":
        kind, layer, inner = parts[1], int(parts[2]), parts[3:]
        place = f"middle_block.{2 * layer if kind == 'resnets' else 1}"
    elif parts[0] in ("down_blocks", "up_blocks"):
        block, kind, layer, inner = int(parts[1]), parts[2], int(parts[3]), parts[4:]
        period = _period(config)
        if kind == "downsamplers":
            return f"input_blocks.{period * (block + 1)}.0.op.{leaf}"
        if kind == "upsamplers":
            slot = 2 if "CrossAttn" in config["up_block_types"][block] else 1
            return f"output_blocks.{period * block + period - 1}.{slot}.conv.{leaf}"
        number = period * block + layer
        place = f"input_blocks.{1 + number}" if parts[0] == "down_blocks" else f"output_blocks.{number}"
        place += ".0" if kind == "resnets" else ".1"
    else:
        return key
    inner = [_RESNET[inner[0]]] if kind == "resnets" else inner
    return ".".join([place, *inner, leaf])


def _period(config: Mapping) -> int:
    """Returns the number of input blocks per level: its layers and its downsampler."""
    layers = config["layers_per_block"]
    if isinstance(layers, int):
        return layers + 1
    if len(set(layers)) > 1:
        raise CheckpointError(f"single files have as many layers on every level; this UNet has {list(layers)}.")
    return layers[0] + 1


def vae_key(key: str, config: Mapping) -> str:
    """Returns the file's key, without the prefix, for a VAE's key."""
    module, leaf = key.rsplit(".", 1)
    parts = module.split(".")
    if parts[0] in ("quant_conv", "post_quant_conv"):
        return key
    side, name = parts[0], parts[1]
    if name == "mid_block" and parts[2] == "attentions":
        rest = f"mid.attn_1.{_VAE_ATTENTION['.'.join(parts[4:])]}"
    elif name == "mid_block":
        rest = f"mid.block_{int(parts[3]) + 1}.{parts[4]}"
    elif name in ("down_blocks", "up_blocks"):
        # Single files number the decoder's levels from the finest.
        level = int(parts[2]) if name == "down_blocks" else len(config["block_out_channels"]) - 1 - int(parts[2])
        rest = f"{name.removesuffix('_blocks')}.{level}."
        rest += f"block.{parts[4]}.{parts[5]}" if parts[3] == "resnets" else f"{parts[3].removesuffix('rs')}.conv"
    else:
        rest = "norm_out" if name == "conv_norm_out" else name
    return f"{side}.{rest.replace('conv_shortcut', 'nin_shortcut')}.{leaf}"


KEYS = {"unet": unet_key, "vae": vae_key}


def ldm_key(component: str, key: str) -> str:
    """Returns LDM's spelling of a file's key (without the prefix); only the attention of a VAE has other spellings."""
    side, attention, rest = key.partition(".mid.attn_1.")
    module, _, leaf = rest.rpartition(".")
    if component != "vae" or not attention or module not in _DIFFUSERS_VAE_ATTENTION:
        return key
    return f"{side}{attention}{_DIFFUSERS_VAE_ATTENTION[module]}.{leaf}"


def conditioning_keys(keys: Iterable[str]) -> list[str]:
    """Returns those of a file's keys that belong to a UNet or condition one, so that they must not be dropped."""
    return [key for key in keys if key.startswith(CONDITIONING) and not INERT_PARTS & set(key.split("."))]


def prefix_of(component: str, keys: Iterable[str]) -> str | None:
    """Returns the prefix of a network's keys in a file, or None if the file does not hold the network."""
    keys = list(keys)
    prefixes = PREFIXES[component]
    if component == "unet" and not any(key.startswith(UNET) for key in keys):
        prefixes = [prefix for prefix in prefixes if prefix + FIRST_CONVOLUTION in keys and CONTROL_NET not in keys]
    return next((prefix for prefix in prefixes if any(key.startswith(prefix) for key in keys)), None)


def other_network(keys: Iterable[str]) -> str:
    """Returns the kind of network that a file without a UNet of Stable Diffusion holds; "" if it is unknown."""
    keys = list(keys)
    if any(prefix + FIRST_CONVOLUTION in keys for prefix in PREFIXES["unet"]) and CONTROL_NET not in keys:
        return ""
    return next((kind for start, kind in OTHER_NETWORKS.items() if any(key.startswith(start) for key in keys)), "")
