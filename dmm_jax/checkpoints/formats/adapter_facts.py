"""Facts about an adapter file, without its base: its kind, its layers, what it was trained on, and how to use it."""

import collections
import hashlib
import json
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats import adapter_kinds, lora_keys, peft_options
from dmm_jax.checkpoints.formats.lora_keys import BIASES, DORA
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, raw_bytes
from dmm_jax.checkpoints.styles import BIAS

# {fact: the fields of a file's metadata that state it, the best first}, of kohya's trainer, ModelSpec and dmm_jax.
STATED = {
    "base": ("ss_sd_model_name", "ss_base_model_version", "modelspec.merged_from"),
    "family": ("modelspec.architecture", "ss_base_model_version"),
    "title": ("modelspec.title", "ss_output_name"),
    "trainer": ("ss_network_module", "modelspec.implementation"),
    "trigger": ("modelspec.trigger_phrase",),
    "images": ("ss_num_train_images",),
    "clip_skip": ("ss_clip_skip",),
}
MAX_CHARS = 120
PRECISIONS = (np.float32, np.float16, ml_dtypes.bfloat16)  # An export has one of these.
STYLE_BASE = "dmm_jax.lora_base"  # Metadata of the files of `export`: the checkpoint that they belong to.


def refuse_other_kinds(file: TensorFile) -> None:
    """Raises CheckpointError if a file holds adapters of kinds that are not read; it names them, and what to do."""
    kinds = lora_keys.other_kinds(file)
    if kinds:
        examples = ", ".join(f"{kind} ({naming.printable(key)})" for kind, (key, _) in kinds.items())
        advice = " ".join(dict.fromkeys(advice for _, advice in kinds.values()))
        raise CheckpointError(f"{file.path} holds {examples}, which is not read. {advice}")
    peft_options.refuse_changed_base(file)


def facts(file: TensorFile) -> dict | None:
    """Returns facts about an adapter, ready for JSON; None if a file holds none.

    Returns:
      A dictionary with these keys:
      kinds: {kind: number of layers}.
      ranks: the distinct ranks, ascending.
      networks: {network: number of layers}; the network is "" if a layer's name does not tell it.
      faulty: the names of layers that lack a factor, or have factors that do not belong together.
      stated: {fact: what the metadata states}.
    """
    layers: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for key in file:
        name, role = lora_keys.split_role(key, file) or (key, None)
        if role is not None:
            layers[name][role] = key
    kinds, ranks, networks, faulty = collections.Counter(), set(), collections.Counter(), []
    for name, roles in layers.items():
        kind = lora_keys.kind_of(roles) or ("full difference" if set(roles) & set(BIASES) else "")
        if not kind:
            faulty += [name] if set(roles) - set(lora_keys.SCALES) else []
            continue
        factors = {role: file.shape(key) for role, key in roles.items() if role not in (*BIASES, "alpha", "scalar")}
        if kind == "LoRA" and factors["up"][1:2] != factors["down"][:1]:
            faulty.append(name)
        kinds[f"DoRA of {kind}" if set(DORA) & set(roles) else kind] += 1
        networks[lora_keys.network_of(name)] += 1
        if kind in lora_keys.DECOMPOSED and all(factors.values()):  # A scalar has no rank.
            ranks.add(adapter_kinds.rank(kind, factors))
    if not kinds and not faulty:
        return None
    return {
        "kinds": dict(kinds),
        "ranks": sorted(ranks - {None}),
        "networks": dict(networks),
        "faulty": faulty,
        "stated": _stated(file.metadata),
    }


def _stated(metadata: Mapping[str, str]) -> dict[str, str]:
    facts = {}
    for fact, fields in STATED.items():
        text = next((metadata[name] for name in fields if metadata.get(name, "None") not in ("None", "")), "")
        if text:
            facts[fact] = naming.printable(" ".join(text.split()), MAX_CHARS)
    return facts


def sentence(facts: Mapping) -> str:
    """Returns the facts as sentences that continue "FILE is"."""
    kinds = " and ".join(f"{kind} of {count} layers" for kind, count in facts["kinds"].items())
    article = "a LoRA" if set(facts["kinds"]) == {"LoRA"} else "an adapter"
    ranks = f", rank {_listed(facts['ranks'])}" if facts["ranks"] else ""
    networks = ", ".join(name for name in facts["networks"] if name)
    lines = [
        f"{article}, which changes a checkpoint and is not one: {kinds}{ranks}{f', in {networks}' if networks else ''}."
    ]
    names = {
        "base": "trained on",
        "family": "for",
        "title": "called",
        "trigger": "trigger words",
        "clip_skip": "clip skip",
    }
    stated = [f"{names[fact]} {text}" for fact, text in facts["stated"].items() if fact in names]
    if stated:
        lines.append(f"Its metadata states: {'; '.join(stated)}.")
    return " ".join(lines)


def _listed(ranks) -> str:
    return ", ".join(map(str, ranks)) if len(ranks) < 6 else f"{ranks[0]} to {ranks[-1]}"


def how_to_use(file: TensorFile) -> str:
    """Returns a sentence about how to use an adapter."""
    style = _style_base(file).get("style")
    if style:
        style = naming.printable(str(style), MAX_CHARS)
        return (
            f"It changes the stock export of the mix {style} of one student, and no other checkpoint. Give it with "
            f"that export, as one text: 'EXPORT + {file.path}'."
        )
    return (
        f"Give it with its base, as one text: 'BASE + {file.path}*0.8', where 0.8 is the weight. "
        f"`dmm-jax inspect 'BASE + {file.path}'` tells whether its layers fit."
    )


def _style_base(file: TensorFile) -> dict:
    """Returns what a style file states about the stock export that it changes; {} for any other file."""
    try:
        base = json.loads(file.metadata.get(STYLE_BASE, "{}"))
    except (ValueError, RecursionError):
        return {}
    return base if isinstance(base, dict) else {}


def refuse_other_base(file: TensorFile, base: Checkpoint) -> None:
    """Raises CheckpointError if a style file states another base: the difference of two biases fits one base alone.

    A base in half precision cannot be compared with the hash of another precision; then it is taken as it is.
    """
    stated, tensors = _style_base(file), base.tensors("unet") if base.has("unet") else {}
    key, digest = naming.spellings(tensors).get(BIAS), stated.get("bias_sha256")
    if not isinstance(digest, str) or key is None:
        return
    bias = np.asarray(tensors[key])
    is_comparable = bias.dtype == np.float32 or bias.dtype.name == stated.get("dtype")
    digests = [hashlib.sha256(raw_bytes(bias.astype(dtype))).hexdigest() for dtype in PRECISIONS]
    if is_comparable and digest not in digests:
        style = naming.printable(str(stated.get("style")), MAX_CHARS)
        raise CheckpointError(
            f"{file.path} changes the stock export of the mix {style} of one student, and {base.path} is not that "
            f"export: its {BIAS} differs, so the result would be meaningless. Give that export as the base: "
            f"export --format single-file --style {style}."
        )
