"""Writing students in PyTorch's formats: the DMM folder, a stock diffusers folder, a stock single file.

The last two hold one style or mix, folded in: the style's vector is a constant that is added to the time embedding, so it
moves into `time_embedding.linear_2.bias`, and what is left is a stock UNet that opens everywhere.
"""

import dataclasses
import datetime
import hashlib
import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence

import numpy as np

from dmm_jax.checkpoints import naming, single_file
from dmm_jax.checkpoints.open import STYLES_KEY, WEIGHTS, Checkpoint, Component
from dmm_jax.checkpoints.safetensors_io import save
from dmm_jax.models.unet_2d_condition import style_mlp_name

FORMATS = ("dmm", "diffusers", "single-file")
DTYPES = {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16"}
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
DIFFUSERS_VERSION = "0.24.0"  # The one that DMM's own code was written for; newer ones read its folders too.
CELL = 8  # Pixels along the side of a latent cell, in every VAE of these models.
OUR_OPTIONS = ("attention_implementation", "remat")
ABSENT = {"safety_checker": [None, None], "feature_extractor": [None, None], "image_encoder": [None, None]}
CLASSES = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is said about a file inside it."""

    title: str
    merged_from: Sequence[str]  # Names of the teachers.
    details: Mapping | None  # The whole recipe, for `dmm_jax.recipe`; None leaves it out.


def write(out: pathlib.Path, fmt: str, student: Checkpoint, weights: np.ndarray | None, dtype: str, recipe: Recipe) -> pathlib.Path:
    """Writes one format below `out` and returns its path.

    Args:
      student: a merged checkpoint with all its networks.
      weights: of the styles (N,), to fold in; None for "dmm", which keeps them all.
      dtype: of every tensor: float32, float16 or bfloat16.
    """
    if fmt == "dmm":
        return write_folder(out / "dmm", student, dtype, recipe)
    stock = fold(student, weights)
    if fmt == "diffusers":
        return write_folder(out / "diffusers", stock, dtype, recipe)
    return write_single_file(out / "model.safetensors", stock, dtype, recipe)


def fold(student: Checkpoint, weights: np.ndarray) -> Checkpoint:
    """Returns the stock checkpoint that a merged one is at a fixed mix of its styles; the fold is done in float32."""
    config = student.unet_config
    tensors = {key: np.asarray(array) for key, array in student.tensors("unet").items()}
    mlp = style_mlp_name(config)
    vector = style_vector(tensors, mlp, weights)
    own = ("model_embedding.", f"{mlp}.")
    stock = {key: array for key, array in tensors.items() if not key.startswith(own)}
    bias = "time_embedding.linear_2.bias"
    stock[bias] = stock[bias].astype(np.float32) + vector
    kind = {"model_merge": None, "model_merge_xl": "text_time"}[config["addition_embed_type"]]
    config = {name: value for name, value in config.items() if name != "num_models"} | {"addition_embed_type": kind}
    components = {**student.components, "unet": Component(config, lambda: stock)}
    return dataclasses.replace(student, components=components, styles=None)


def style_vector(tensors: Mapping[str, np.ndarray], mlp: str, weights: np.ndarray) -> np.ndarray:
    """Returns what a mix adds to the time embedding (E,): the MLP of the mixed row, float32 (arXiv:2504.12364, A.1, 4.5)."""

    def linear(layer, x):
        weight, bias = (np.asarray(tensors[f"{mlp}.{layer}.{leaf}"], np.float32) for leaf in ("weight", "bias"))
        return weight @ x + bias

    row = np.asarray(weights, np.float32) @ np.asarray(tensors["model_embedding.weight"], np.float32)
    hidden = linear("linear_1", row)
    return linear("linear_2", hidden / (1.0 + np.exp(-hidden)))


def _cast(tensors: Mapping, dtype: str) -> dict[str, np.ndarray]:
    import ml_dtypes

    target = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    return {key: np.asarray(tensors[name]).astype(target) for key, name in naming.spellings(tensors).items()}


def write_folder(out: pathlib.Path, source: Checkpoint, dtype: str, recipe: Recipe) -> pathlib.Path:
    """Writes a diffusers folder: stock, or DMM's where the UNet has a style table (its class, its config, its 5 more keys)."""
    merged = source.styles is not None
    out.mkdir(parents=True)
    for component in source.components:
        folder = out / component
        folder.mkdir()
        config = {name: value for name, value in source.config(component).items() if name not in OUR_OPTIONS}
        if component == "unet":
            config = stock_unet_config(config)
        _write_json(folder / "config.json", config)
        metadata = {"format": "pt"}
        if component == "unet":
            metadata |= _metadata(source, recipe, "diffusers")
        save(folder / f"{WEIGHTS[component]}.safetensors", _cast(source.tensors(component), dtype), metadata)
    scheduler = {"_class_name": "PNDMScheduler", "_diffusers_version": DIFFUSERS_VERSION} | source.scheduler_config
    (out / "scheduler").mkdir()
    _write_json(out / "scheduler" / "scheduler_config.json", scheduler)
    classes = CLASSES | ({"unet": ["modeling.dmm_unet", "DMMUNet2DConditionModel"]} if merged else {})
    index = {
        "_class_name": "StableDiffusionDMMPipeline" if merged else "StableDiffusionPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "tokenizer": [None, None],
        "requires_safety_checker": False,
    }
    index |= {name: pair if source.has(name) else [None, None] for name, pair in classes.items()}
    if source.tokenizer_folder is not None:
        copy_tokenizer(source.tokenizer_folder, out / "tokenizer")
        index["tokenizer"] = ["transformers", "CLIPTokenizer"]
    _write_json(out / "model_index.json", index | ABSENT)
    return out


def stock_unet_config(config: Mapping) -> dict:
    """Returns a UNet's config.json as diffusers writes it: the fields that our constructor knows, with its fixed ones."""
    fixed = {
        "_class_name": "DMMUNet2DConditionModel" if config.get("num_models") else "UNet2DConditionModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "act_fn": "silu", "center_input_sample": False, "downsample_padding": 1, "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn", "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5,
        "num_attention_heads": None, "only_cross_attention": False, "dual_cross_attention": False,
    }  # fmt: skip
    kept = {name: value for name, value in config.items() if not name.startswith("_")}
    return fixed | kept


def write_single_file(out: pathlib.Path, source: Checkpoint, dtype: str, recipe: Recipe) -> pathlib.Path:
    """Writes Stable Diffusion 1's single-file layout: UNet, VAE and text encoder under LDM's names."""
    tensors = {}
    for component in source.components:
        config, prefix = source.config(component), single_file.PREFIXES[component][0]
        for key, array in _cast(source.tensors(component), dtype).items():
            key = single_file.KEYS[component](key, config)
            # LDM's VAE holds the attention's dense layers as 1x1 convolutions.
            conv = component == "vae" and ".attn_1." in key and array.ndim == 2
            tensors[prefix + key] = array[:, :, None, None] if conv else array
    if source.prediction_type == "v_prediction":
        tensors["v_pred"] = np.zeros(0, np.float32)
    if source.scheduler_config.get("rescale_betas_zero_snr"):
        tensors["ztsnr"] = np.zeros(0, np.float32)
    digest = hashlib.sha256()
    for key in sorted(tensors):
        if tensors[key].size:
            digest.update(np.ascontiguousarray(tensors[key]).reshape(-1).view(np.uint8).data)
    metadata = {"format": "pt"} | _metadata(source, recipe, "sgm") | {"modelspec.hash_sha256": "0x" + digest.hexdigest()}
    save(out, tensors, metadata)
    return out


def _metadata(source: Checkpoint, recipe: Recipe, implementation: str) -> dict[str, str]:
    """Returns ModelSpec 1.0.1 fields, the styles' names, and the recipe; every value is text."""
    side = (source.unet_config.get("sample_size") or 64) * CELL
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1" + ("/dmm" if source.styles else ""),
        "modelspec.implementation": implementation,
        "modelspec.title": recipe.title,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": "v" if source.prediction_type == "v_prediction" else "epsilon",
        "modelspec.date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    if recipe.merged_from:
        metadata["modelspec.merged_from"] = ", ".join(recipe.merged_from)
    if source.styles:
        metadata[STYLES_KEY] = json.dumps(list(source.styles))
    if recipe.details is not None:
        metadata["dmm_jax.recipe"] = json.dumps(recipe.details, sort_keys=True)
    return metadata


def copy_tokenizer(source: pathlib.Path, out: pathlib.Path) -> None:
    """Copies a tokenizer's files as they are."""
    out.mkdir()
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def _write_json(path: pathlib.Path, value: Mapping) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
