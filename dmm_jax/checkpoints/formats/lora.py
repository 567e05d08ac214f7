"""LoRA files as part of a checkpoint: `BASE + LORA.safetensors*0.8` reads as the base with low-rank updates folded in.

W + weight * (alpha / rank) * up @ down (LoRA, arXiv:2106.09685, eq. 3), computed and kept in float32, because float16
would round small updates away. A tensor is folded when it is read; tensors that no LoRA touches stay as stored.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dmm_jax.checkpoints import licenses, naming
from dmm_jax.checkpoints.checkpoint import Checkpoint, Component
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats import single_file
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, dtype_of, shape_of

PLUS, TIMES = " + ", "*"
KOHYA = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}
PEFT = "base_model.model."  # Begins the keys of PEFT's own files, whose alpha stands in a file beside them.
PEFT_CONFIG = "adapter_config.json"
# What names begin with where they are our own keys, dots and all; ComfyUI's have the single file's names.
DOTTED = {"unet": ("unet.", "", PEFT), "text_encoder": ("text_encoder.",), "text_encoder_2": ("text_encoder_2.",)}
COMFY = "diffusion_model."
# Attention in diffusers' first LoRA files: `attn1.processor.to_q_lora`, in text encoders `self_attn.to_q_lora`.
OLD_ATTENTION = {
    ".attn1.": ".attn1.processor.", ".attn2.": ".attn2.processor.", ".to_out.0": ".to_out",
    ".self_attn.q_proj": ".self_attn.to_q", ".self_attn.k_proj": ".self_attn.to_k",
    ".self_attn.v_proj": ".self_attn.to_v", ".self_attn.out_proj": ".self_attn.to_out",
}  # fmt: skip
ROLES = {  # The ends of keys, kohya's and diffusers' (new and old).
    ".lora_up.weight": "up", ".lora_down.weight": "down", ".lora_mid.weight": "mid", ".alpha": "alpha",
    ".lora_B.weight": "up", ".lora_A.weight": "down", ".lora.up.weight": "up", ".lora.down.weight": "down",
    ".lora_linear_layer.up.weight": "up", ".lora_linear_layer.down.weight": "down", "_lora.up.weight": "up",
    "_lora.down.weight": "down", ".lora_B.default.weight": "up", ".lora_A.default.weight": "down",
}  # fmt: skip
OTHER_KINDS = {  # What marks another kind of adapter in "key.".
    ".hada_": "LoHa", ".lokr_": "LoKr", ".dora_scale.": "DoRA", ".lora_magnitude_vector.": "DoRA", ".oft_": "OFT",
    ".on_input.": "IA3", ".a1.": "GLoRA", ".a2.": "GLoRA", ".b1.": "GLoRA", ".b2.": "GLoRA", ".bm1.": "GLoRA",
    ".bm2.": "GLoRA", ".diff.": "whole differences", ".diff_b.": "whole differences", ".w_norm.": "whole norms",
    ".b_norm.": "whole norms", ".lora_B.bias.": "LoRA with biases", ".lora_embedding_": "LoRA of token embeddings",
    "bundle_emb.": "bundled textual inversions",
}  # fmt: skip
ADAPTER_METADATA = "lora_adapter_metadata"  # Where diffusers writes PEFT's config, as JSON, keys "unet.lora_alpha".
HOW_TO_FOLD = (
    "Only plain LoRA and LoCon are folded here. Merge it into its base with the tool that made it and give the merged "
    "checkpoint instead, or use a plain LoRA of this style."
)


class Update(NamedTuple):
    """One layer's low-rank update, its factors still in the file."""

    file: TensorFile
    roles: Mapping[str, str]  # {"up", "down", perhaps "mid": key in the file}
    alpha: float | None  # None where nothing says it: the scale alpha / rank is then 1.

    @property
    def rank(self) -> int:
        """The rank: rows of `down`."""
        return self.file.shape(self.roles["down"])[0]

    def delta(self, weight: float) -> np.ndarray:
        """Returns weight * (alpha / rank) * up @ down in float32, flat: (output, input * kernel)."""
        up, down, mid = (self._factor(role) for role in ("up", "down", "mid"))
        if mid is not None:  # Tucker: 1x1, then kernel by kernel, then 1x1 (LyCORIS, arXiv:2309.14859, sec. 3.1).
            down = np.einsum("rskl,si->rikl", mid, down.reshape(down.shape[:2]))
        scale = np.float32(weight * (1.0 if self.alpha is None else self.alpha / self.rank))
        return (scale * up.reshape(len(up), -1)) @ down.reshape(len(down), -1)  # The product alone is large.

    def _factor(self, role) -> np.ndarray | None:
        return self.file[self.roles[role]].astype(np.float32) if role in self.roles else None


