"""Opening checkpoints as people have them: diffusers folders, DMM folders, single files, and our own workdirs.

Opening reads headers and configs only; a network's tensors are memory-mapped views until somebody asks for them.
"""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Mapping

from dmm_jax.checkpoints import architecture, licenses, naming
from dmm_jax.checkpoints.abstract import COMPONENTS, abstract_params
from dmm_jax.checkpoints.checkpoint import Checkpoint, Component, Place, abstract
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats import hub, lora, single_file
from dmm_jax.checkpoints.formats.diffusers_folder import STYLES_KEY, WEIGHTS, open_folder
from dmm_jax.checkpoints.formats.open_clip import drop_unused_layer, open_clip_key
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, Tensors
from dmm_jax.checkpoints.formats.single_file_config import read_config
from dmm_jax.models.unet_2d_condition import merged_config
from dmm_jax.runtime.storage import Location, check_bucket, check_local, in_bucket, locate
from dmm_jax.text import vocabulary

__all__ = ["STYLES_KEY", "WEIGHTS", "Checkpoint", "Component", "abstract_params", "open_checkpoint"]
CELL = 8  # Pixels along the side of a latent cell, in every VAE of these models.


def open_checkpoint(
    path: str | os.PathLike,
    base: str | os.PathLike | None = None,
    *,
    prediction_type: str = "",
    allow_unsupported: bool = False,
) -> Checkpoint:
    """Opens a checkpoint; nothing is fetched unasked, and no weights are read.

    Args:
      path: a diffusers or DMM folder, a .safetensors single file, or the workdir of a training run, which alone may be
        in a bucket; `hf:OWNER/NAME@REVISION`, which alone is fetched (see `hub`); with LoRAs folded in:
        `BASE + LORA.safetensors*0.8 + OTHER.safetensors` (weight 1 where none is given).
      base: another checkpoint, for the networks, tokenizer and sizes that `path` lacks.
      prediction_type: "epsilon" or "v_prediction", believed where `path` does not say it: single files, which look the
        same either way.
      allow_unsupported: also open what can be looked at but neither trained nor drawn with.

    Raises:
      CheckpointError: it is not there, damaged, a pickle, of a kind that is unknown or not supported, or says itself
        that it predicts something else.
    """
    if in_bucket(path):
        return _completed_by(_open_in_bucket(path), base)
    path = pathlib.Path(path)
    if not path.exists() and lora.PLUS in str(path):
        root, files = lora.parse(path)
        told = {"prediction_type": prediction_type, "allow_unsupported": allow_unsupported}
        return lora.with_loras(open_checkpoint(root, base, **told), path, files)
    if hub.is_hub_id(path):
        name, folder = hub.fetched(path)
        told = {"prediction_type": prediction_type, "allow_unsupported": allow_unsupported}
        return dataclasses.replace(open_checkpoint(folder, base, **told), called=name)
    if not path.exists():
        raise CheckpointError(
            f"there is no checkpoint {path}. Give a diffusers folder or a .safetensors file, or hf:OWNER/NAME to fetch "
            "it from the Hugging Face hub."
        )
    if path.is_file():
        checkpoint = _open_single_file(path)
    elif (path / "model_index.json").is_file():
        checkpoint = open_folder(path)
    elif (path / "config.json").is_file() and (path / "checkpoints").is_dir():
        checkpoint = _open_workdir(path)
    else:
        raise CheckpointError(
            f"{path} is no checkpoint: it holds neither model_index.json (a diffusers folder) nor a training run's "
            "config.json and checkpoints/. Give the folder that holds unet/, vae/, text_encoder/."
        )
    if checkpoint.unsupported and not allow_unsupported:
        raise CheckpointError(f"{path} cannot be used: {checkpoint.unsupported}")
    if prediction_type:
        checkpoint = _told(checkpoint, prediction_type)
    return _completed_by(checkpoint, base)


def open_teacher(
    path: str | os.PathLike,
    base: str | os.PathLike,
    *,
    prediction_type: str = "",
    allow_unsupported: bool = False,
) -> Checkpoint:
    """Opens a teacher of a merge on `base`; LoRAs of it may change text encoders that only the base has.

    Raises:
      CheckpointError: as `open_checkpoint`.
    """
    lender = base if lora.PLUS in str(path) else None
    told = {"prediction_type": prediction_type, "allow_unsupported": allow_unsupported}
    return open_checkpoint(path, lender, **told)


def _told(checkpoint: Checkpoint, prediction_type: str) -> Checkpoint:
    if "prediction_type" in checkpoint.stated and checkpoint.prediction_type != prediction_type:
        raise CheckpointError(
            f"{checkpoint.path} says of itself that it predicts {naming.printable(str(checkpoint.prediction_type))}, "
            f"prediction_type says {prediction_type}. Leave prediction_type out, or correct what the checkpoint says."
        )
    scheduler = checkpoint.scheduler_config | {"prediction_type": prediction_type}
    return dataclasses.replace(checkpoint, scheduler_config=scheduler, stated={*checkpoint.stated, "prediction_type"})


