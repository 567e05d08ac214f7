"""Writes one checkpoint in PyTorch's formats: the DMM folder, a stock diffusers folder, a stock single file."""

import functools
import json
import pathlib
import shutil
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.architecture import SD1, SD2, SDXL, text_encoders
from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats import float8, single_file
from dmm_jax.checkpoints.formats.diffusers_folder import EMPTY_PROMPT, WEIGHTS
from dmm_jax.checkpoints.formats.open_clip import to_open_clip
from dmm_jax.checkpoints.formats.safetensors_io import Computed, Tensors, save, save_parts
from dmm_jax.checkpoints.modelspec import Recipe, metadata
from dmm_jax.checkpoints.styles import fold_style
from dmm_jax.diffusion.schedule import NoiseSchedule
from dmm_jax.runtime.storage import check_output, staged_folder
from dmm_jax.text.vocabulary import OLD_FILES, write_bpe

CHECKPOINTS = ("dmm", "diffusers", "single-file")  # Formats that hold a whole checkpoint.
FORMATS = {  # {name: meaning}
    "dmm": "a folder with all styles, for dmm_jax and DMM's own code",
    "diffusers": "a stock diffusers folder with one style or mix",
    "single-file": "a stock checkpoint with one style or mix, for ComfyUI, A1111, Forge and diffusers",
    "style-lora": "a style as a few kilobytes, for the stock export of one mix",
    "lora": "a style, or each one, minus the base as a LoRA of low rank, for the tools of --lora-for",
}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
FLOAT8 = "float8_e4m3fn"  # For single files: the UNet's dense layers, each with a scale; the rest is float16.
TOKENIZER_FILES = (
    "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json",
    "tokenizer.json", "added_tokens.json",
)  # fmt: skip
DIFFUSERS_VERSION = "0.24.0"  # The version that DMM's own code was written for; newer ones read its folders too.
OUR_OPTIONS = ("attention_implementation", "remat", "loop_blocks", "lora_rank", "lora_conv_rank")
CLASSES = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
}
DMM_CLASS = "DMMUNet2DConditionModel"
# Entries of model_index.json: for every pipeline, for pipelines with a safety checker, and for each family.
ABSENT = {"feature_extractor": [None, None], "image_encoder": [None, None]}
UNCHECKED = {"safety_checker": [None, None], "requires_safety_checker": False}
PIPELINES = {
    SD1: {"_class_name": "StableDiffusionPipeline"} | UNCHECKED,
    SD2: {"_class_name": "StableDiffusionPipeline"} | UNCHECKED,
    SDXL: {"_class_name": "StableDiffusionXLPipeline"},
}
DMM_PIPELINE = "StableDiffusionDMMPipeline"  # XL has none: its DMM folder names the stock pipeline and DMM's UNet.
# {family: {text encoder: its prefix in a single file}}
TEXT_PREFIXES = {
    SD1: {"text_encoder": single_file.CLIP_L},
    SD2: {"text_encoder": single_file.OPEN_CLIP_H},
    SDXL: {"text_encoder": single_file.XL_CLIP_L, "text_encoder_2": single_file.XL_OPEN_CLIP},
}
# Bytes of a file; larger networks are written in parts. Stable Diffusion XL's UNet in float16 is one file below it,
# as it was published; in float32 it is two.
MAX_SHARD_SIZE = 5 * 2**30