@dataclasses.dataclass(frozen=True)
class Lora:
    """One LoRA file of a checkpoint, matched to the base's layers."""

    path: pathlib.Path
    weight: float
    updates: Mapping[str, Mapping[str, Update]]  # {network: {our key: update}}

    @property
    def ranks(self) -> list[int]:
        """The distinct ranks of its layers, ascending."""
        return sorted({update.rank for network in self.updates.values() for update in network.values()})

    @property
    def networks(self) -> dict[str, int]:
        """How many layers of which network it touches."""
        return {component: len(network) for component, network in self.updates.items() if network}


class Folded(Mapping):
    """A state dict with low-rank updates added to some tensors, each computed when it is read and not kept."""

    def __init__(self, tensors: Mapping, updates: Mapping[str, Sequence[tuple[float, Update]]], expected: Mapping):
        """Takes the base's tensors, {our key: (weight, update) of each LoRA} and {our key: shape}."""
        names = naming.spellings(tensors)
        self._tensors = tensors
        # A base tensor that does not fit its network is left as it is, for the reader of the network to report.
        self._updates = {
            names[key]: found
            for key, found in updates.items()
            if key in names and shape_of(tensors, names[key]) == tuple(expected[key])
        }

    @property
    def computed(self) -> frozenset[str]:
        """The keys whose tensors are computed when read."""
        return frozenset(self._updates)

    def shape(self, key: str) -> tuple[int, ...]:
        """Returns a tensor's shape without reading it."""
        return shape_of(self._tensors, key)

    def dtype(self, key: str) -> np.dtype:
        """Returns a tensor's dtype without reading it."""
        return np.dtype(np.float32) if key in self._updates else dtype_of(self._tensors, key)

    def __getitem__(self, key: str) -> np.ndarray:
        array = self._tensors[key]
        if key not in self._updates:
            return array
        folded = np.array(array, np.float32)
        for weight, update in self._updates[key]:
            folded += update.delta(weight).reshape(folded.shape)
        return folded

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def parse(path: str | pathlib.Path) -> tuple[pathlib.Path, list[tuple[pathlib.Path, float]]]:
    """Reads `BASE + LORA*0.8 + OTHER` as (base, [(LoRA file, weight)]); what exists as written is a path.

    Raises:
      CheckpointError: a weight is no finite number.
    """
    first, *others = _terms(str(path))
    return pathlib.Path(first), [_weighted(term) for term in others]


def _terms(text) -> Iterator[str]:
    """Yields what stands between the pluses; the longest text that exists is one term, whatever it holds."""
    parts = text.split(PLUS)
    while parts:
        ends = range(len(parts), 1, -1)
        end = next((end for end in ends if pathlib.Path(PLUS.join(parts[:end])).exists()), 1)
        yield PLUS.join(parts[:end]).strip() if end == 1 else PLUS.join(parts[:end])
        parts = parts[end:]


def _weighted(term) -> tuple[pathlib.Path, float]:
    if TIMES not in term or pathlib.Path(term).exists():
        return pathlib.Path(term), 1.0
    path, _, said = term.rpartition(TIMES)
    try:
        weight = float(said)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise CheckpointError(
            f"{naming.printable(term)}: {naming.printable(said)!r} is no weight. Write for example "
            "'BASE + LORA.safetensors*0.8'."
        )
    return pathlib.Path(path.strip()), weight


