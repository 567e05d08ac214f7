"""What an opened checkpoint is: its networks' configs, and tensors that nobody reads before they are asked for."""

import dataclasses
import functools
import hashlib
import pathlib
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dmm_jax.checkpoints import architecture, naming
from dmm_jax.checkpoints.abstract import abstract_params
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, dtype_of, raw_bytes, shape_of
from dmm_jax.runtime.storage import Location
from dmm_jax.text import vocabulary

if TYPE_CHECKING:
    from dmm_jax.checkpoints.formats.lora import Lora


class Place(NamedTuple):
    """Where a tensor lies: all of one in a file, or a third of its rows (OpenCLIP stacks q, k and v), or transposed."""

    file: TensorFile
    name: str
    third: int | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape, found without reading it."""
        shape = self.file.shape(self.name)
        if self.third is not None and shape and shape[0] % 3 == 0:  # Else it is misshapen, and is to be told as it is.
            shape = (shape[0] // 3, *shape[1:])
        return shape[::-1] if self.transposed else shape

    @property
    def dtype(self) -> np.dtype:
        """The tensor's dtype, found without reading it."""
        return self.file.dtype(self.name)

    def read(self) -> np.ndarray:
        """Returns the tensor: a view of the memory-mapped file."""
        array = self.file[self.name]
        if self.third is not None:
            rows = len(array) // 3
            array = array[self.third * rows : (self.third + 1) * rows]
        return array.T if self.transposed else array


class Mended(Mapping):
    """A state dict of whose spare tensors, which condition nothing, values that are not finite read as 0."""

    def __init__(self, tensors: Mapping, spare: tuple[str, ...], where: str):
        """Takes a state dict and how the spare keys begin; `where` says in warnings what it is."""
        self._tensors, self._spare, self._where = tensors, spare, where
        self.computed = getattr(tensors, "computed", ())

    def shape(self, key: str) -> tuple[int, ...]:
        """Returns a tensor's shape without reading it."""
        return shape_of(self._tensors, key)

    def dtype(self, key: str) -> np.dtype:
        """Returns a tensor's dtype without reading it."""
        return dtype_of(self._tensors, key)

    def __getitem__(self, key: str) -> np.ndarray:
        array = self._tensors[key]
        if not is_spare(key, self._spare) or naming.is_finite(array):
            return array
        warnings.warn(f"{self._where}: NaN or infinity in {key}, which conditions nothing, reads as 0.", stacklevel=2)
        return np.where(np.isfinite(array), array, np.zeros((), array.dtype))

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def is_spare(key: str, spare: tuple[str, ...]) -> bool:
    """Tells whether a tensor is one of those that `Checkpoint.spare` describes."""
    return key.removeprefix("text_model.").startswith(spare) if spare else False


@dataclasses.dataclass(frozen=True)
class Component:
    """One network of a checkpoint: its config.json and its tensors under diffusers' keys."""

    config: dict
    load: Callable[[], Mapping]  # The tensors; only a workdir's need to be read at once.

    @classmethod
    def unreadable(cls, config: dict, error: Exception) -> "Component":
        """Returns a network that raises `error` when somebody asks for its tensors, and not before."""

        def load():
            raise error

        return cls(config, load)

    @functools.cached_property
    def tensors(self) -> Mapping:
        """The tensors."""
        return self.load()


