"""diffusers folders, stock or DMM's: reads their JSON and finds their weights (one file, a variant, or parts)."""

import functools
import glob
import json
import pathlib
from collections.abc import Mapping

from dmm_jax.checkpoints import licenses, naming
from dmm_jax.checkpoints.abstract import COMPONENTS
from dmm_jax.checkpoints.architecture import MERGED, NO_REFINER, SDXL, architecture, check_plain, scheduler_config
from dmm_jax.checkpoints.checkpoint import Checkpoint, Component, Place
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats.safetensors_io import PICKLES, TensorFile, Tensors, refuse_other_formats, refuse_pickle
from dmm_jax.checkpoints.formats.stock_corrections import corrected_scheduler, corrected_unet
from dmm_jax.runtime.errors import UserError
from dmm_jax.text.vocabulary import has_tokenizer

WEIGHTS = {
    "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model",
    "text_encoder_2": "model",
}  # fmt: skip
STYLES_KEY = "dmm_jax.config.styles"  # Metadata of the UNet's file: the names of the style table's rows, as JSON.
# Names of the same weights in several precisions. Others ("ema", "non_ema") are other weights: the user chooses.
VARIANTS = ("", ".fp32", ".fp16", ".bf16")
MAX_STYLES = 10_000
EMPTY_PROMPT = "force_zeros_for_empty_prompt"  # A field of model_index.json.
MAX_JSON_BYTES = 50_000_000


def open_folder(path: pathlib.Path) -> Checkpoint:
    """Opens a folder with a model_index.json; reads configs and headers only.

    Raises:
      CheckpointError: a file cannot be read, or the folder has no UNet that can be merged; names the file.
    """
    index = read_json(path / "model_index.json")
    components, files, metadata = {}, [], {}
    for component in COMPONENTS:
        folder = path / component
        if (folder / "config.json").is_file():
            config = read_json(folder / "config.json")
            try:
                parts = weight_files(folder, WEIGHTS[component])
            except CheckpointError as error:
                if component != "vae":
                    raise
                components[component] = Component.unreadable(config, error)  # A teacher's VAE is never used.
                continue
            places = {key: Place(file, key) for file in parts for key in file}
            components[component] = Component(config, functools.partial(Tensors, places))
            metadata |= parts[0].metadata if component == "unet" else {}
            files += [file.path for file in parts]
    if "unet" not in components:
        raise CheckpointError(f"{path} holds no unet/config.json: it is not a Stable Diffusion checkpoint.")
    unet = components["unet"].config
    check_plain(unet.get("in_channels", 4), str(path))
    family = architecture(unet)
    components["unet"] = Component(corrected_unet(unet, family), components["unet"].load)
    merged = unet.get("addition_embed_type") in MERGED
    scheduler = path / "scheduler" / "scheduler_config.json"
    stated = read_json(scheduler) if scheduler.is_file() else None
    if stated and not isinstance(prediction := stated.get("prediction_type", ""), str):
        raise CheckpointError(
            f"{scheduler} has prediction_type {prediction!r:.100}; expected epsilon or v_prediction. Correct it, or "
            "fetch the checkpoint again."
        )
    tokenizers = {name: path / name.removesuffix("_folder") for name in ("tokenizer_folder", "tokenizer_2_folder")}
    return Checkpoint(
        path=path,
        kind="dmm" if merged or index.get("_class_name") == "StableDiffusionDMMPipeline" else "diffusers",
        components=components,
        scheduler_config=corrected_scheduler(scheduler_config(family) if stated is None else stated, family),
        **{name: folder if has_tokenizer(folder) else None for name, folder in tokenizers.items()},
        styles=_style_names(path, unet, metadata) if merged else None,
        files=tuple(files),
        license=licenses.stated(metadata, path),
        explicit_fields=frozenset(stated or ()),
        unsupported=NO_REFINER if index.get("requires_aesthetics_score") or _is_refiner(components) else "",
        zeros_for_no_prompt=bool(index[EMPTY_PROMPT]) if EMPTY_PROMPT in index else None,
    )


