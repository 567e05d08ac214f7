"""Opens single-file checkpoints: finds each network's tensors by their prefix and reads its config off their shapes."""

import collections
import pathlib
import warnings
from collections.abc import Mapping

import numpy as np

from dmm_jax.checkpoints import architecture, licenses, naming
from dmm_jax.checkpoints.abstract import COMPONENTS
from dmm_jax.checkpoints.architecture import CELL
from dmm_jax.checkpoints.checkpoint import Checkpoint, Component, Place, build_abstract
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats import lora, single_file
from dmm_jax.checkpoints.formats.open_clip import drop_unused_layer, open_clip_key
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, Tensors
from dmm_jax.checkpoints.formats.single_file_config import read_config
from dmm_jax.diffusion.schedule import NoiseSchedule

PREDICTION_FIELDS = ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type")  # Metadata fields.
ALPHAS, SIGMAS = "alphas_cumprod", "denoiser.sigmas"  # The noise levels in files of LDM and of SGM.
MAX_ZERO_SNR = 1e-4  # The last of ALPHAS is 0.0047 in Stable Diffusion, and at most 1e-7 at zero terminal SNR.
ALPHAS_TOLERANCE = 5e-3  # bfloat16 rounds by 4e-3.
PREDICTION_TYPES = {
    "epsilon": "epsilon", "eps": "epsilon",
    "v": "v_prediction", "v_prediction": "v_prediction", "v_pred": "v_prediction", "vpred": "v_prediction",
}  # fmt: skip


def open_single_file(path: pathlib.Path) -> Checkpoint:
    """Opens a single file; reads its header alone.

    Raises:
      CheckpointError: it holds no network that we know, or its UNet is of a kind that cannot be used.
    """
    file = TensorFile(path)
    keys_of = {component: _keys_of(component, file) for component in COMPONENTS}
    keys_of = {component: keys for component, keys in keys_of.items() if keys}
    kind = single_file.VAE_ALONE if set(keys_of) == {"vae"} else single_file.other_network(file)
    if not keys_of or kind:
        lora.refuse_alone(file)
        reason = f"it is {kind}" if kind else f"no key begins with {single_file.UNET!r}"
        keys = f"Its first keys: {naming.listed(list(file)[:5])}." if len(file) else "It holds no tensor."
        raise CheckpointError(f"{path} is no Stable Diffusion checkpoint: {reason}. {keys}")
    components = {component: _component(path, file, component, keys) for component, keys in keys_of.items()}
    family = architecture.architecture(components["unet"].config) if "unet" in components else architecture.SD1
    if "vae" in components:
        components["vae"].config["scaling_factor"] = architecture.vae_scale(family)
    used = {name for keys in keys_of.values() for name in keys.values()}
    explicit = _explicit_schedule(file)
    return Checkpoint(
        path=path,
        kind="single-file",
        components=components,
        scheduler_config=architecture.scheduler_config(family) | explicit,
        tokenizer_folder=None,
        styles=None,
        unused=tuple(key for key in file if key not in used),
        unsupported=_why_unsupported(file, keys_of, used),
        explicit_fields=frozenset(explicit),
        files=(path,),
        license=licenses.stated(file.metadata, path),
    )


def open_vae_file(file: TensorFile) -> Component:
    """Returns the VAE of a file that holds nothing else, or nothing but a VAE and unknown tensors, in LDM's layout.

    Raises:
      CheckpointError: the file holds no VAE, or one of an unknown architecture.
    """
    first = "encoder.conv_in.weight"
    prefix = next((prefix for prefix in (*single_file.PREFIXES["vae"], "") if prefix + first in file), None)
    if prefix is None:
        keys = naming.listed(list(file)[:5])
        raise CheckpointError(f"{file.path} holds no VAE: it lacks {first!r}. Its first keys: {keys}.")
    bare = {key.removeprefix(prefix): key for key in file if key.startswith(prefix)}
    keys = {
        single_file.ldm_key("vae", key): name
        for key, name in bare.items()
        if not key.startswith(single_file.VAE_TRAINING)
    }
    vae = _component(file.path, file, "vae", keys)
    return vae if vae.config else vae.load()  # Without a config, loading raises the reason.


def _keys_of(component, file) -> dict[str, str]:
    """Returns {key without the prefix: key in the file} of a network; empty if the file does not hold it."""
    prefix = single_file.prefix_of(component, file)
    if prefix is None:
        return {}
    keys = [key.removeprefix(prefix) for key in file if key.startswith(prefix)]
    if component == "vae":
        keys = [key for key in keys if not key.startswith(single_file.VAE_TRAINING)]
    elif component != "unet":
        keys = [key for key in keys if _is_of_text_encoder(prefix, key)]
    if prefix == single_file.OPEN_CLIP_H or prefix == single_file.SOLE_OPEN_CLIP and not _is_refiner(file):
        keys = drop_unused_layer(keys)
    today = {key: single_file.ldm_key(component, key) for key in keys}
    times = collections.Counter(today.values())
    # A tensor under two names keeps both, so that the reader of the network reports it and prefers neither.
    return {(new if times[new] == 1 else key): prefix + key for key, new in today.items()}


def _is_of_text_encoder(prefix, key) -> bool:
    parts = single_file.OPEN_CLIP_PARTS if prefix in single_file.OPEN_CLIP else single_file.CLIP_PARTS
    return key.removeprefix("text_model.").partition(".")[0] in parts


