"""An opened checkpoint: the configs of its networks, and tensors that are read only when somebody asks for them."""

import dataclasses
import functools
import hashlib
import pathlib
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dmm_jax.checkpoints import architecture, naming
from dmm_jax.checkpoints.abstract import abstract_params
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, dtype_of, raw_bytes, shape_of
from dmm_jax.runtime.storage import Location
from dmm_jax.text import vocabulary
from dmm_jax.text.tokenizer import Tokenizers


class Place(NamedTuple):
    """The place of a tensor: a tensor of a file, a third of its rows (OpenCLIP stacks q, k, v), or its transpose."""

    file: TensorFile
    name: str
    third: int | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape, from the file's header."""
        shape = self.file.shape(self.name)
        if self.third is not None and shape and shape[0] % 3 == 0:  # A misshapen stack keeps its shape, to be reported.
            shape = (shape[0] // 3, *shape[1:])
        return shape[::-1] if self.transposed else shape

    @property
    def dtype(self) -> np.dtype:
        """The tensor's dtype, from the file's header."""
        return self.file.dtype(self.name)

    @property
    def computed(self) -> bool:
        """Whether reading computes the tensor, as for float8."""
        return self.file.is_computed(self.name)

    def read(self) -> np.ndarray:
        """Returns the tensor: a view of the memory-mapped file, if it is not `computed`."""
        array = self.file[self.name]
        if self.third is not None:
            rows = len(array) // 3
            array = array[self.third * rows : (self.third + 1) * rows]
        return array.T if self.transposed else array


class ZeroedTensors(Mapping):
    """A state dict in which NaN and infinity read as 0 in tensors that condition nothing; the rest is unchanged."""

    def __init__(self, tensors: Mapping, unused_prefixes: tuple[str, ...], name: str):
        """Takes a state dict, the prefixes of the keys that condition nothing, and the network's name for warnings."""
        self._tensors, self._unused_prefixes, self._name = tensors, unused_prefixes, name
        self.computed = getattr(tensors, "computed", ())

    def shape(self, key: str) -> tuple[int, ...]:
        """Returns a tensor's shape without reading it."""
        return shape_of(self._tensors, key)

    def dtype(self, key: str) -> np.dtype:
        """Returns a tensor's dtype without reading it."""
        return dtype_of(self._tensors, key)

    def __getitem__(self, key: str) -> np.ndarray:
        array = self._tensors[key]
        if not is_unused(key, self._unused_prefixes) or naming.is_finite(array):
            return array
        warnings.warn(f"{self._name}: NaN or infinity in {key}, which conditions nothing, reads as 0.", stacklevel=2)
        return np.where(np.isfinite(array), array, np.zeros((), array.dtype))

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def is_unused(key: str, unused_prefixes: tuple[str, ...]) -> bool:
    """Tells whether a key begins with one of `Checkpoint.unused_prefixes`."""
    return key.removeprefix("text_model.").startswith(unused_prefixes) if unused_prefixes else False


@dataclasses.dataclass(frozen=True)
class Component:
    """One network of a checkpoint: its config.json and its tensors under diffusers' keys."""

    config: dict
    load: Callable[[], Mapping]  # Returns the tensors. Only a training run reads them all at once.
    path: Location | None = None  # Where the network was read, if it is not the checkpoint's own.

    @classmethod
    def unreadable(cls, config: dict, error: Exception) -> "Component":
        """Returns a network that raises `error` when somebody asks for its tensors, and not before."""

        def load():
            raise error

        return cls(config, load)

    @functools.cached_property
    def tensors(self) -> Mapping:
        """The state dict."""
        return self.load()


class FoldedLora(NamedTuple):
    """The facts about an adapter file that is folded into a checkpoint."""

    path: pathlib.Path
    weight: float
    ranks: Sequence[int]  # The distinct ranks of its layers, ascending.
    networks: Mapping[str, int]  # {network: number of tensors that the file changes}
    kinds: Mapping[str, int]  # {kind of adapter, such as "LoRA" or "DoRA of LoHa": number of tensors}


def build_abstract(component: str, config: Mapping, path: Location) -> dict:
    """Returns the shapes of a network's parameters, as nested ShapeDtypeStructs.

    Raises:
      CheckpointError: no network can be built from this config; names `path`.
    """
    try:
        return abstract_params(component, config)
    except (ValueError, TypeError, ArithmeticError) as error:
        reason = naming.printable(str(error), 500)
        raise CheckpointError(f"{component} of {path} cannot be built from its config: {reason}") from error


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint, as `open_checkpoint` returns it. Its files are memory-mapped; no weights are read yet."""

    path: Location
    kind: str  # "diffusers", "dmm", "single-file", "workdir" (a training run) or "published" (no tensors).
    components: Mapping[str, Component]
    scheduler_config: dict
    tokenizer_folder: pathlib.Path | None
    styles: tuple[str, ...] | None  # Names of the style table's rows; None for a stock checkpoint.
    unused: Sequence[str] = ()  # Keys of the file that belong to none of the networks.
    unsupported: str = ""  # Why nothing but `inspect` can use this checkpoint; "" if it can be used.
    files: Sequence[pathlib.Path] = ()  # The files that hold the tensors.
    tokenizer_2_folder: pathlib.Path | None = None  # The tokenizer of the second text encoder.
    license: str = ""  # The licence that it states; "" if it states none.
    from_base: Sequence[str] = ()  # Networks that this checkpoint lacks and takes from its base.
    loras: Sequence[FoldedLora] = ()  # The LoRAs that are folded in; `path` is then the text that the user wrote.
    unfolded_path: pathlib.Path | None = None  # With LoRAs, the path of the checkpoint that they are folded into.
    hub_name: str = ""  # The name of its repository, if it was fetched from a hub.
    clip_skip: int = 1  # The layer of the text encoder that conditions, from its end; `clip_skip.with_clip_skip`.
    explicit_fields: Collection[str] = ()  # Fields of `scheduler_config` that its files state; the rest are defaults.
    # Whether XL's missing prompt is zeros or "", diffusers' `force_zeros_for_empty_prompt`; None: not stated, so zeros.
    zeros_for_no_prompt: bool | None = None
    # Returns {key of the UNet: (up, down)}, the factors by which the UNet differs from its base's; None if unknown.
    factors: Callable[[], Mapping[str, tuple[np.ndarray, np.ndarray]]] | None = None

    @property
    def root(self) -> Location:
        """The file or folder itself, without the LoRAs that are folded in."""
        return self.unfolded_path or self.path

    @property
    def name(self) -> str:
        """The name of the file (without its suffix), folder or repository, with the LoRAs that are folded in."""
        path = self.root.absolute()
        name = self.hub_name or (path.stem if self.kind == "single-file" else path.name)
        return " + ".join([name, *(f"{lora.path.stem}*{lora.weight:g}" for lora in self.loras)])

    @property
    def architecture(self) -> str:
        """The family, by ModelSpec's name: "stable-diffusion-v1" for example."""
        return architecture.architecture(self.unet_config)

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts: "epsilon", "v_prediction", or "unknown" if a single file does not state it."""
        return self.scheduler_config.get("prediction_type", "epsilon")

    def predicting(self, prediction_type: str) -> "Checkpoint":
        """Returns this checkpoint with a UNet that predicts "epsilon" or "v_prediction"; "" changes nothing."""
        if prediction_type in ("", self.prediction_type):
            return self
        return dataclasses.replace(self, scheduler_config=self.scheduler_config | {"prediction_type": prediction_type})

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The names of the text encoders of this family, whether this checkpoint holds them or not."""
        return architecture.text_encoders(self.architecture)

    @property
    def tokenizer_folders(self) -> tuple[pathlib.Path, ...]:
        """The folders of the tokenizers, in the order of the text encoders; missing ones are left out."""
        folders = (self.tokenizer_folder, self.tokenizer_2_folder)
        return tuple(folder for folder in folders if folder is not None)

    def tokenizers(self) -> Tokenizers:
        """Reads the tokenizers; raises UserError if there is none or one cannot be read."""
        return Tokenizers.from_folders(self.tokenizer_folders, self.zeros_for_no_prompt is not False)

    def schedule_beside(self, base: "Checkpoint") -> dict:
        """Returns the scheduler config of this checkpoint next to a base: a single file states only flags of it."""
        if self.kind != "single-file":
            return self.scheduler_config
        return base.scheduler_config | {field: self.scheduler_config[field] for field in self.explicit_fields}

    def prediction_beside(self, base: "Checkpoint") -> str:
        """Returns what this checkpoint's UNet predicts, next to a base: "epsilon", "v_prediction" or "unknown"."""
        return self.schedule_beside(base).get("prediction_type", "epsilon")

    @property
    def fallbacks(self) -> list[str]:
        """One sentence for each part that this checkpoint lacks and takes from its base or from this package."""
        lines = [f"{self.path} holds no {name}: the base's is used." for name in self.from_base]
        if any(folder.parent == vocabulary.BUNDLED for folder in self.tokenizer_folders):
            lines.append(f"{self.path} holds no tokenizer: CLIP's own is used, which comes with dmm_jax.")
        return lines

    def assumptions(self, base: "Checkpoint") -> list[str]:
        """One sentence for each thing that a teacher does not state, or states otherwise, and that its base decides."""
        lines, prediction_type = [], self.prediction_beside(base)
        if prediction_type != self.prediction_type:
            lines.append(f"{self.path} does not state what it predicts: {prediction_type} is used, as for the base.")
        if self.zeros_for_no_prompt not in (None, base.zeros_for_no_prompt is not False):
            lines.append(f"{self.path} and the base differ in force_zeros_for_empty_prompt: the base's is used.")
        return lines

    def has(self, component: str) -> bool:
        """Tells whether the checkpoint holds a network."""
        return component in self.components

    def _component(self, component) -> Component:
        if component not in self.components:
            raise CheckpointError(
                f"{self.path} holds no {component} (it has: {', '.join(self.components) or 'nothing that we know'}). "
                "Give the checkpoint that it belongs to as the base."
            )
        return self.components[component]

    def config(self, component: str) -> dict:
        """Returns a network's config.json."""
        return self._component(component).config

    unet_config = property(lambda self: self.config("unet"))
    vae_config = property(lambda self: self.config("vae"))

    @property
    def text_configs(self) -> dict[str, dict]:
        """The text encoders' config.json, by name."""
        return {name: self.config(name) for name in self.text_encoders}

    def where(self, component: str) -> str:
        """Returns the name of a network in errors, with the path from which it was read."""
        return f"{component} of {self._source(component)}"

    def _source(self, component) -> Location:
        return self._component(component).path or self.path

    def tensors(self, component: str) -> Mapping:
        """Returns a network's state dict under diffusers' keys, as stored; unused tensors are made finite."""
        tensors, unused = self._component(component).tensors, self.unused_prefixes(component)
        return ZeroedTensors(tensors, unused, self.where(component)) if unused else tensors

    def unused_prefixes(self, component: str) -> tuple[str, ...]:
        """Returns the prefixes of the keys, without `text_model.`, that a network holds and its family never uses."""
        if component != "text_encoder" or not self.has("unet") or self.architecture != architecture.SDXL:
            return ()
        layers = self.config(component).get("num_hidden_layers")  # XL is conditioned on the state before the last.
        return (f"encoder.layers.{layers - 1}.", "final_layer_norm.") if type(layers) is int else ()

    def abstract(self, component: str) -> dict:
        """Returns the shapes of a network's parameters, from its config.

        Raises:
          CheckpointError: the config asks for something that our networks do not compute, or makes no sense.
        """
        return build_abstract(component, self.config(component), self._source(component))

    def shapes(self, component: str) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of a network's state dict by key, from its config."""
        return naming.torch_shapes(self.abstract(component))

    def params(self, component: str, dtype=None) -> dict:
        """Returns a network's parameters as host arrays: views of the file, unless `dtype` asks for another.

        Raises:
          CheckpointError: keys are missing, unexpected or misshapen, or a tensor holds NaN or infinity; names them all.
        """
        return naming.from_torch(self.abstract(component), self.tensors(component), dtype, self.where(component))

    def text_params(self, base: "Checkpoint | None" = None) -> dict:
        """Returns the text encoders' parameters by name; `base` provides those that are missing."""
        return {name: self.provider(name, base).params(name) for name in self.text_encoders}

    def text_digest(self, base: "Checkpoint | None" = None) -> str:
        """Returns a hash of the text encoders' contents; `base` provides those that are missing."""
        return " ".join(self.provider(name, base).digest(name) for name in self.text_encoders)

    def provider(self, component: str, base: "Checkpoint | None") -> "Checkpoint":
        """Returns the checkpoint that provides a network: this one, or `base` if this one does not hold it."""
        return self if self.has(component) or base is None else base

    @functools.cache  # noqa: B019  (one entry per network; a checkpoint lives as long as the program)
    def digest(self, component: str) -> str:
        """Returns the SHA-256 of a network's contents: keys, dtypes and values, whatever the file format."""
        tensors = self._component(component).tensors
        names, digest = naming.spellings(tensors), hashlib.sha256()
        for key in sorted(names):
            array = tensors[names[key]]
            digest.update(f"{key} {array.dtype} {array.size}\n".encode())
            digest.update(raw_bytes(array))
        return digest.hexdigest()

    def __hash__(self):
        return id(self)
