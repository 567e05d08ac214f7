"""Writing students in PyTorch's formats: the DMM folder, a stock diffusers folder, a stock single file.

The last two hold one style or mix, folded in: the style's vector is a constant that is added to the time embedding, so
it moves into `time_embedding.linear_2.bias`, and what is left is a stock UNet that opens everywhere.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np
from jaxtyping import Float

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.architecture import MERGED, SD1, SD2, SDXL, text_encoders
from dmm_jax.checkpoints.checkpoint import Checkpoint, Component
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats import single_file
from dmm_jax.checkpoints.formats.diffusers_folder import WEIGHTS
from dmm_jax.checkpoints.formats.open_clip import to_open_clip
from dmm_jax.checkpoints.formats.safetensors_io import Computed, Tensors, save, save_parts
from dmm_jax.checkpoints.modelspec import Recipe, metadata
from dmm_jax.diffusion.schedule import NoiseSchedule
from dmm_jax.models.unet_2d_condition import style_mlp_name
from dmm_jax.text.vocabulary import OLD_FILES, write_bpe

CHECKPOINTS = ("dmm", "diffusers", "single-file")  # Formats that hold a whole checkpoint.
FORMATS = (*CHECKPOINTS, "style-lora")
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
TOKENIZER_FILES = (
    "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json",
    "tokenizer.json", "added_tokens.json",
)  # fmt: skip
DIFFUSERS_VERSION = "0.24.0"  # The one that DMM's own code was written for; newer ones read its folders too.
OUR_OPTIONS = ("attention_implementation", "remat")
BIAS = "time_embedding.linear_2.bias"  # Where a fixed style goes.
CLASSES = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
}
DMM_CLASS = "DMMUNet2DConditionModel"
# model_index.json of both pipelines, and what stock Stable Diffusion 1 and 2, DMM's own and XL's add to it.
ABSENT = {"feature_extractor": [None, None], "image_encoder": [None, None]}
UNCHECKED = {"safety_checker": [None, None], "requires_safety_checker": False}
PIPELINES = {
    SD1: {"_class_name": "StableDiffusionPipeline"} | UNCHECKED,
    SD2: {"_class_name": "StableDiffusionPipeline"} | UNCHECKED,
    SDXL: {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True},
}
DMM_PIPELINE = "StableDiffusionDMMPipeline"  # There is none for XL: its folder has a stock pipeline and DMM's UNet.
# Where the text encoders of each family lie in a single file.
TEXT_PREFIXES = {
    SD1: {"text_encoder": single_file.CLIP_L},
    SD2: {"text_encoder": single_file.OPEN_CLIP_H},
    SDXL: {"text_encoder": single_file.XL_CLIP_L, "text_encoder_2": single_file.XL_OPEN_CLIP},
}
# Bytes of a file; larger networks are written in parts. Stable Diffusion XL's UNet in float16 is one file below it,
# as it was published, in float32 it is two.
MAX_SHARD_SIZE = 5 * 2**30


def write(
    out: pathlib.Path,
    fmt: str,
    student: Checkpoint,
    weights: np.ndarray | None,
    dtype: str,
    recipe: Recipe,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> pathlib.Path:
    """Writes one format below `out` and returns its path.

    Args:
      fmt: "dmm", "diffusers" or "single-file".
      student: a merged checkpoint with all its networks.
      weights: of the styles (N,), to fold in; None for "dmm", which keeps them all.
      dtype: of every tensor: float32, float16 or bfloat16.
      max_shard_size: bytes of a file in a folder; larger networks are written in parts under an index.

    Raises:
      CheckpointError: the student is damaged, does not fit `dtype`, or has no place in this format.
    """
    if fmt == "dmm":
        return write_folder(out / "dmm", student, dtype, recipe, max_shard_size)
    stock = fold(student, weights)
    if fmt == "diffusers":
        return write_folder(out / "diffusers", stock, dtype, recipe, max_shard_size)
    return write_single_file(out / "model.safetensors", stock, dtype, recipe)


def fold(student: Checkpoint, weights: Float[np.ndarray, " N"]) -> Checkpoint:
    """Returns the stock checkpoint that a merged one is at a fixed mix of its styles; the fold is done in float32.

    Its tensors are read when they are asked for; the style table and its MLP at once.

    Raises:
      CheckpointError: it has no styles, or another number of them.
    """
    config = student.unet_config
    if config.get("addition_embed_type") not in MERGED:
        raise CheckpointError(f"{student.path} has no styles to fold in: it is a stock checkpoint already.")
    if len(weights) != config["num_models"]:
        raise CheckpointError(f"{student.path} has {config['num_models']} styles; got {len(weights)} weights.")
    tensors = naming.checked(student.shapes("unet"), student.tensors("unet"), f"unet of {student.path}")
    mlp = style_mlp_name(config)
    vector = style_vector(tensors, mlp, weights)
    stock = {
        key: Computed(tensors.shape(key), tensors.dtype(key), functools.partial(tensors.__getitem__, key))
        for key in tensors
        if not key.startswith(("model_embedding.", f"{mlp}."))
    }
    stock[BIAS] = Computed(vector.shape, np.dtype(np.float32), lambda: tensors[BIAS].astype(np.float32) + vector)
    kind = {"model_merge": None, "model_merge_xl": "text_time"}[config["addition_embed_type"]]
    config = {name: value for name, value in config.items() if name != "num_models"} | {"addition_embed_type": kind}
    components = {**student.components, "unet": Component(config, lambda: Tensors(stock))}
    return dataclasses.replace(student, components=components, styles=None)


def style_vector(
    tensors: Mapping[str, np.ndarray], mlp: str, weights: Float[np.ndarray, " N"]
) -> Float[np.ndarray, " E"]:
    """Returns what a mix adds to the time embedding: the MLP of the mixed row, float32 (arXiv:2504.12364, A.1, 4.5)."""

    def linear(layer, x):
        weight, bias = (np.asarray(tensors[f"{mlp}.{layer}.{leaf}"], np.float32) for leaf in ("weight", "bias"))
        return weight @ x + bias

    row = np.asarray(weights, np.float32) @ np.asarray(tensors["model_embedding.weight"], np.float32)
    hidden = linear("linear_1", row)
    return linear("linear_2", hidden / (1.0 + np.exp(-hidden)))


def write_folder(
    out: pathlib.Path, source: Checkpoint, dtype: str, recipe: Recipe, max_shard_size: int = MAX_SHARD_SIZE
) -> pathlib.Path:
    """Writes a diffusers folder: stock, or DMM's (its class, its config, its five more keys) where there are styles.

    Networks of more than `max_shard_size` bytes are written in parts under an index. The folder is built beside `out`
    and renamed, so that it is there whole or not at all.

    Raises:
      CheckpointError: a network is damaged or does not fit `dtype`, or `out` is there and not empty.
    """
    _refuse_unsupported(source)
    scheduler = _scheduler_config(source)
    with _whole_folder(out) as folder:
        for component in source.components:
            _write_network(folder / component, component, source, dtype, recipe, max_shard_size)
        (folder / "scheduler").mkdir()
        _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        for name, tokenizer in _tokenizers(source).items():
            copy_tokenizer(tokenizer, folder / name)
        _write_json(folder / "model_index.json", _model_index(source, scheduler["_class_name"]))
    return out


@contextlib.contextmanager
def _whole_folder(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a folder beside `out` that takes its place at the end, or is deleted on an error."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is there and not empty; nothing is overwritten. Give a new folder.")
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        yield part
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _scheduler_config(source):
    config = {"_class_name": "PNDMScheduler", "_diffusers_version": DIFFUSERS_VERSION} | source.scheduler_config
    if not config.get("rescale_betas_zero_snr"):
        return config
    return NoiseSchedule.from_config(config).to_config()  # PNDM, for one, would ignore it: another class takes over.


def _tokenizers(source):
    return dict(zip(("tokenizer", "tokenizer_2"), source.tokenizer_folders, strict=False))


def _write_network(folder, component, source, dtype, recipe, max_shard_size):
    folder.mkdir()
    config = {name: value for name, value in source.config(component).items() if name not in OUR_OPTIONS}
    _write_json(folder / "config.json", stock_unet_config(config) if component == "unet" else config)
    tensors = state_dict(source, component, dtype)
    said = metadata(source, recipe, "diffusers") if component == "unet" else {"format": "pt"}
    save_parts(folder, WEIGHTS[component], tensors, said, max_shard_size)


def _model_index(source, scheduler_class):
    merged, family, tokenizers = source.styles is not None, source.architecture, _tokenizers(source)
    classes = CLASSES | ({"unet": ["modeling.dmm_unet", DMM_CLASS]} if merged else {})
    names, numbers = text_encoders(family), ("tokenizer", "tokenizer_2")[: len(text_encoders(family))]
    index = {
        **PIPELINES[family],
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", scheduler_class],
        **{name: ["transformers", "CLIPTokenizer"] if name in tokenizers else [None, None] for name in numbers},
        **{name: classes[name] if source.has(name) else [None, None] for name in ("unet", "vae", *names)},
        **ABSENT,
    }
    return index | ({"_class_name": DMM_PIPELINE} if merged and family != SDXL else {})


def stock_unet_config(config: Mapping) -> dict:
    """Returns a UNet's config.json as diffusers writes it: our constructor's fields, and those that never differ."""
    fixed = {
        "_class_name": DMM_CLASS if config.get("num_models") else "UNet2DConditionModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "act_fn": "silu", "center_input_sample": False, "downsample_padding": 1, "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn", "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5,
        "num_attention_heads": None, "only_cross_attention": False, "dual_cross_attention": False,
    }  # fmt: skip
    kept = {name: value for name, value in config.items() if not name.startswith("_")}
    return fixed | kept


def write_single_file(out: pathlib.Path, source: Checkpoint, dtype: str, recipe: Recipe) -> pathlib.Path:
    """Writes a single file: UNet, VAE and text encoders under the names of LDM, or of SGM for Stable Diffusion XL.

    Raises:
      CheckpointError: a network is damaged or does not fit `dtype`, or `out` is there.
    """
    _refuse_unsupported(source)
    if out.exists():
        raise CheckpointError(f"{out} is there; nothing is overwritten. Give another name.")
    family = source.architecture if source.has("unet") else SD1
    tensors = {}
    for component in source.components:
        tensors |= _in_single_file(component, source.config(component), state_dict(source, component, dtype), family)
    tensors |= _schedule_flags(source)
    save(out, Tensors(tensors), metadata(source, recipe, "sgm"))
    return out


def _in_single_file(component, config, tensors, family) -> dict[str, Computed]:
    """Returns a network's tensors, to be read one by one, under the single file's keys."""
    if component in TEXT_PREFIXES[family]:
        prefix = TEXT_PREFIXES[family][component]
        laid = to_open_clip(tensors) if prefix in single_file.OPEN_CLIP else tensors
        return {prefix + key: _to_come(laid, key, laid.shape(key)) for key in laid}
    prefix, laid = single_file.PREFIXES[component][0], {}
    for key in tensors:
        name, shape = single_file.KEYS[component](key, config), tensors.shape(key)
        # LDM's VAE holds the attention's dense layers as 1x1 convolutions.
        conv = component == "vae" and ".attn_1." in name and len(shape) == 2
        laid[prefix + name] = _to_come(tensors, key, (*shape, 1, 1) if conv else shape)
    return laid


def _to_come(tensors, key, shape):
    return Computed(shape, tensors.dtype(key), lambda: tensors[key].reshape(shape))


def _schedule_flags(source) -> dict[str, Computed]:
    """Returns the empty tensors by which ComfyUI and A1111 know how a UNet was trained."""
    flags = {
        "v_pred": source.prediction_type == "v_prediction",
        "ztsnr": source.scheduler_config.get("rescale_betas_zero_snr"),
    }
    empty = np.zeros(0, np.float32)
    return {name: Computed(empty.shape, empty.dtype, lambda: empty) for name, there in flags.items() if there}


def _refuse_unsupported(source):
    if source.unsupported:
        raise CheckpointError(f"{source.path} cannot be exported: {source.unsupported}")


def state_dict(source: Checkpoint, component: str, dtype: str) -> Tensors:
    """Returns a network's tensors under diffusers' keys, all there, of one dtype; each is read when it is asked for.

    Raises:
      CheckpointError: keys are missing, unexpected or misshapen; on reading, values that are not finite or too large
        for `dtype`.
    """
    where = f"{component} of {source.path}"
    tensors = naming.checked(source.shapes(component), source.tensors(component), where)

    def read(key):
        with np.errstate(over="ignore"):
            array = tensors[key].astype(DTYPES[dtype])
        if dtype == "float16" and not naming.is_finite(array):
            raise CheckpointError(
                f"{where}: values beyond float16's 65504 in {naming.printable(key)}. Export in bfloat16 or float32."
            )
        return array

    return Tensors(
        {key: Computed(tensors.shape(key), np.dtype(DTYPES[dtype]), functools.partial(read, key)) for key in tensors}
    )


def copy_tokenizer(source: pathlib.Path, out: pathlib.Path) -> None:
    """Copies a tokenizer's files as they are, and writes the old ones where there are none: stock readers want them."""
    out.mkdir()
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    if not all((out / name).is_file() for name in OLD_FILES):
        write_bpe(source, out)


def _write_json(path: pathlib.Path, value: Mapping) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
