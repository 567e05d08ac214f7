"""What an opened checkpoint is: its networks' configs, and tensors that nobody reads before they are asked for."""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dmm_jax.checkpoints import architecture, naming
from dmm_jax.checkpoints.abstract import abstract_params
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.safetensors_io import TensorFile, raw_bytes


class Tensors(Mapping):
    """A state dict whose tensors lie in one or several files, under our keys; each is read when it is asked for."""

    def __init__(self, places: Mapping[str, tuple[TensorFile, str]]):
        """Takes {key: (file, key in the file)}."""
        self._places = dict(places)

    def shape(self, key: str) -> tuple[int, ...]:
        """Returns a tensor's shape without reading it."""
        file, name = self._places[key]
        return file.shape(name)

    def dtype(self, key: str) -> np.dtype:
        """Returns a tensor's dtype without reading it."""
        file, name = self._places[key]
        return file.dtype(name)

    def __getitem__(self, key: str) -> np.ndarray:
        file, name = self._places[key]
        return file[name]

    def __iter__(self):
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


@dataclasses.dataclass(frozen=True)
class Component:
    """One network of a checkpoint: its config.json and its tensors under diffusers' keys."""

    config: dict
    load: Callable[[], Mapping]  # The tensors; only a workdir's need to be read at once.

    @functools.cached_property
    def tensors(self) -> Mapping:
        """The tensors."""
        return self.load()


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What `open_checkpoint` found."""

    path: pathlib.Path
    kind: str  # "diffusers", "dmm", "single-file" or "workdir".
    components: Mapping[str, Component]
    scheduler_config: dict
    tokenizer_folder: pathlib.Path | None
    styles: tuple[str, ...] | None  # Names of the style table's rows; None for a stock checkpoint.
    unused: Sequence[str] = ()  # Keys of the file that belong to none of the networks.
    unsupported: str = ""  # Why nothing but `inspect` can use this checkpoint.
    files: Sequence[pathlib.Path] = ()  # That hold the tensors.

    @property
    def name(self) -> str:
        """The file's or folder's name, without its ending."""
        return self.path.absolute().stem if self.kind == "single-file" else self.path.absolute().name

    @property
    def architecture(self) -> str:
        """The family, by ModelSpec's name: "stable-diffusion-v1" for example."""
        return architecture.architecture(self.unet_config)

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts: "epsilon", "v_prediction", or "unknown" where a single file does not say it."""
        return self.scheduler_config.get("prediction_type", "epsilon")

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
    text_config = property(lambda self: self.config("text_encoder"))

    def tensors(self, component: str) -> Mapping:
        """Returns a network's tensors under diffusers' keys, as they are stored."""
        return self._component(component).tensors

    def abstract(self, component: str) -> dict:
        """Returns the parameters that a network's config asks for, as shapes.

        Raises:
          CheckpointError: the config asks for what our port does not compute, or makes no sense.
        """
        config = self.config(component)
        try:
            return abstract_params(component, config)
        except (ValueError, TypeError, ArithmeticError) as error:
            said = naming.printable(str(error), 500)
            raise CheckpointError(f"{component} of {self.path} cannot be built from its config: {said}") from error

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

    @functools.cache  # noqa: B019  (one entry a network; a checkpoint lives as long as the program)
    def digest(self, component: str) -> str:
        """Returns the SHA-256 of a network's contents: keys, dtypes and values, wherever in the file they lie."""
        tensors = self.tensors(component)
        names, digest = naming.spellings(tensors), hashlib.sha256()
        for key in sorted(names):
            array = tensors[names[key]]
            digest.update(f"{key} {array.dtype} {array.size}\n".encode())
            digest.update(raw_bytes(array))
        return digest.hexdigest()

    def __hash__(self):
        return id(self)