def _is_refiner(file) -> bool:
    has_sole_encoder = any(key.startswith(single_file.SOLE_OPEN_CLIP) for key in file)
    return has_sole_encoder and single_file.UNET + single_file.CLASS_EMBEDDING in file


def _why_unsupported(file: TensorFile, keys_of: Mapping[str, Mapping[str, str]], used: set[str]) -> str:
    """Returns why nothing but `inspect` can use a single file; "" if it can be used."""
    problems = [architecture.NO_REFINER] if _is_refiner(file) else []
    problems += [architecture.NO_EDM] if any(key in file for key in single_file.EDM) else []
    prefixes = {single_file.prefix_of(component, file) for component in keys_of if component not in single_file.KEYS}
    # The layer that `drop_unused_layer` leaves out belongs to a known text encoder, too.
    of_encoders = {
        key for key in file for prefix in prefixes
        if key.startswith(prefix) and _is_of_text_encoder(prefix, key.removeprefix(prefix))
    }  # fmt: skip
    unplaced = single_file.conditioning_keys(key for key in file if key not in used | of_encoders)
    if unplaced:
        problems.append(
            f"it holds {len(unplaced)} tensors of a text encoder, or of another network, under unknown names; they "
            f"would be dropped in silence: {naming.listed(unplaced)}. "
            "Use a file of the usual layout, or a diffusers folder."
        )
    return " ".join(problems)


def _explicit_schedule(file: TensorFile) -> dict:
    """Returns the fields of a scheduler config that a file states: by empty tensors, or by metadata.

    Raises:
      CheckpointError: the file states a prediction type that this package does not know.
    """
    scheduler = {}
    stated = next(filter(None, (file.metadata.get(name) for name in PREDICTION_FIELDS)), "")
    kind = "v_prediction" if "v_pred" in file else PREDICTION_TYPES.get(stated.lower().replace("-", "_"))
    if stated and not kind:
        raise CheckpointError(
            f"{file.path} states the prediction type {naming.printable(stated)!r}; expected one of "
            f"{', '.join(PREDICTION_TYPES)}. Correct its metadata, or give the checkpoint as a diffusers folder."
        )
    if kind:
        scheduler["prediction_type"] = kind
    if "ztsnr" in file or _ends_in_noise_alone(file):
        scheduler["rescale_betas_zero_snr"] = True
    return scheduler


def _ends_in_noise_alone(file: TensorFile) -> bool:
    """Tells whether the stored noise levels, which many files hold, fall to a signal of zero; warns of unknown ones."""
    usual = NoiseSchedule().alphas_cumprod
    if ALPHAS in file and file.shape(ALPHAS) == usual.shape:
        stored = np.asarray(file[ALPHAS], np.float64)
    elif SIGMAS in file and file.shape(SIGMAS) == usual.shape:
        stored = np.sort(1.0 / (1.0 + np.asarray(file[SIGMAS], np.float64) ** 2))[::-1]
    else:
        return False
    if stored[0] > 0.9 and stored[-1] < MAX_ZERO_SNR:
        return True
    if not np.allclose(stored, usual, atol=ALPHAS_TOLERANCE):
        warnings.warn(f"{file.path}: its noise levels are none that is known; the usual ones are used.", stacklevel=2)
    return False


def _component(path, file: TensorFile, component: str, keys: Mapping[str, str]) -> Component:
    """Returns a network: its config from the shapes, and its tensors under diffusers' keys.

    Args:
      keys: {key without the prefix: key in the file}.
    """
    prefix = single_file.prefix_of(component, file) or ""  # A file of a VAE alone has none.
    shapes = {key: file.shape(name) for key, name in keys.items()}
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
            return Tensors(_open_clip_places(component, file, keys, config))
        names = _diffusers_keys(component, keys, config, path) if component in single_file.KEYS else keys
        return Tensors({key: Place(file, name) for key, name in names.items()})

    return Component(config, load)


def _sample_size(metadata: Mapping[str, str]) -> dict:
    """Returns ModelSpec's resolution ("512x512") as the config's `sample_size` in latent cells, or {}."""
    width, _, height = metadata.get("modelspec.resolution", "").partition("x")
    plausible = width.isascii() and width.isdecimal() and width == height and len(width) < 6
    return {"sample_size": int(width) // CELL} if plausible and int(width) >= CELL else {}


def _diffusers_keys(component, keys, config, path) -> dict[str, str]:
    """Returns {diffusers' key: key in the file}; a tensor that has no place keeps the key that it has in the file."""
    diffusers_keys = naming.torch_shapes(build_abstract(component, config, path))
    renamed = {single_file.KEYS[component](key, config): key for key in diffusers_keys}
    taken = {renamed[key] for key in keys if key in renamed}
    # A tensor that also has diffusers' name in the file keeps the file's key, so that it is reported, not preferred.
    return {renamed.get(key, name if key in taken else key): name for key, name in keys.items()}


def _open_clip_places(component, file, keys, config) -> dict[str, Place]:
    """Returns the place of each tensor of a text encoder in OpenCLIP's layout; unknown tensors keep the file's keys."""
    sources = {key: open_clip_key(key) for key in naming.torch_shapes(build_abstract(component, config, file.path))}
    sources |= {
        key: source.as_dense()
        for key, source in sources.items()
        if source.name not in keys and source.as_dense().name in keys
    }
    places = {
        key: Place(file, keys[source.name], source.third, source.transposed)
        for key, source in sources.items()
        if source.name in keys
    }
    source_names = {source.name for source in sources.values()}
    return places | {name: Place(file, name) for key, name in keys.items() if key not in source_names}
