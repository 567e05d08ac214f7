"""Opening checkpoints as people have them: diffusers folders, DMM folders, single files, and our own workdirs.

Opening reads headers and configs only; a network's tensors are memory-mapped views until somebody asks for them.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping

import numpy as np
from flax import nnx

from dmm_jax.checkpoints import naming, single_file
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.safetensors_io import PICKLES, TensorFile, refuse_pickle
from dmm_jax.models.autoencoder_kl import AutoencoderKL
from dmm_jax.models.clip_text import CLIPTextModel
from dmm_jax.models.unet_2d_condition import UNet2DConditionModel, merged_config

COMPONENTS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
MAX_JSON_BYTES = 50_000_000
STYLES_KEY = "dmm_jax.styles"  # In a file's metadata: the names of the style table's rows, as JSON.
MERGED = ("model_merge", "model_merge_xl")
SD1_SCHEDULER = {
    "_class_name": "PNDMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "steps_offset": 1, "set_alpha_to_one": False, "skip_prk_steps": True,
    "clip_sample": False, "prediction_type": "epsilon",
}  # fmt: skip


class Tensors(Mapping):
    """A state dict whose tensors lie in one or several files, under our keys; nothing is read before it is asked for."""

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

    @property
    def name(self) -> str:
        """The file's or folder's name, without its ending."""
        return self.path.absolute().stem if self.kind == "single-file" else self.path.absolute().name

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts: "epsilon" or "v_prediction"."""
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

    def shapes(self, component: str) -> dict[str, tuple[int, ...]]:
        """Returns the shapes that a network's config asks for, by key."""
        return naming.torch_shapes(abstract_params(component, self.config(component)))

    def params(self, component: str, dtype=None) -> dict:
        """Returns a network's parameters as host arrays: views of the file, unless `dtype` asks for another.

        Raises:
          CheckpointError: keys are missing, unexpected or misshapen, or a tensor holds NaN or infinity; all are named.
        """
        found = self._component(component)
        where = f"{component} of {self.path}"
        return naming.from_torch(abstract_params(component, found.config), found.tensors, dtype, where)

    @functools.lru_cache(maxsize=None)  # noqa: B019  (one entry a network; a checkpoint lives as long as the program)
    def digest(self, component: str) -> str:
        """Returns the SHA-256 of a network's contents: keys, dtypes and values, wherever in the file they lie."""
        tensors = self._component(component).tensors
        names, digest = naming.spellings(tensors), hashlib.sha256()
        for key in sorted(names):
            array = np.ascontiguousarray(tensors[names[key]])
            digest.update(f"{key} {array.dtype} {array.size}\n".encode())
            if array.size:
                digest.update(array.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def __hash__(self):
        return id(self)


def abstract_params(component: str, config: Mapping) -> dict:
    """Returns the shapes of a network's parameters, from its config; nothing is allocated."""
    return _abstract_params(component, json.dumps(dict(config), sort_keys=True))


@functools.lru_cache(maxsize=32)
def _abstract_params(component, config):
    build = COMPONENTS[component].from_config
    model = nnx.eval_shape(lambda: build(json.loads(config), rngs=nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def open_checkpoint(path: str | pathlib.Path, base: str | pathlib.Path | None = None) -> Checkpoint:
    """Opens a checkpoint; nothing is fetched, and no weights are read.

    Args:
      path: a diffusers or DMM folder, a .safetensors single file, or the workdir of a training run.
      base: another checkpoint, for the networks, tokenizer and sizes that `path` lacks.

    Raises:
      CheckpointError: it is not there, damaged, a pickle, or of an unknown kind.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}. Give a diffusers folder or a .safetensors file.")
    if path.is_file():
        checkpoint = _open_single_file(path)
    elif (path / "model_index.json").is_file():
        checkpoint = _open_folder(path)
    elif (path / "config.json").is_file() and (path / "checkpoints").is_dir():
        checkpoint = _open_workdir(path)
    else:
        raise CheckpointError(
            f"{path} is no checkpoint: it holds neither model_index.json (a diffusers folder) nor a training run's "
            "config.json and checkpoints/. Give the folder that holds unet/, vae/, text_encoder/."
        )
    return checkpoint if base is None else _completed(checkpoint, open_checkpoint(base))


def _completed(checkpoint: Checkpoint, base: Checkpoint) -> Checkpoint:
    """Takes what is missing from the base; equal architectures also take its sizes, which no tensor tells."""
    components = {**base.components, **checkpoint.components}
    if checkpoint.kind == "single-file" and checkpoint.has("unet") and base.has("unet"):
        if checkpoint.shapes("unet") == base.shapes("unet"):
            components["unet"] = Component(dict(base.unet_config), checkpoint.components["unet"].load)
    return dataclasses.replace(
        checkpoint,
        components=components,
        tokenizer_folder=checkpoint.tokenizer_folder or base.tokenizer_folder,
        scheduler_config=checkpoint.scheduler_config if checkpoint.kind != "single-file" else base.scheduler_config
        | {key: checkpoint.scheduler_config[key] for key in ("prediction_type",)},
    )  # fmt: skip


def read_json(path: pathlib.Path) -> dict:
    """Reads a JSON object of bounded size; raises CheckpointError where there is none."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_JSON_BYTES} bytes: no config of ours.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read as JSON ({str(error)[:200]}). Fetch the checkpoint again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is no JSON object. Fetch the checkpoint again.")
    return value


def _open_folder(path: pathlib.Path) -> Checkpoint:
    index = read_json(path / "model_index.json")
    components, metadata = {}, {}
    for component in COMPONENTS:
        folder = path / component
        if (folder / "config.json").is_file():
            files = weight_files(folder, WEIGHTS[component])
            places = {key: (file, key) for file in files for key in file}
            components[component] = Component(read_json(folder / "config.json"), functools.partial(Tensors, places))
            metadata |= files[0].metadata if component == "unet" else {}
    if "unet" not in components:
        raise CheckpointError(f"{path} holds no unet/config.json: it is no Stable Diffusion checkpoint.")
    merged = components["unet"].config.get("addition_embed_type") in MERGED
    scheduler = path / "scheduler" / "scheduler_config.json"
    tokenizer = path / "tokenizer"
    return Checkpoint(
        path=path,
        kind="dmm" if merged or index.get("_class_name") == "StableDiffusionDMMPipeline" else "diffusers",
        components=components,
        scheduler_config=read_json(scheduler) if scheduler.is_file() else dict(SD1_SCHEDULER),
        tokenizer_folder=tokenizer if (tokenizer / "vocab.json").is_file() else None,
        styles=_style_names(path, components["unet"].config, metadata) if merged else None,
    )


def _style_names(path, config, metadata):
    number = config.get("num_models")
    if not isinstance(number, int) or number < 1:
        raise CheckpointError(f"{path}: unet/config.json has num_models={number!r}; expected the number of styles.")
    if STYLES_KEY not in metadata:
        return tuple(f"style_{row}" for row in range(number))
    try:
        names = json.loads(metadata[STYLES_KEY])
        if len(names) != number or not all(isinstance(name, str) for name in names):
            raise ValueError(f"expected {number} names")
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: the metadata {STYLES_KEY!r} names no styles ({error}).") from None
    return tuple(naming.printable(name) for name in names)


def weight_files(folder: pathlib.Path, stem: str) -> list[TensorFile]:
    """Finds a network's weights in a diffusers folder: one file, its fp16 variant, or the parts that an index lists.

    Raises:
      CheckpointError: there are none, only pickles, or an index that points outside the folder.
    """
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if (folder / name).is_file():
            return [TensorFile(folder / name)]
    names = (f"{stem}.safetensors.index.json", f"{stem}.safetensors.index.fp16.json", f"{stem}.fp16.safetensors.index.json")
    for name in names:
        if (folder / name).is_file():
            return _parts(folder, read_json(folder / name), name)
    for pickle in sorted(path for path in folder.iterdir() if path.suffix in PICKLES):
        refuse_pickle(pickle)
    raise CheckpointError(f"{folder} holds no {stem}.safetensors, no fp16 variant and no index of parts. Fetch the weights.")


def _parts(folder, index, name):
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(part, str) for part in weight_map.values()):
        raise CheckpointError(f"{folder / name} has no weight_map of keys to file names.")
    parts = sorted(set(weight_map.values()))
    for part in parts:
        if pathlib.PurePath(part).name != part or "\\" in part or part in ("", ".", ".."):
            raise CheckpointError(f"{folder / name} points to {naming.printable(part)!r}; parts must lie beside it.")
    files = [TensorFile(folder / part) for part in parts]
    held = {key for file in files for key in file}
    if held != set(weight_map):
        lost = sorted(held ^ set(weight_map))
        raise CheckpointError(f"{folder / name} and its parts do not list the same tensors: {naming.listed(lost)}.")
    return files


def _open_single_file(path: pathlib.Path) -> Checkpoint:
    file = TensorFile(path)
    components = {}
    for component in COMPONENTS:
        prefix = single_file.prefix_of(component, file)
        if prefix is not None:
            components[component] = _single_component(path, file, component, prefix)
    if not components:
        raise CheckpointError(
            f"{path} is no Stable Diffusion checkpoint: no key begins with {single_file.UNET!r}. Its first keys: "
            f"{naming.listed(list(file)[:5])}."
        )
    scheduler = dict(SD1_SCHEDULER)
    said = file.metadata.get("modelspec.prediction_type") or file.metadata.get("modelspec.predict_key") or ""
    if "v_pred" in file or said.lower() in ("v", "v_prediction"):
        scheduler["prediction_type"] = "v_prediction"
    if "ztsnr" in file:
        scheduler["rescale_betas_zero_snr"] = True
    return Checkpoint(path, "single-file", components, scheduler, None, None)


def _single_component(path, file, component, prefix):
    held = {key.removeprefix(prefix): key for key in file if key.startswith(prefix)}
    config = single_file.CONFIGS[component]({key: file.shape(name) for key, name in held.items()}, str(path))
    if component == "unet":
        config |= _sample_size(file.metadata, 2 ** (len(config["block_out_channels"]) - 1))

    def load():
        if component == "text_encoder":
            return Tensors({key: (file, name) for key, name in held.items()})
        ours = {single_file.KEYS[component](key, config): key for key in naming.torch_shapes(abstract_params(component, config))}
        return Tensors({ours.get(key, key): (file, name) for key, name in held.items()})

    return Component(config, load)


def _sample_size(metadata, default_cells):
    """Reads ModelSpec's resolution, "512x512"; the VAEs of all these models make cells of 8 pixels."""
    width, _, height = metadata.get("modelspec.resolution", "").partition("x")
    return {"sample_size": int(width) // 8} if width.isdecimal() and width == height and len(width) < 6 else {}


def _open_workdir(path: pathlib.Path) -> Checkpoint:
    from dmm_jax import config as config_lib
    from dmm_jax.checkpoints.states import restore_student

    config = config_lib.load(path)
    base = open_checkpoint(config.base)
    names = tuple(name for name, _ in config.teachers)
    unet = merged_config(base.unet_config, len(names))

    def load():
        return naming.to_torch(restore_student(path, abstract_params("unet", unet)))

    components = {**base.components, "unet": Component(unet, load)}
    return Checkpoint(path, "workdir", components, base.scheduler_config, base.tokenizer_folder, names)