def _completed_by(checkpoint, base) -> Checkpoint:
    return _with_clips_words(checkpoint if base is None else _completed(checkpoint, open_checkpoint(base)))


def _with_clips_words(checkpoint: Checkpoint) -> Checkpoint:
    """Gives the tokenizers that ship with the package to text encoders of CLIP's vocabulary that have none."""
    found, fields = {}, ("tokenizer_folder", "tokenizer_2_folder")
    for field, name in zip(fields, checkpoint.text_encoders if checkpoint.has("unet") else (), strict=False):
        config = checkpoint.config(name) if checkpoint.has(name) else {}
        if getattr(checkpoint, field) is None and config.get("vocab_size") == vocabulary.CLIP_VOCAB_SIZE:
            # Only OpenCLIP's encoders have this activation; their tokenizers pad otherwise.
            found[field] = vocabulary.OPEN_CLIP if config.get("hidden_act") == "gelu" else vocabulary.CLIP
    return dataclasses.replace(checkpoint, **found)


def _completed(checkpoint: Checkpoint, base: Checkpoint) -> Checkpoint:
    """Takes what is missing from the base; equal architectures also take its sizes, which no tensor tells."""
    components = {**base.components, **checkpoint.components}
    scheduler = checkpoint.scheduler_config
    if checkpoint.kind == "single-file":
        if checkpoint.has("unet") and base.has("unet") and checkpoint.shapes("unet") == base.shapes("unet"):
            components["unet"] = Component(dict(base.unet_config), checkpoint.components["unet"].load)
        scheduler = base.scheduler_config | {flag: scheduler[flag] for flag in checkpoint.stated}
    return dataclasses.replace(
        checkpoint,
        components=components,
        tokenizer_folder=checkpoint.tokenizer_folder or base.tokenizer_folder,
        tokenizer_2_folder=checkpoint.tokenizer_2_folder or base.tokenizer_2_folder,
        scheduler_config=scheduler,
        borrowed=tuple(name for name in components if not checkpoint.has(name)),
    )


def _open_single_file(path: pathlib.Path) -> Checkpoint:
    file = TensorFile(path)
    held = {component: _held(component, file) for component in COMPONENTS}
    held = {component: keys for component, keys in held.items() if keys}
    if not held:
        lora.refuse_alone(file)
        raise CheckpointError(
            f"{path} is no Stable Diffusion checkpoint: no key begins with {single_file.UNET!r}. Its first keys: "
            f"{naming.listed(list(file)[:5])}."
        )
    components = {component: _single_component(path, file, component, keys) for component, keys in held.items()}
    family = architecture.architecture(components["unet"].config) if "unet" in components else architecture.SD1
    if "vae" in components:
        components["vae"].config["scaling_factor"] = architecture.vae_scale(family)
    used = {name for keys in held.values() for name in keys.values()}
    said = _schedule(file)
    return Checkpoint(
        path=path,
        kind="single-file",
        components=components,
        scheduler_config=architecture.scheduler_config(family) | said,
        tokenizer_folder=None,
        styles=None,
        unused=tuple(key for key in file if key not in used),
        unsupported=_unsupported(file, held, used),
        stated=frozenset(said),
        files=(path,),
        license=licenses.stated(file.metadata),
    )


def _held(component, file) -> dict[str, str]:
    """Returns {key without the prefix: key in the file} of a component; empty where the file has none."""
    prefix = single_file.prefix_of(component, file)
    if prefix is None:
        return {}
    keys = [key.removeprefix(prefix) for key in file if key.startswith(prefix)]
    if component == "vae":
        keys = [key for key in keys if not key.startswith(single_file.VAE_TRAINING)]
    elif component != "unet":
        keys = [key for key in keys if _of_text_encoder(prefix, key)]
    if prefix == single_file.OPEN_CLIP_H or prefix == single_file.SOLE_OPEN_CLIP and not _is_refiner(file):
        keys = drop_unused_layer(keys)
    today = {key: single_file.ldm_key(component, key) for key in keys}
    times = collections.Counter(today.values())
    # A tensor that stands under two names keeps them, so that it is reported, and neither is preferred.
    return {(new if times[new] == 1 else key): prefix + key for key, new in today.items()}


def _of_text_encoder(prefix, key):
    parts = single_file.OPEN_CLIP_PARTS if prefix in single_file.OPEN_CLIP else single_file.CLIP_PARTS
    return key.removeprefix("text_model.").partition(".")[0] in parts


def _is_refiner(file):
    alone = any(key.startswith(single_file.SOLE_OPEN_CLIP) for key in file)
    return alone and single_file.UNET + single_file.CLASS_EMBEDDING in file


