"""LoRA files (kohya, diffusers, PEFT, ComfyUI) as part of a checkpoint: `BASE + LORA.safetensors*0.8`.

`with_loras` returns the base with the updates folded in (see `low_rank`); it reads headers only.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from dmm_jax.checkpoints import licenses, naming
from dmm_jax.checkpoints.checkpoint import Checkpoint, Component, FoldedLora
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats.lora_keys import KOHYA, PEFT, layer_names, other_kinds, split_role
from dmm_jax.checkpoints.formats.low_rank import Folded, Update
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile
from dmm_jax.runtime.errors import refuse
from dmm_jax.runtime.storage import read_text

PLUS, TIMES = " + ", "*"
PEFT_CONFIG = "adapter_config.json"
ADAPTER_METADATA = "lora_adapter_metadata"  # diffusers writes PEFT's config here, as JSON with keys "unet.lora_alpha".
HOW_TO_FOLD = (
    "Only plain LoRA and LoCon are folded here. Merge it into its base with the tool that made it and give the merged "
    "checkpoint instead, or use a plain LoRA of this style."
)


def parse(path: str | pathlib.Path) -> tuple[pathlib.Path, list[tuple[pathlib.Path, float]]]:
    """Splits `BASE + LORA*0.8 + OTHER` into (base, [(LoRA file, weight)]); a path that exists is never split.

    Raises:
      CheckpointError: a weight is not a finite number.
    """
    base, *loras = _terms(str(path))
    return pathlib.Path(base), [_weighted(lora) for lora in loras]


def _terms(text: str) -> Iterator[str]:
    """Yields the terms of a sum; the longest text that is an existing path counts as one term."""
    parts = text.split(PLUS)
    while parts:
        ends = range(len(parts), 1, -1)
        end = next((end for end in ends if pathlib.Path(PLUS.join(parts[:end])).exists()), 1)
        yield PLUS.join(parts[:end]).strip() if end == 1 else PLUS.join(parts[:end])
        parts = parts[end:]


def _weighted(term: str) -> tuple[pathlib.Path, float]:
    if TIMES not in term or pathlib.Path(term).exists():
        return pathlib.Path(term), 1.0
    path, _, factor = term.rpartition(TIMES)
    try:
        weight = float(factor)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise CheckpointError(
            f"{naming.printable(term)}: {naming.printable(factor)!r} is not a weight. Write for example "
            "'BASE + LORA.safetensors*0.8'."
        )
    return pathlib.Path(path.strip()), weight


def with_loras(base: Checkpoint, path: pathlib.Path, files: Sequence[tuple[pathlib.Path, float]]) -> Checkpoint:
    """Returns a checkpoint whose UNet and text encoders are the base's with LoRAs folded in; reads headers only.

    Args:
      base: the opened base.
      path: the complete text that the user wrote.
      files: (LoRA file, weight), in order. Weight 0 leaves the base's tensors as stored.

    Raises:
      CheckpointError: a file is missing, damaged or another kind of adapter, or has layers that are unknown,
        incomplete or misshapen; lists those of all files at once.
    """
    opened = [(TensorFile(file), weight) for file, weight in files]
    shapes = {name: base.shapes(name) for name in KOHYA if base.has(name)}
    layers = layer_names(shapes, base.unet_config if base.has("unet") else None)
    lines, loras, terms = [], [], []
    for file, weight in opened:
        _refuse_other_kinds(file)
        updates, problems = _match(file, layers, shapes)
        ranks = sorted({update.rank for network in updates.values() for update in network.values()})
        networks = {component: len(network) for component, network in updates.items() if network}
        loras.append(FoldedLora(file.path, weight, ranks, networks))
        terms.append((weight, updates))
        lines += [f"{file.path}, {len(keys)} {kind}: {naming.listed(keys)}" for kind, keys in problems.items() if keys]
    advice = "use LoRAs that were trained on its family, and a base that holds the networks that they change"
    refuse(f"LoRA files do not fit {base.path}; {advice}", lines, CheckpointError)
    components = {name: _folded(name, part, terms, shapes) for name, part in base.components.items()}
    folded = [name for name, part in components.items() if part is not base.components[name]]
    return dataclasses.replace(
        base,
        path=path,
        components=components,
        loras=tuple(loras),
        license=licenses.together([base.license, *(licenses.stated(file.metadata) for file, _ in opened)]),
        unfolded_path=base.path,
        from_base=tuple(name for name in base.from_base if name not in folded),
    )


def refuse_alone(file: TensorFile) -> None:
    """Raises CheckpointError if a file given as a checkpoint is a LoRA; the message says how to add it to a base."""
    _refuse_other_kinds(file)
    if any(split_role(key) for key in file):
        raise CheckpointError(
            f"{file.path} is a LoRA, which changes a checkpoint and is not one. Give it with its base, as one text: "
            f"'BASE + {file.path}*0.8', where 0.8 is the weight."
        )


def _refuse_other_kinds(file: TensorFile) -> None:
    if kinds := other_kinds(file):
        examples = ", ".join(f"{kind} ({naming.printable(key)})" for kind, key in kinds.items())
        raise CheckpointError(f"{file.path} is not a plain LoRA; it holds {examples}. {HOW_TO_FOLD}")


def _folded(component: str, part: Component, terms: Sequence[tuple[float, Mapping]], shapes: Mapping) -> Component:
    """Returns a network with its updates folded in; without updates of nonzero weight, the same object.

    Args:
      terms: for each LoRA its weight and the updates that `_match` returns.
    """
    weighted_updates = {}
    for weight, updates in terms:
        for key, update in updates.get(component, {}).items() if weight else ():
            weighted_updates.setdefault(key, []).append((weight, update))
    if not weighted_updates:
        return part
    return Component(part.config, lambda: Folded(part.tensors, weighted_updates, shapes[component]))


def _match(file: TensorFile, layers: Mapping, shapes: Mapping) -> tuple[dict, dict[str, list[str]]]:
    """Returns {network: {our key: update}} and {problem: keys in the file}."""
    problems = {
        "unknown": [], "incomplete": [], "named twice": [], "misshapen": [], "quantised": [],
        "with an alpha that is not a number": [],
    }  # fmt: skip
    roles_of_layers = {}
    for key in file:
        layer, role = split_role(key) or (None, None)
        if layer not in layers:
            problems["unknown"].append(key)
        elif role in roles_of_layers.setdefault(layers[layer], {}):
            problems["named twice"].append(key)
        else:
            roles_of_layers[layers[layer]][role] = key
    updates = {component: {} for component in shapes}
    for (component, our_key), roles in roles_of_layers.items():
        if not {"up", "down"} <= roles.keys():
            problems["incomplete"] += roles.values()
            continue
        factors = {role: key for role, key in roles.items() if role != "alpha"}
        problems["quantised"] += [key for key in factors.values() if file.dtype(key).kind in "biu"]
        misfit = _misfit({role: file.shape(key) for role, key in factors.items()}, shapes[component][our_key])
        if misfit:
            problems["misshapen"].append(f"{roles['up']} ({misfit})")
            continue
        alpha = _alpha(file, component, roles)
        if alpha is not None and not math.isfinite(alpha):
            problems["with an alpha that is not a number"].append(roles.get("alpha", roles["up"]))
        updates[component][our_key] = Update(file, factors, alpha)
    if not len(file):
        raise CheckpointError(f"{file.path} is not a LoRA: it holds no tensor.")
    return updates, problems


def _misfit(factors: Mapping[str, tuple[int, ...]], expected: tuple[int, ...]) -> str:
    """Returns why factors of these shapes do not give a tensor of the `expected` shape; "" if they do."""
    # Dense layers may be stored as 1x1 convolutions.
    up, down, layer = (
        tuple(shape[:2]) if len(shape) == 4 and tuple(shape[2:]) == (1, 1) else tuple(shape)
        for shape in (factors["up"], factors["down"], expected)
    )
    rank = down[0] if down else 0
    if "mid" in factors:
        fits = len(layer) == 4 and factors["mid"] == (rank, rank, *layer[2:]) and down == (rank, layer[1])
    else:
        fits = down == (rank, *layer[1:])
    if fits and len(layer) in (2, 4) and rank and up == (layer[0], rank):
        return ""
    return f"the layer is {expected}, the factors " + ", ".join(f"{role} {shape}" for role, shape in factors.items())


def _alpha(file: TensorFile, component: str, roles: Mapping[str, str]) -> float | None:
    """Returns a layer's alpha from its own tensor, or else from PEFT's config; NaN if the tensor is not a number."""
    if "alpha" in roles:
        array = file[roles["alpha"]].reshape(-1)
        return float(array[0]) if array.size == 1 else math.nan
    if roles["up"].startswith(PEFT):
        where, prefix = file.path.parent / PEFT_CONFIG, ""
        if not where.is_file():
            raise CheckpointError(f"{file.path} needs {PEFT_CONFIG}, which states its alpha, in its folder. Fetch it.")
        text = read_text(where)
    elif ADAPTER_METADATA in file.metadata:
        where, prefix = f"{file.path}: its metadata {ADAPTER_METADATA!r}", f"{component}."
        text = file.metadata[ADAPTER_METADATA]
    else:
        return None
    try:
        options = {key.removeprefix(prefix): value for key, value in json.loads(text).items() if key.startswith(prefix)}
        alpha = options.get("lora_alpha")
        alpha = None if alpha is None else float(alpha)
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{where} cannot be read. {HOW_TO_FOLD}") from None
    for option in ("use_rslora", "use_dora", "alpha_pattern"):
        if options.get(option):
            raise CheckpointError(f"{file.path} was trained with {option}, which changes its scale. {HOW_TO_FOLD}")
    return alpha
