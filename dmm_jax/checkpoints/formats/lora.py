"""Adapter files (LoRA, LoHa, LoKr, DoRA and others) as part of a checkpoint: `BASE + LORA.safetensors*0.8`.

`with_loras` returns the base with the differences folded in (see `folding`); it reads headers and scalars only,
and a style file's bias of the base.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from dmm_jax.checkpoints import licenses, naming
from dmm_jax.checkpoints.checkpoint import Checkpoint, Component, FoldedLora
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats import adapter_facts, adapter_kinds, lora_keys, peft_options
from dmm_jax.checkpoints.formats.folding import Folded, Update
from dmm_jax.checkpoints.formats.lora_keys import BIASES, DORA, SCALES
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile
from dmm_jax.runtime.errors import refuse

PLUS, TIMES = " + ", "*"
OTHER_WEIGHT = re.compile(r"(?:<lora:)?(.+?)[:@=,]([0-9.]+)>?")  # FILE:0.8 and <lora:FILE:0.8> of other programs.
# What may be wrong with keys of a file, as messages call it.
UNKNOWN, TWICE, INCOMPLETE = "unknown", "named twice", "incomplete, or of several kinds"
LACKING = "of layers or networks that this base does not have; the file belongs to another family"
UNSCALED = ("full difference", "IA3")  # Kinds that no alpha scales.
MISSHAPEN, QUANTISED, NO_ALPHA = "misshapen", "quantised", "with an alpha that is not a number"


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
    """Returns a checkpoint whose UNet and text encoders are the base's with adapters folded in; reads headers only.

    Args:
      base: the opened base.
      path: the complete text that the user wrote.
      files: (adapter file, weight), in order. Weight 0 leaves the base's tensors as stored.

    Raises:
      CheckpointError: a file is missing, damaged or of a kind that is not read, or has layers that are unknown,
        incomplete or misshapen; lists those of all files at once.
    """
    opened = [(_opened(file), weight) for file, weight in files]
    shapes = {name: base.shapes(name) for name in lora_keys.FLAT if base.has(name)}
    layers = lora_keys.layer_names(shapes, base.unet_config if base.has("unet") else None)
    lines, loras, terms = [], [], []
    for file, weight in opened:
        adapter_facts.refuse_other_kinds(file)
        if not len(file):
            raise CheckpointError(f"{file.path} is not a LoRA: it holds no tensor.")
        adapter_facts.refuse_other_base(file, base)
        match = Match(file, layers, shapes)
        loras.append(FoldedLora(file.path, weight, match.ranks, match.networks, match.kinds))
        terms.append((weight, match.updates))
        lines += [f"{file.path}, {len(keys)} {kind}: {naming.listed(keys)}" for kind, keys in match.problems.items()]
    advice = "use adapters that were trained on its family, and a base that holds the networks that they change"
    refuse(f"LoRA files do not fit {base.path}; {advice}", lines, CheckpointError)
    components = {name: _folded(name, part, terms, shapes) for name, part in base.components.items()}
    folded = [name for name, part in components.items() if part is not base.components[name]]
    return dataclasses.replace(
        base,
        path=path,
        components=components,
        loras=tuple(loras),
        license=licenses.together([base.license, *(licenses.stated(file.metadata, file.path) for file, _ in opened)]),
        unfolded_path=base.path,
        from_base=tuple(name for name in base.from_base if name not in folded),
    )


def _opened(path: pathlib.Path) -> TensorFile:
    refuse_folder(path)
    if (other := OTHER_WEIGHT.fullmatch(str(path))) and not path.exists():
        file, weight = map(naming.printable, other.groups())
        raise CheckpointError(f"there is no file {path}; did you mean {file}{TIMES}{weight}, with that weight?")
    return TensorFile(path)


def refuse_folder(path: pathlib.Path) -> None:
    """Raises CheckpointError if a path is a folder that holds safetensors files; the message names them."""
    names = sorted(file.name for file in path.glob("*.safetensors")) if path.is_dir() else []
    if names:
        raise CheckpointError(
            f"{path} is a folder and no checkpoint: it holds {naming.listed(names)}. Give the file, for example "
            f"{naming.printable(str(path / names[0]), 1000)}."
        )


class AdapterAlone(CheckpointError):
    """A sound adapter is given without its base; the message says what it is and how to use it."""


def refuse_alone(file: TensorFile) -> None:
    """Raises AdapterAlone if a file given as a checkpoint is an adapter, or CheckpointError if it is not read."""
    adapter_facts.refuse_other_kinds(file)
    facts = adapter_facts.facts(file)
    if facts and facts["faulty"]:
        raise CheckpointError(
            f"{file.path} is a damaged adapter: factors are missing or do not belong together in the layers "
            f"{naming.listed(facts['faulty'])}. Fetch it again, or save it again with the tool that made it."
        )
    if facts:
        raise AdapterAlone(f"{file.path} is {adapter_facts.sentence(facts)} {adapter_facts.how_to_use(file)}")


def _folded(component: str, part: Component, terms: Sequence[tuple[float, Mapping]], shapes: Mapping) -> Component:
    """Returns a network with its updates folded in; without updates of nonzero weight, the same object.

    Args:
      terms: for each adapter its weight and the updates of its `Match`.
    """
    weighted_updates = {}
    for weight, updates in terms:
        for key, update in updates.get(component, {}).items() if weight else ():
            weighted_updates.setdefault(key, []).append((weight, update))
    if not weighted_updates:
        return part
    return Component(part.config, lambda: Folded(part.tensors, weighted_updates, shapes[component]))


class Match:
    """The layers of a base that an adapter file changes: `updates` {network: {our key: update}}, and `problems`."""

    def __init__(self, file: TensorFile, layers: Mapping, shapes: Mapping):
        """Takes a file, the names of the base's layers (`lora_keys.layer_names`), and {network: {our key: shape}}."""
        self.file, self.layers, self.shapes = file, layers, shapes
        self.updates: dict[str, dict[str, Update]] = {component: {} for component in shapes}
        self.problems: dict[str, list[str]] = {}  # {kind of problem: keys in the file}
        self._options: dict[tuple[str, bool], peft_options.PeftOptions | None] = {}
        self._patterns = None
        roles_of_layers = {}
        for key in file:
            name, role = lora_keys.split_role(key, file) or (key, None)
            if role is None or name not in layers:
                self._report(self._stranger(name), key)
            elif role in roles_of_layers.setdefault(layers[name], {}):
                self._report(TWICE, key)
            else:
                roles_of_layers[layers[name]][role] = key
        for (component, our_key), roles in roles_of_layers.items():
            self._add(component, our_key, roles)

    def _report(self, problem: str, *keys: str) -> None:
        self.problems.setdefault(problem, []).extend(keys)

    def _stranger(self, name: str) -> str:
        """Returns the problem of a layer that the base lacks: its name is unknown, or names a layer of other bases."""
        if self._patterns is None:
            self._patterns = {lora_keys.without_numbers(layer) for layer in self.layers}
        network = lora_keys.network_of(name)
        is_known = network and network not in self.shapes or lora_keys.without_numbers(name) in self._patterns
        return LACKING if is_known else UNKNOWN

    def _add(self, component: str, our_key: str, roles: Mapping[str, str]) -> None:
        """Adds the updates of a layer's weight and bias, or reports what is wrong with them."""
        of_bias = {role: key for role, key in roles.items() if role in BIASES}
        of_weight = {role: key for role, key in roles.items() if role not in BIASES}
        factors = {role: key for role, key in of_weight.items() if role not in ("alpha", "scalar")}
        kind = lora_keys.kind_of(factors)
        # Alpha scales no difference of a bias, so it may be next to one alone.
        is_bias = set(of_weight) <= {"alpha"} and of_bias and ("up_bias" not in of_bias or not of_weight)
        if not kind and not is_bias or len(of_bias) > 1:
            self._report(INCOMPLETE, *roles.values())
            return
        if "scalar" in roles and kind in UNSCALED:
            self._report(f"scalar next to the kind {kind}, which has none", roles["scalar"])
            return
        quantised = [key for role, key in roles.items() if role not in SCALES and self._is_quantised(role, key)]
        if quantised:
            self._report(QUANTISED, *quantised)
            return
        layer = our_key.removesuffix(".weight")
        if "ia3_l" in factors:
            factors = {self._side(component, layer, factors["ia3_l"]): factors["ia3_l"]}
        shapes = {role: self.file.shape(key) for role, key in factors.items()}
        if kind and not self._fits(kind, factors, shapes, self.shapes[component][our_key]):
            return
        scale = self._scale(component, layer, roles, adapter_kinds.rank(kind, shapes))
        if scale is None:
            return
        if kind:
            factor = 1.0 if kind in UNSCALED else scale
            self.updates[component][our_key] = Update(self.file, kind, factors, factor)
            if "ia3_out" in factors and f"{layer}.bias" in self.shapes[component]:
                self.updates[component][f"{layer}.bias"] = Update(self.file, kind, factors, factor)
        for role, key in of_bias.items():
            expected = self.shapes[component].get(f"{layer}.bias")
            if expected is None and role == "up_bias" and not np.any(self.file[key]):
                continue  # PEFT's layers have a bias if any has; zeros change nothing.
            if self.file.shape(key) != expected:
                self._report(MISSHAPEN, f"{key} (the bias is {expected}, the difference {self.file.shape(key)})")
            else:
                factor = scale if role == "up_bias" else 1.0
                self.updates[component][f"{layer}.bias"] = Update(self.file, "full difference", {role: key}, factor)

    def _side(self, component: str, layer: str, key: str) -> str:
        """Returns the role of a factor of PEFT's IA3: "ia3_in" if it multiplies the inputs, else "ia3_out".

        A factor is (1, I) or (O, 1) for dense layers, and (1, I, 1, 1) or (1, O, 1, 1) for convolutions; if I equals
        O, PEFT's config tells them apart.
        """
        shape, expected = self.file.shape(key), self.shapes[component][f"{layer}.weight"]
        if len(expected) < 2:  # Norms have no IA3, which `fits` reports.
            return "ia3_out"
        if len(shape) == 2 or expected[0] != expected[1]:
            return "ia3_in" if len(shape) > 1 and shape[0] == 1 and shape[1] == expected[1] else "ia3_out"
        options = self._peft(component, key)
        names = options.fields.get("feedforward_modules") if options else None
        names = names if isinstance(names, list) else []
        return "ia3_in" if any(f".{layer}".endswith(f".{name}") for name in names) else "ia3_out"

    def _is_quantised(self, role: str, key: str) -> bool:
        return role != "on_input" and self.file.dtype(key).kind in "biu"

    def _fits(self, kind: str, factors: Mapping, shapes: Mapping, layer: tuple[int, ...]) -> bool:
        """Tells whether factors fit a layer; reports them if not."""
        parts = {role: shape for role, shape in shapes.items() if role not in DORA}
        fit = adapter_kinds.fits(kind, parts, layer) and all(
            adapter_kinds.magnitude_shape(role, shape, layer) for role, shape in shapes.items() if role in DORA
        )
        if fit and "on_input" in factors:
            axis = int(np.any(self.file[factors["on_input"]]))
            fit = math.prod(shapes["ia3"]) == layer[axis]
        if not fit:
            described = ", ".join(f"{role} {shape}" for role, shape in shapes.items())
            self._report(MISSHAPEN, f"{next(iter(factors.values()))} (the layer is {layer}, the factors {described})")
        return fit

    def _scale(self, component: str, layer: str, roles: Mapping[str, str], rank: int | None) -> float | None:
        """Returns the factor of a layer's difference; None after reporting that it is not a number."""
        scale = 1.0
        for role in ("alpha", "scalar"):
            if role in roles:
                is_number = math.prod(self.file.shape(roles[role])) == 1
                number = float(self.file[roles[role]].reshape(-1)[0]) if is_number else math.nan
                scale *= number / rank if role == "alpha" and rank else 1.0 if role == "alpha" else number
                if not math.isfinite(number):
                    self._report(NO_ALPHA, roles[role])
                    return None
        options = None if "alpha" in roles else self._peft(component, next(iter(roles.values())))
        if options is not None:
            scale *= options.scale(layer, rank)
        if not math.isfinite(scale):
            self._report(NO_ALPHA, *roles.values())
            return None
        return scale

    def _peft(self, component: str, key: str) -> peft_options.PeftOptions | None:
        place = component, key.startswith(lora_keys.PEFT)
        if place not in self._options:
            self._options[place] = peft_options.options_of(self.file, component, key)
        return self._options[place]

    @property
    def ranks(self) -> list[int]:
        """The distinct ranks of the layers, ascending."""
        return sorted({update.rank for network in self.updates.values() for update in network.values()} - {None})

    @property
    def networks(self) -> dict[str, int]:
        """{network: number of tensors that the file changes}, without networks that it leaves alone."""
        return {component: len(network) for component, network in self.updates.items() if network}

    @property
    def kinds(self) -> dict[str, int]:
        """{kind of adapter: number of tensors}; DoRA counts as a kind of its own."""
        kinds = [
            f"DoRA of {update.kind}" if set(DORA) & set(update.factors) else update.kind
            for network in self.updates.values()
            for update in network.values()
        ]
        return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