def with_loras(base: Checkpoint, path: pathlib.Path, files: Sequence[tuple[pathlib.Path, float]]) -> Checkpoint:
    """Returns a checkpoint whose UNet and text encoders are the base's with LoRAs folded in; only headers are read.

    Args:
      base: the opened base.
      path: the whole text, as the user wrote it.
      files: (LoRA file, weight) of each, in order. Weight 0 leaves the base's tensors as they are stored.

    Raises:
      CheckpointError: a file is missing, damaged, of another kind than LoRA, or has layers that are unknown,
        incomplete or misshapen; those of all files are named at once.
    """
    opened = [(TensorFile(file), weight) for file, weight in files]
    shapes = {name: base.shapes(name) for name in KOHYA if base.has(name)}
    layers = dict(_layers(base, shapes))
    problems, loras = [], []
    for file, weight in opened:
        _refuse_other_kinds(file)
        updates, found = _matched(file, layers, shapes)
        loras.append(Lora(file.path, weight, updates))
        problems += [
            f"  {file.path}, {len(keys)} {kind}: {naming.listed(keys)}" for kind, keys in found.items() if keys
        ]
    if problems:
        raise CheckpointError(
            f"LoRA files do not fit {base.path}:\n" + "\n".join(problems) + "\nUse LoRAs that were trained on this "
            "model's family, on a base that holds the networks that they change."
        )
    components = {name: _folded(name, part, loras, shapes) for name, part in base.components.items()}
    folded = [name for name, part in components.items() if part is not base.components[name]]
    return dataclasses.replace(
        base,
        path=path,
        components=components,
        loras=tuple(loras),
        license=licenses.together([base.license, *(licenses.stated(file.metadata) for file, _ in opened)]),
        root=base.path,
        borrowed=tuple(name for name in base.borrowed if name not in folded),
    )


def refuse_alone(file: TensorFile) -> None:
    """Raises CheckpointError for a LoRA that is given without the base that it changes; says how to give both."""
    _refuse_other_kinds(file)
    if any(key.endswith(tuple(ROLES)) for key in file):
        raise CheckpointError(
            f"{file.path} is a LoRA, which changes a checkpoint and is none. Give it with its base, as one text: "
            f"'BASE + {file.path}*0.8', where 0.8 is the weight."
        )


def _folded(component, part: Component, loras: Sequence[Lora], shapes) -> Component:
    """Returns a network with the LoRAs that count folded in; the same one where none does."""
    updates = {}
    for lora in loras:
        for key, update in lora.updates.get(component, {}).items() if lora.weight else ():
            updates.setdefault(key, []).append((lora.weight, update))
    if not updates:
        return part
    return Component(part.config, lambda: Folded(part.tensors, updates, shapes[component]))