def write_format(
    out: pathlib.Path,
    fmt: str,
    student: Checkpoint,
    weights: np.ndarray | None,
    dtype: str,
    recipe: Recipe,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> pathlib.Path:
    """Writes a student in one format below the folder `out`; returns the path of the new folder or file.

    Args:
      fmt: "dmm", "diffusers" or "single-file".
      student: a merged checkpoint with all its networks.
      weights: the mix of styles (N,) to fold in; "dmm" keeps all styles and ignores it.
      dtype: the dtype of every tensor: float32, float16 or bfloat16.
      max_shard_size: bytes per file in a folder; larger networks are written in parts under an index.

    Raises:
      CheckpointError: the student is damaged, does not fit `dtype`, or cannot be written in this format.
    """
    if fmt == "dmm":
        return write_folder(out / "dmm", student, dtype, recipe, max_shard_size)
    stock = fold_style(student, weights)
    if fmt == "diffusers":
        return write_folder(out / "diffusers", stock, dtype, recipe, max_shard_size)
    return write_single_file(out / "model.safetensors", stock, dtype, recipe)


def write_folder(
    out: pathlib.Path, source: Checkpoint, dtype: str, recipe: Recipe, max_shard_size: int = MAX_SHARD_SIZE
) -> pathlib.Path:
    """Writes a diffusers folder: DMM's (its class, its config, its five more keys) if there are styles, else stock.

    Networks of more than `max_shard_size` bytes are written in parts under an index. The folder appears under its name
    when it is complete.

    Raises:
      CheckpointError: a network is damaged or does not fit `dtype`.
      UserError: `out` is not empty.
    """
    _refuse_unsupported(source)
    scheduler = _scheduler_config(source)
    with staged_folder(check_output(out)) as folder:
        for component in source.components:
            _write_network(folder / component, component, source, dtype, recipe, max_shard_size)
        (folder / "scheduler").mkdir()
        _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        for name, tokenizer in _tokenizers(source).items():
            copy_tokenizer(tokenizer, folder / name)
        _write_json(folder / "model_index.json", _model_index(source, scheduler["_class_name"]))
    return out


def _scheduler_config(source) -> dict:
    config = {"_class_name": "PNDMScheduler", "_diffusers_version": DIFFUSERS_VERSION} | source.scheduler_config
    if not config.get("rescale_betas_zero_snr"):
        return config
    return NoiseSchedule.from_config(config).to_config()  # PNDM, for one, ignores the flag: this names another class.


def _tokenizers(source) -> dict[str, pathlib.Path]:
    return dict(zip(("tokenizer", "tokenizer_2"), source.tokenizer_folders, strict=False))


def _write_network(folder, component, source, dtype, recipe, max_shard_size):
    folder.mkdir()
    config = {name: value for name, value in source.config(component).items() if name not in OUR_OPTIONS}
    _write_json(folder / "config.json", stock_unet_config(config) if component == "unet" else config)
    tensors = state_dict(source, component, dtype)
    about = metadata(source, recipe, "diffusers") if component == "unet" else {"format": "pt"}
    save_parts(folder, WEIGHTS[component], tensors, about, max_shard_size)


def _model_index(source, scheduler_class) -> dict:
    merged, family, tokenizers = source.styles is not None, source.architecture, _tokenizers(source)
    classes = CLASSES | ({"unet": ["modeling.dmm_unet", DMM_CLASS]} if merged else {})
    encoders, tokenizer_names = text_encoders(family), ("tokenizer", "tokenizer_2")[: len(text_encoders(family))]
    index = {
        **PIPELINES[family],
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", scheduler_class],
        **{name: ["transformers", "CLIPTokenizer"] if name in tokenizers else [None, None] for name in tokenizer_names},
        **{name: classes[name] if source.has(name) else [None, None] for name in ("unet", "vae", *encoders)},
        **ABSENT,
    }
    if family == SDXL:
        return index | {EMPTY_PROMPT: source.zeros_for_no_prompt is not False}
    return index | ({"_class_name": DMM_PIPELINE} if merged else {})


def stock_unet_config(config: Mapping) -> dict:
    """Returns a UNet's config.json as diffusers writes it: our constructor's fields, and those that never differ."""
    fixed = {
        "_class_name": DMM_CLASS if config.get("num_models") else "UNet2DConditionModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "act_fn": "silu", "center_input_sample": False, "downsample_padding": 1, "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn", "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5,
        "num_attention_heads": None, "only_cross_attention": False, "dual_cross_attention": False,
    }  # fmt: skip
    return fixed | {name: value for name, value in config.items() if not name.startswith("_")}


def write_single_file(out: pathlib.Path, source: Checkpoint, dtype: str, recipe: Recipe) -> pathlib.Path:
    """Writes a single file: UNet, VAE and text encoders under the names of LDM, or of SGM for Stable Diffusion XL.

    Args:
      dtype: float32, float16, bfloat16, or float8_e4m3fn (see `FLOAT8`).

    Raises:
      CheckpointError: a network is damaged or does not fit `dtype`, or `out` exists.
    """
    _refuse_unsupported(source)
    if out.exists():
        raise CheckpointError(f"{out} exists; nothing is overwritten. Give another name.")
    family = source.architecture if source.has("unet") else SD1
    tensors = {}
    for component in source.components:
        config = source.config(component)
        own = state_dict(source, component, "float16" if dtype == FLOAT8 else dtype)
        tensors |= _in_single_file(component, config, own, family)
        if dtype == FLOAT8 and component == "unet":
            tensors |= _scaled(_in_single_file(component, config, state_dict(source, component, "float32"), family))
    tensors |= _schedule_flags(source)
    save(out, Tensors(tensors), metadata(source, recipe, "sgm"))
    return out


def _in_single_file(component, config, tensors, family) -> dict[str, Computed]:
    """Returns a network's tensors under the single file's keys; each is read when the file is written."""

    def reshaped(source, key, shape):
        return Computed(shape, source.dtype(key), lambda: source[key].reshape(shape))

    if component in TEXT_PREFIXES[family]:
        prefix = TEXT_PREFIXES[family][component]
        source = to_open_clip(tensors) if prefix in single_file.OPEN_CLIP else tensors
        return {prefix + key: reshaped(source, key, source.shape(key)) for key in source}
    prefix, entries = single_file.PREFIXES[component][0], {}
    for key in tensors:
        name, shape = single_file.KEYS[component](key, config), tensors.shape(key)
        # LDM's VAE holds the attention's dense layers as 1x1 convolutions.
        is_conv = component == "vae" and ".attn_1." in name and len(shape) == 2
        entries[prefix + name] = reshaped(tensors, key, (*shape, 1, 1) if is_conv else shape)
    return entries


def _scaled(tensors: Mapping[str, Computed]) -> dict[str, Computed]:
    """Returns the dense layers of a UNet in float8 with their scales, as ComfyUI reads them, and its marker.

    Convolutions, norms and biases are not among them: ComfyUI does not scale these.
    """
    empty = np.zeros(0, float8.E4M3)
    entries = {single_file.UNET + float8.MARKER: Computed(empty.shape, empty.dtype, lambda: empty)}

    def encoded(read):
        array = read()
        return float8.encoded(array, float8.scale_for(array))

    for key, tensor in tensors.items():
        if len(tensor.shape) == 2 and key.endswith(".weight"):
            read = tensor.read
            scale = key.removesuffix(".weight") + float8.SCALES[0]
            entries[key] = Computed(tensor.shape, float8.E4M3, functools.partial(encoded, read))
            entries[scale] = Computed((), np.dtype(np.float32), lambda read=read: float8.scale_for(read()))
    return entries


def _schedule_flags(source) -> dict[str, Computed]:
    """Returns the empty tensors from which ComfyUI and A1111 learn how a UNet was trained."""
    flags = {
        "v_pred": source.prediction_type == "v_prediction",
        "ztsnr": source.scheduler_config.get("rescale_betas_zero_snr"),
    }
    empty = np.zeros(0, np.float32)
    return {name: Computed(empty.shape, empty.dtype, lambda: empty) for name, is_set in flags.items() if is_set}


def _refuse_unsupported(source):
    if source.unsupported:
        raise CheckpointError(f"{source.path} cannot be exported: {source.unsupported}")


def state_dict(source: Checkpoint, component: str, dtype: str) -> Tensors:
    """Returns a network's complete state dict under diffusers' keys, of one dtype; each tensor is read when asked for.

    Raises:
      CheckpointError: keys are missing, unexpected or misshapen; on reading, values are not finite or too large for
        `dtype`.
    """
    where = source.where(component)
    tensors = naming.checked_tensors(source.shapes(component), source.tensors(component), where)

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
    """Copies a tokenizer's files unchanged; adds missing vocab.json and merges.txt, which stock readers need."""
    out.mkdir()
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    if not all((out / name).is_file() for name in OLD_FILES):
        write_bpe(source, out)


def _write_json(path: pathlib.Path, value: Mapping) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
