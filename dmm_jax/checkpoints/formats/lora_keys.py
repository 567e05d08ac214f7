"""The names of layers and factors in LoRA files: kohya's, diffusers' (old and new), PEFT's and ComfyUI's.

Flattened names such as `lora_unet_mid_block_...` cannot be split again with certainty, since underscores also occur
within names. So the table is built from our own keys: every spelling of each key, mapped to the key.
"""

from collections.abc import Iterable, Iterator, Mapping

from dmm_jax.checkpoints.formats import single_file

KOHYA = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}
PEFT = "base_model.model."  # The prefix in PEFT's own files, which have their alpha in an adapter_config.json.
# Prefixes of names that are our own keys with their dots; ComfyUI's names are the single file's.
DOTTED = {"unet": ("unet.", "", PEFT), "text_encoder": ("text_encoder.",), "text_encoder_2": ("text_encoder_2.",)}
COMFY = "diffusion_model."
# {today's name: the name in diffusers' first LoRA files} of attention layers.
OLD_ATTENTION = {
    ".attn1.": ".attn1.processor.", ".attn2.": ".attn2.processor.", ".to_out.0": ".to_out",
    ".self_attn.q_proj": ".self_attn.to_q", ".self_attn.k_proj": ".self_attn.to_k",
    ".self_attn.v_proj": ".self_attn.to_v", ".self_attn.out_proj": ".self_attn.to_out",
}  # fmt: skip
ROLES = {  # {the end of a key: its role}, for kohya, PEFT and diffusers (new and old).
    ".lora_up.weight": "up", ".lora_down.weight": "down", ".lora_mid.weight": "mid", ".alpha": "alpha",
    ".lora_B.weight": "up", ".lora_A.weight": "down", ".lora.up.weight": "up", ".lora.down.weight": "down",
    ".lora_linear_layer.up.weight": "up", ".lora_linear_layer.down.weight": "down", "_lora.up.weight": "up",
    "_lora.down.weight": "down", ".lora_B.default.weight": "up", ".lora_A.default.weight": "down",
}  # fmt: skip
OTHER_KINDS = {  # {a part of "key.": the kind of adapter that has such keys}
    ".hada_": "LoHa", ".lokr_": "LoKr", ".dora_scale.": "DoRA", ".lora_magnitude_vector.": "DoRA", ".oft_": "OFT",
    ".on_input.": "IA3", ".a1.": "GLoRA", ".a2.": "GLoRA", ".b1.": "GLoRA", ".b2.": "GLoRA", ".bm1.": "GLoRA",
    ".bm2.": "GLoRA", ".diff.": "full differences", ".diff_b.": "full differences", ".w_norm.": "full norms",
    ".b_norm.": "full norms", ".lora_B.bias.": "LoRA with biases", ".lora_embedding_": "LoRA of token embeddings",
    "bundle_emb.": "bundled textual inversions",
}  # fmt: skip


def layer_names(
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]], unet_config: Mapping | None
) -> dict[str, tuple[str, str]]:
    """Returns {a layer's name in LoRA files: (network, our key)} for every spelling.

    Args:
      shapes: {network: {our key: shape}}.
      unet_config: the UNet's config, if `shapes` has a UNet.
    """
    return {
        name: (component, key)
        for component, keys in shapes.items()
        for key in keys
        if key.endswith(".weight")
        for name in _spellings(component, key, unet_config)
    }


def _spellings(component: str, key: str, unet_config: Mapping | None) -> Iterator[str]:
    layer = key.removesuffix(".weight")
    if component == "unet":
        dotted, other = [layer], single_file.unet_key(key, unet_config).removesuffix(".weight")
        yield COMFY + other
    else:  # Text encoders of today's transformers have no `text_model`.
        other = layer.removeprefix("text_model.")
        dotted = [layer, other]
    for name in (*dotted, *map(_old_attention, dotted)):
        for prefix in DOTTED[component]:
            yield prefix + name
    for prefix in KOHYA[component]:
        for name in (layer, other):
            yield prefix + name.replace(".", "_")


def _old_attention(layer: str) -> str:
    for today, old in OLD_ATTENTION.items():
        layer = layer.replace(today, old)
    return layer


def split_role(key: str) -> tuple[str, str] | None:
    """Returns a layer's name and the role ("up", "down", "mid", "alpha") that a key gives it; None if it has none."""
    end = next((end for end in ROLES if key.endswith(end)), None)
    return (key.removesuffix(end), ROLES[end]) if end else None


def other_kinds(keys: Iterable[str]) -> dict[str, str]:
    """Returns {another kind of adapter: the first key that shows it}; empty for plain LoRA and LoCon."""
    kinds = {}
    for key in keys:
        for mark, kind in OTHER_KINDS.items():
            if mark in f"{key}.":
                kinds.setdefault(kind, key)
    return kinds