def _is_refiner(components: Mapping[str, Component]) -> bool:
    """Tells whether a UNet of XL is conditioned on the second text encoder alone."""
    has_first, has_second = (name in components for name in ("text_encoder", "text_encoder_2"))
    return architecture(components["unet"].config) == SDXL and has_second and not has_first


def read_json(path: pathlib.Path) -> dict:
    """Reads a JSON object; raises CheckpointError if the file is missing, too large or not a JSON object."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_JSON_BYTES} bytes, which is too large for a config.")
        raw = path.read_bytes()
        if not raw.lstrip().startswith((b"{", b"[")):
            refuse_other_formats(path, raw[:64])
        value = json.loads(raw.decode("utf-8"))
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        reason = naming.printable(str(error))
        raise CheckpointError(f"{path} cannot be read as JSON ({reason}). Fetch the checkpoint again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object. Fetch the checkpoint again.")
    return value


def _style_names(path: pathlib.Path, config: Mapping, metadata: Mapping) -> tuple[str, ...]:
    """Returns the names of a DMM folder's styles: those in the metadata, or else style_0, style_1, ..."""
    number = config.get("num_models")
    if type(number) is not int or not 1 <= number <= MAX_STYLES:
        raise CheckpointError(
            f"{path}: unet/config.json has num_models={number!r}; expected the number of styles, 1 to {MAX_STYLES}."
        )
    if STYLES_KEY not in metadata:
        return tuple(f"style_{row}" for row in range(number))
    try:
        names = json.loads(metadata[STYLES_KEY])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError("expected a list of names")
        if len(set(names)) != number or len(names) != number:
            raise UserError(f"expected {number} different names")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the metadata {STYLES_KEY!r} names no styles ({error}).") from None
    return tuple(naming.printable(name) for name in names)


def weight_files(folder: pathlib.Path, stem: str) -> list[TensorFile]:
    """Opens a network's weights in a diffusers folder, of the best precision: one file, or the parts of an index.

    Raises:
      CheckpointError: there are no weights, only pickles, or an index that does not match its parts.
    """
    for variant in VARIANTS:
        if (folder / f"{stem}{variant}.safetensors").is_file():
            return [TensorFile(folder / f"{stem}{variant}.safetensors")]
        names = (f"{variant}.safetensors.index", f".safetensors{variant}.index", f".safetensors.index{variant}")
        for index in (folder / f"{stem}{name}.json" for name in names):
            if index.is_file():
                return _parts(index)
    others = sorted(folder.glob(f"{glob.escape(stem)}*.safetensors"))
    if others:
        raise CheckpointError(
            f"{folder} holds no {stem}.safetensors, only {naming.listed([path.name for path in others])}. If these are "
            f"the weights that you want, rename the file to {stem}.safetensors."
        )
    for pickle in sorted(path for path in folder.iterdir() if path.suffix in PICKLES):
        refuse_pickle(pickle)
    raise CheckpointError(f"{folder} holds no {stem}.safetensors, in no precision and no parts. Fetch the weights.")


def _parts(index: pathlib.Path) -> list[TensorFile]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(x, str) for x in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map of keys to file names.")
    parts = sorted(set(weight_map.values()))
    for part in parts:
        if not is_basename(part):
            raise CheckpointError(f"{index} points to {naming.printable(part)!r}; parts must be in its folder.")
    files = {part: TensorFile(index.parent / part) for part in parts}
    # Pairs of key and part: they also show a tensor that is in two parts, or in another part than the index states.
    pairs = {(key, part) for part, file in files.items() for key in file}
    misplaced = sorted({key for key, _ in pairs ^ set(weight_map.items())})
    if misplaced:
        raise CheckpointError(f"{index} and its parts do not list the same tensors: {naming.listed(misplaced)}.")
    return list(files.values())


def is_basename(name: str) -> bool:
    """Tells whether a name in an index names a file of the same folder, on every operating system."""
    return name not in ("", ".", "..") and name.isprintable() and not set(name) & set("/\\:")
