"""The names of layers and factors in adapter files: those of kohya, diffusers, PEFT, ComfyUI, LyCORIS and OneTrainer.

Flattened names such as `lora_unet_mid_block_...` cannot be split again with certainty, since underscores also occur
within names. So the table is built from our own keys: every prefix in front of every spelling of each key.
"""

import re
from collections.abc import Iterable, Iterator, Mapping

from dmm_jax.checkpoints.formats import single_file

PEFT = "base_model.model."  # The prefix in PEFT's own files, which have their alpha in an adapter_config.json.
# Prefixes of names in which underscores replace the dots. `lycoris_` precedes the names of every network.
FLAT = {
    "unet": ("lora_unet_", "lycoris_unet_", "lycoris_"),
    "text_encoder": ("lora_te_", "lora_te1_", "lycoris_te_", "lycoris_te1_", "lycoris_"),
    "text_encoder_2": ("lora_te2_", "lycoris_te2_"),
}
# Prefixes of names that keep their dots.
DOTTED = {
    "unet": ("", "unet.", "diffusion_model.", "model.diffusion_model.", PEFT, f"{PEFT}unet.", "lora_unet."),
    "text_encoder": (
        "text_encoder.", "text_encoders.clip_l.transformer.", "clip_l.transformer.", "clip_l.",
        "cond_stage_model.transformer.", "lora_te.", "lora_te1.", f"{PEFT}text_encoder.", PEFT,
    ),
    "text_encoder_2": (
        "text_encoder_2.", "text_encoders.clip_g.transformer.", "clip_g.transformer.", "clip_g.", "lora_te2.",
        f"{PEFT}text_encoder_2.",
    ),
}  # fmt: skip
# {today's name: the name in diffusers' first LoRA files} of attention layers.
OLD_ATTENTION = {
    ".attn1.": ".attn1.processor.", ".attn2.": ".attn2.processor.", ".to_out.0": ".to_out",
    ".self_attn.q_proj": ".self_attn.to_q", ".self_attn.k_proj": ".self_attn.to_k",
    ".self_attn.v_proj": ".self_attn.to_v", ".self_attn.out_proj": ".self_attn.to_out",
}  # fmt: skip
ROLES = {  # {the end of a key: its role}, for kohya, LyCORIS, PEFT and diffusers (new and old).
    ".lora_up.weight": "up", ".lora_down.weight": "down", ".lora_mid.weight": "mid", ".alpha": "alpha",
    ".lora_B.weight": "up", ".lora_A.weight": "down", ".lora.up.weight": "up", ".lora.down.weight": "down",
    ".lora_linear_layer.up.weight": "up", ".lora_linear_layer.down.weight": "down", "_lora.up.weight": "up",
    "_lora.down.weight": "down", ".lora_B.default.weight": "up", ".lora_A.default.weight": "down",
    ".lora_B.bias": "up_bias", ".lora_B.default.bias": "up_bias", ".scalar": "scalar",
    ".dora_scale": "dora_scale", ".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector.default": "magnitude", ".lora_magnitude_vector.default.weight": "magnitude",
    **{f".hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{f".{name}.weight": name for name in ("a1", "a2", "b1", "b2", "bm")},
    ".diff": "diff", ".diff_b": "diff_b", ".w_norm": "w_norm", ".b_norm": "b_norm",
    ".on_input": "on_input", ".ia3_l": "ia3_l",
}  # fmt: skip
ENDS = sorted(ROLES, key=len, reverse=True)
IA3_WEIGHT = ".weight"  # The vector of LyCORIS's IA3; only `.on_input` next to it tells it from any other tensor.
_LOKR = [
    {*first, *second}
    for first in (["lokr_w1"], ["lokr_w1_a", "lokr_w1_b"])
    for second in (["lokr_w2"], ["lokr_w2_a", "lokr_w2_b"], ["lokr_w2_a", "lokr_w2_b", "lokr_t2"])
]
_LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
KINDS = {  # {kind of adapter: the sets of factors that a layer may have}
    "LoRA": [{"up", "down"}, {"up", "down", "mid"}],
    "LoHa": [_LOHA, _LOHA | {"hada_t1", "hada_t2"}],
    "LoKr": _LOKR,
    "GLoRA": [{"a1", "a2", "b1", "b2"}, {"a1", "a2", "b1", "b2", "bm"}],
    "IA3": [{"ia3", "on_input"}, {"ia3_l"}, {"ia3_in"}, {"ia3_out"}],
    "full difference": [{"diff"}, {"w_norm"}],
}  # fmt: skip
DORA = ("dora_scale", "magnitude")
DECOMPOSED = ("LoRA", "LoHa", "LoKr")  # The kinds that DoRA can rescale.
BIASES = ("diff_b", "b_norm", "up_bias")  # Differences of a layer's bias; the rest change its weight.
SCALES = ("alpha", "scalar", *DORA)  # Roles that go with several kinds.
_MERGE = "Merge it into its base with the tool that made it, and give the merged checkpoint."
OTHER_KINDS = {  # {a part of "key.": (a kind of file that is not read, what to do)}
    ".oft_": ("OFT or BOFT", _MERGE), ".vera_": ("VeRA", _MERGE), ".lora_E.": ("AdaLoRA", _MERGE),
    ".lora_embedding_": ("LoRA of token embeddings", _MERGE), ".glora_": ("PEFT's GLoRA", _MERGE),
    ".boft_": ("OFT or BOFT", _MERGE), ".bd_": ("another adapter", _MERGE),
    ".set_weight.": ("replaced weights", _MERGE), ".reshape_weight.": ("reshaped weights", _MERGE),
    "bundle_emb.": (
        "bundled textual inversions",
        "Save the embedding as a file of its own and give it to `sample --embedding`, or use the LoRA without it.",
    ),
    ".absmax.": ("nf4 or int8 weights of bitsandbytes", "Use the float16 file of this adapter."),
}  # fmt: skip
_TRANSFORMER = re.compile(  # Layers of networks that are not UNets, in the names of all trainers.
    r"(?:^|.*[._])(?:(double|single|single_transformer)|(joint))_blocks[._]|transformer\.|lora_transformer_"
)
_HYPERNETWORK = re.compile(r"(\d+)\.(\d+)\.linear\.\d+\.(weight|bias)", re.ASCII)


def layer_names(
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]], unet_config: Mapping | None
) -> dict[str, tuple[str, str]]:
    """Returns {a layer's name in adapter files: (network, our key of its weight)} for every spelling.

    Args:
      shapes: {network: {our key: shape}}.
      unet_config: the UNet's config, if `shapes` has a UNet.
    """
    return {
        prefix + name: (component, key)
        for component, keys in shapes.items()
        for key in keys
        if key.endswith(".weight")
        for prefix, name in spellings(component, key, unet_config)
    }