def _unsupported(file: TensorFile, held: Mapping[str, Mapping[str, str]], used: set[str]) -> str:
    """Returns why nothing but `inspect` can use a single file; "" where it can be used."""
    problems = [architecture.NO_REFINER] if _is_refiner(file) else []
    problems += [architecture.NO_EDM] if any(key in file for key in single_file.EDM) else []
    prefixes = {single_file.prefix_of(component, file) for component in held if component not in single_file.KEYS}
    # What `_held` looked at and left, a layer that is not used, is known.
    seen = {
        key for key in file for prefix in prefixes
        if key.startswith(prefix) and _of_text_encoder(prefix, key.removeprefix(prefix))
    }  # fmt: skip
    lost = single_file.conditioning_keys(key for key in file if key not in used | seen)
    if lost:
        problems.append(
            f"it holds {len(lost)} tensors of a text encoder, or of another network, that is known by no such name; "
            f"they would be dropped in silence: {naming.listed(lost)}. "
            "Use a file of the usual layout, or a diffusers folder."
        )
    return " ".join(problems)


def _schedule(file: TensorFile) -> dict:
    """Returns what a file says of its schedule: by empty tensors, or by ModelSpec's metadata."""
    scheduler = {}
    said = file.metadata.get("modelspec.prediction_type") or file.metadata.get("modelspec.predict_key") or ""
    if "v_pred" in file or said.lower() in ("v", "v_prediction"):
        scheduler["prediction_type"] = "v_prediction"
    elif said.lower() in ("epsilon", "eps"):
        scheduler["prediction_type"] = "epsilon"
    if "ztsnr" in file:
        scheduler["rescale_betas_zero_snr"] = True
    return scheduler


def _single_component(path, file: TensorFile, component: str, held: Mapping[str, str]) -> Component:
    prefix, shapes = single_file.prefix_of(component, file), {key: file.shape(name) for key, name in held.items()}
    try:
        config = read_config(component, shapes, prefix, str(path))
    except CheckpointError as error:
        if component != "vae":
            raise
        return Component.unreadable({}, error)  # A teacher's VAE is never used.
    if component == "unet":
        config |= _sample_size(file.metadata)

    def load():
        if prefix in single_file.OPEN_CLIP:
            return Tensors(_open_clip_places(component, file, held, config))
        keys = _renamed(component, held, config, path) if component in single_file.KEYS else held
        return Tensors({key: Place(file, name) for key, name in keys.items()})

    return Component(config, load)


def _renamed(component, held, config, path) -> dict[str, str]:
    """Returns {our key: key in the file}; tensors that have no place keep the file's."""
    keys = naming.torch_shapes(abstract(component, config, path))
    ours = {single_file.KEYS[component](key, config): key for key in keys}
    taken = {ours[key] for key in held if key in ours}
    # A tensor that stands under diffusers' name as well keeps its name here, so that it is reported, not preferred.
    return {ours.get(key, name if key in taken else key): name for key, name in held.items()}


def _open_clip_places(component, file, held, config) -> dict[str, Place]:
    """Finds a text encoder's tensors in OpenCLIP's layout; those that have no place keep the file's keys."""
    found = {key: open_clip_key(key) for key in naming.torch_shapes(abstract(component, config, file.path))}
    found |= {key: at.as_dense() for key, at in found.items() if at.name not in held and at.as_dense().name in held}
    places = {key: Place(file, held[at.name], at.third, at.transposed) for key, at in found.items() if at.name in held}
    known = {at.name for at in found.values()}
    return places | {name: Place(file, name) for key, name in held.items() if key not in known}


def _sample_size(metadata: Mapping[str, str]) -> dict:
    """Reads ModelSpec's resolution, "512x512", as latent cells."""
    width, _, height = metadata.get("modelspec.resolution", "").partition("x")
    good = width.isascii() and width.isdecimal() and width == height and len(width) < 6 and int(width) >= CELL
    return {"sample_size": int(width) // CELL} if good else {}


def _open_in_bucket(path: str | os.PathLike) -> Checkpoint:
    """Opens a run; of any other checkpoint it is said that it must be copied, since its files are memory-mapped."""
    try:
        path = locate(path)
        check_bucket(path)
        if not (path / "config.json").is_file():
            check_local(path, "a checkpoint that is no training run")
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return _open_workdir(path)


def _open_workdir(path: Location) -> Checkpoint:
    from dmm_jax.checkpoints.states import restore_student
    from dmm_jax.config import options as config_lib

    config = config_lib.load(path)
    base = open_checkpoint(config.base, prediction_type=config.prediction_type)
    names = tuple(config_lib.style_names(config))
    unet = merged_config(base.unet_config, len(names))

    def load():
        return naming.to_torch(restore_student(path, abstract_params("unet", unet)))

    components = {**base.components, "unet": Component(unet, load)}
    tokenizers = {"tokenizer_folder": base.tokenizer_folder, "tokenizer_2_folder": base.tokenizer_2_folder}
    schedule = {"scheduler_config": base.scheduler_config, "stated": base.stated}
    return Checkpoint(path, "workdir", components, styles=names, **schedule, **tokenizers)