def _layers(base, shapes) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yields (a layer's name in LoRA files, (network, our key)): our own keys flattened, never theirs taken apart."""
    for component, keys in shapes.items():
        for key in keys:
            layer, _, leaf = key.rpartition(".")
            if leaf != "weight":
                continue
            if component == "unet":
                dotted, other = [layer], single_file.unet_key(key, base.unet_config).removesuffix(".weight")
                yield COMFY + other, (component, key)
            else:  # Encoders of today's transformers have no `text_model`.
                dotted, other = [layer, layer.removeprefix("text_model.")], layer.removeprefix("text_model.")
            for name in (*dotted, *map(_old_attention, dotted)):
                for prefix in DOTTED[component]:
                    yield prefix + name, (component, key)
            for prefix in KOHYA[component]:
                for name in (layer, other):
                    yield prefix + name.replace(".", "_"), (component, key)


def _old_attention(layer: str) -> str:
    for today, old in OLD_ATTENTION.items():
        layer = layer.replace(today, old)
    return layer


def _refuse_other_kinds(file: TensorFile) -> None:
    kinds = {}
    for key in file:
        for mark, kind in OTHER_KINDS.items():
            if mark in f"{key}.":
                kinds.setdefault(kind, key)
    if kinds:
        said = ", ".join(f"{kind} ({naming.printable(key)})" for kind, key in kinds.items())
        raise CheckpointError(f"{file.path} is no plain LoRA; it holds {said}. {HOW_TO_FOLD}")


def _matched(file: TensorFile, layers, shapes) -> tuple[dict, dict[str, list[str]]]:
    """Returns {network: {our key: update}}, and {what is wrong: keys}."""
    wrong = {"unknown": [], "incomplete": [], "named twice": [], "misshapen": [], "with an alpha that is no number": []}
    parts = {}
    for key in file:
        end = next((end for end in ROLES if key.endswith(end)), None)
        layer = key.removesuffix(end) if end else None
        if layer not in layers:
            wrong["unknown"].append(key)
        elif ROLES[end] in parts.setdefault(layers[layer], {}):
            wrong["named twice"].append(key)
        else:
            parts[layers[layer]][ROLES[end]] = key
    updates = {component: {} for component in shapes}
    for (component, key), roles in parts.items():
        if not {"up", "down"} <= roles.keys():
            wrong["incomplete"] += roles.values()
            continue
        misfit = _misfit(file, roles, shapes[component][key])
        if misfit:
            wrong["misshapen"].append(f"{roles['up']} ({misfit})")
            continue
        alpha = _alpha(file, component, roles)
        if alpha is not None and not math.isfinite(alpha):
            wrong["with an alpha that is no number"].append(roles.get("alpha", roles["up"]))
        updates[component][key] = Update(file, {role: name for role, name in roles.items() if role != "alpha"}, alpha)
    if not len(file):
        raise CheckpointError(f"{file.path} is no LoRA: it holds no tensor.")
    return updates, wrong


def _misfit(file, roles, expected) -> str:
    """Tells in what the factors do not give a tensor of `expected` shape; dense layers may be 1x1 convolutions."""
    found = {role: file.shape(key) for role, key in roles.items() if role != "alpha"}
    up, down, whole = _dense(found["up"]), _dense(found["down"]), _dense(expected)
    rank = down[0] if down else 0
    if "mid" in found:
        fits = len(whole) == 4 and found["mid"] == (rank, rank, *whole[2:]) and down == (rank, whole[1])
    else:
        fits = down == (rank, *whole[1:])
    if fits and len(whole) in (2, 4) and rank and up == (whole[0], rank):
        return ""
    return f"the layer is {expected}, the factors " + ", ".join(f"{role} {shape}" for role, shape in found.items())


def _dense(shape):
    return tuple(shape[:2]) if len(shape) == 4 and tuple(shape[2:]) == (1, 1) else tuple(shape)


def _alpha(file: TensorFile, component, roles) -> float | None:
    """Returns a layer's alpha: its own tensor, else what PEFT's config in the metadata says; NaN for no number."""
    if "alpha" in roles:
        array = file[roles["alpha"]].reshape(-1)
        return float(array[0]) if array.size == 1 else math.nan
    return _peft_alpha(file, component, roles)


def _peft_alpha(file, component, roles):
    if roles["up"].startswith(PEFT):
        where = file.path.parent / PEFT_CONFIG
        if not where.is_file():
            raise CheckpointError(f"{file.path} needs {PEFT_CONFIG} beside it, which says its alpha. Fetch it, too.")
        text, prefix = where.read_text(encoding="utf-8", errors="replace"), ""
    elif ADAPTER_METADATA in file.metadata:
        where, prefix = f"{file.path}: its metadata {ADAPTER_METADATA!r}", f"{component}."
        text = file.metadata[ADAPTER_METADATA]
    else:
        return None
    try:
        told = json.loads(text)
        told = {key.removeprefix(prefix): value for key, value in told.items() if key.startswith(prefix)}
        alpha = told.get("lora_alpha")
        alpha = None if alpha is None else float(alpha)
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{where} cannot be read. {HOW_TO_FOLD}") from None
    for option in ("use_rslora", "use_dora", "alpha_pattern"):
        if told.get(option):
            raise CheckpointError(f"{file.path} was trained with {option}, which changes its scale. {HOW_TO_FOLD}")
    return alpha