def abstract(component: str, config: Mapping, path: Location) -> dict:
    """Returns the parameters that a config asks for, as shapes; raises CheckpointError where none can be built."""
    try:
        return abstract_params(component, config)
    except (ValueError, TypeError, ArithmeticError) as error:
        said = naming.printable(str(error), 500)
        raise CheckpointError(f"{component} of {path} cannot be built from its config: {said}") from error


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What `open_checkpoint` found."""

    path: Location
    kind: str  # "diffusers", "dmm", "single-file" or "workdir".
    components: Mapping[str, Component]
    scheduler_config: dict
    tokenizer_folder: pathlib.Path | None
    styles: tuple[str, ...] | None  # Names of the style table's rows; None for a stock checkpoint.
    unused: Sequence[str] = ()  # Keys of the file that belong to none of the networks.
    unsupported: str = ""  # Why nothing but `inspect` can use this checkpoint.
    files: Sequence[pathlib.Path] = ()  # That hold the tensors.
    tokenizer_2_folder: pathlib.Path | None = None  # Of the second text encoder.
    license: str = ""  # That it states; "" where it states none.
    borrowed: Sequence[str] = ()  # Networks that it lacks and its base lent.
    loras: Sequence["Lora"] = ()  # Folded into its tensors; `path` is then the whole text, and
    root: pathlib.Path | None = None  # the path of what they are folded into.
    called: str = ""  # Its name, where its path does not tell it.
    stated: Collection[str] = ()  # Fields of `scheduler_config` that it says itself, not its family.

    @property
    def name(self) -> str:
        """The file's or folder's name, without its ending."""
        path = (self.root or self.path).absolute()
        folded = (f"{lora.path.stem}*{lora.weight:g}" for lora in self.loras)
        own = self.called or (path.stem if self.kind == "single-file" else path.name)
        return " + ".join([own, *folded])

    @property
    def architecture(self) -> str:
        """The family, by ModelSpec's name: "stable-diffusion-v1" for example."""
        return architecture.architecture(self.unet_config)

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts: "epsilon", "v_prediction", or "unknown" where a single file does not say it."""
        return self.scheduler_config.get("prediction_type", "epsilon")

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The names of the text encoders that this family has, whether they are there or not."""
        return architecture.text_encoders(self.architecture)

    @property
    def tokenizer_folders(self) -> tuple[pathlib.Path, ...]:
        """The folders of the tokenizers, one per text encoder; those that are there."""
        folders = (self.tokenizer_folder, self.tokenizer_2_folder)
        return tuple(folder for folder in folders if folder is not None)

    @property
    def loans(self) -> list[str]:
        """A sentence for each thing that it uses and does not hold: its base's networks, CLIP's own tokenizer."""
        lines = [f"{self.path} holds no {name}: the base's is used." for name in self.borrowed]
        if any(folder.parent == vocabulary.BUNDLED for folder in self.tokenizer_folders):
            lines.append(f"{self.path} holds no tokenizer: CLIP's own is used, which comes with dmm_jax.")
        return lines

    def has(self, component: str) -> bool:
        """Tells whether a network is there."""
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

    def tensors(self, component: str) -> Mapping:
        """Returns a network's tensors under diffusers' keys, as they are stored; where nobody uses them, finite."""
        tensors, spare = self._component(component).tensors, self.spare(component)
        return Mended(tensors, spare, f"{component} of {self.path}") if spare else tensors

    def spare(self, component: str) -> tuple[str, ...]:
        """Returns how the keys begin, `text_model.` left out, of what a network has and its family does not use."""
        if component != "text_encoder" or not self.has("unet") or self.architecture != architecture.SDXL:
            return ()
        layers = self.config(component).get("num_hidden_layers")  # XL is conditioned on the state before the last.
        return (f"encoder.layers.{layers - 1}.", "final_layer_norm.") if type(layers) is int else ()

    def abstract(self, component: str) -> dict:
        """Returns the parameters that a network's config asks for, as shapes.

        Raises:
          CheckpointError: the config asks for what our port does not compute, or makes no sense.
        """
        return abstract(component, self.config(component), self.path)

    def shapes(self, component: str) -> dict[str, tuple[int, ...]]:
        """Returns the shapes that a network's config asks for, by key."""
        return naming.torch_shapes(self.abstract(component))

    def params(self, component: str, dtype=None) -> dict:
        """Returns a network's parameters as host arrays: views of the file, unless `dtype` asks for another.

        Raises:
          CheckpointError: keys are missing, unexpected or misshapen, or a tensor holds NaN or infinity; all are named.
        """
        where = f"{component} of {self.path}"
        return naming.from_torch(self.abstract(component), self.tensors(component), dtype, where)

    def text_params(self, base: "Checkpoint | None" = None) -> dict:
        """Returns the text encoders' parameters by name; those that are not there are `base`'s."""
        return {name: self.lent(name, base).params(name) for name in self.text_encoders}

    def text_digest(self, base: "Checkpoint | None" = None) -> str:
        """Returns a hash of the text encoders' contents; of those that are not there, of `base`'s."""
        return " ".join(self.lent(name, base).digest(name) for name in self.text_encoders)

    def lent(self, component: str, base: "Checkpoint | None") -> "Checkpoint":
        """Returns the checkpoint that a network comes from: this one, or `base` where it is not here."""
        return self if self.has(component) or base is None else base

    @functools.cache  # noqa: B019  (one entry a network; a checkpoint lives as long as the program)
    def digest(self, component: str) -> str:
        """Returns the SHA-256 of a network's contents: keys, dtypes and values, wherever in the file they lie."""
        tensors = self._component(component).tensors
        names, digest = naming.spellings(tensors), hashlib.sha256()
        for key in sorted(names):
            array = tensors[names[key]]
            digest.update(f"{key} {array.dtype} {array.size}\n".encode())
            digest.update(raw_bytes(array))
        return digest.hexdigest()

    def __hash__(self):
        return id(self)