def spellings(component: str, key: str, unet_config: Mapping | None) -> Iterator[tuple[str, str]]:
    """Yields (prefix, name) of every spelling of the layer whose weight has our key `key`."""
    layer = key.removesuffix(".weight")
    if component == "unet":
        other = single_file.unet_key(key, unet_config).removesuffix(".weight")
    else:  # Text encoders of today's transformers have no `text_model`.
        other = layer.removeprefix("text_model.")
    for name in (layer, other, _old_attention(layer), _old_attention(other)):
        for prefix in DOTTED[component]:
            yield prefix, name
    for prefix in FLAT[component]:
        for name in (layer, other):
            yield prefix, name.replace(".", "_")


def _old_attention(layer: str) -> str:
    for today, old in OLD_ATTENTION.items():
        layer = layer.replace(today, old)
    return layer


def network_of(name: str) -> str:
    """Returns the network whose prefix a layer's name has, whether a base holds it or not; "" if it has none."""
    prefixes = {
        prefix: component
        for component in DOTTED
        for prefix in (*FLAT[component], *DOTTED[component])
        if prefix not in ("", PEFT, "lycoris_")
    }
    matches = [prefix for prefix in prefixes if name.startswith(prefix)]
    return prefixes[max(matches, key=len)] if matches else ""


def without_numbers(name: str) -> str:
    """Returns a layer's name with every number replaced: layers of one kind in networks of several depths are equal."""
    return re.sub(r"\d+", "#", name)


def split_role(key: str, keys: Mapping | Iterable = ()) -> tuple[str, str] | None:
    """Returns a layer's name and the role that a key gives it, for example "up"; None if the key has no role.

    Args:
      keys: all keys of the file; they tell IA3's vectors from other tensors.
    """
    end = next((end for end in ENDS if key.endswith(end)), None)
    if end:
        return key.removesuffix(end), ROLES[end]
    layer = key.removesuffix(IA3_WEIGHT)
    return (layer, "ia3") if layer != key and f"{layer}.on_input" in keys else None


def kind_of(roles: Iterable[str]) -> str:
    """Returns the kind of adapter whose factors these are; "" if the factors belong together in no kind."""
    factors = set(roles) - {*SCALES, *BIASES}
    kind = next((kind for kind, sets in KINDS.items() if factors in sets), "")
    return "" if kind not in DECOMPOSED and set(DORA) & set(roles) else kind


def other_kinds(keys: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Returns {a kind that is not read: (the first key that shows it, what to do)}; empty if all can be read."""
    kinds = {}
    for key in keys:
        for mark, (kind, advice) in OTHER_KINDS.items():
            if mark in f"{key}.":
                kinds.setdefault(kind, (key, advice))
        transformer = _TRANSFORMER.match(key) if split_role(key) else None
        if transformer:
            name = "FLUX" if transformer[1] else "Stable Diffusion 3" if transformer[2] else "a transformer"
            advice = "Only adapters of UNets are: of Stable Diffusion 1, 2 and XL. Use one of these families."
            kinds.setdefault(f"an adapter of {name}", (key, advice))
        if _HYPERNETWORK.fullmatch(key):
            kinds.setdefault("a hypernetwork", (key, "Use a LoRA of this style: hypernetworks change no weights."))
    return kinds
