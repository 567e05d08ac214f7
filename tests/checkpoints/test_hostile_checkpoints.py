"""Any hostile checkpoint ends well, or in an error for the user: soon, in little memory and in printable text.

A seeded generator changes configs, tokenizers, headers and whole files of sound checkpoints; see tests/hostile.py.
"""

import contextlib
import json
import shutil
import struct

import numpy as np
import pytest

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.abstract import abstract_params
from dmm_jax.checkpoints.compare import merge_problems, standalone_problems
from dmm_jax.checkpoints.formats import single_file
from dmm_jax.checkpoints.formats.safetensors_io import save
from dmm_jax.checkpoints.inspect import inspect
from dmm_jax.checkpoints.inspect_text import render
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.diffusion.schedule import NoiseSchedule
from dmm_jax.runtime.errors import visible
from dmm_jax.world.architecture import SCHEDULER_CONFIG, TEXT_CONFIG, VAE_CONFIG
from dmm_jax.world.tokenizer import tokenizer_fields, write_tokenizer
from tests import hostile
from tests.worlds import UNET

WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
CONFIGS = (
    "model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
    "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json", "tokenizer/special_tokens_map.json",
    "tokenizer/added_tokens.json",
)  # fmt: skip
FIELDS = (  # Fields that the sound configs do not hold.
    "num_models", "addition_embed_type", "transformer_layers_per_block", "addition_time_embed_dim", "eos_token_id",
    "projection_class_embeddings_input_dim", "remat", "attention_implementation", "only_cross_attention",
    "_diffusers_version", "_use_default_values", "trained_betas", "rescale_betas_zero_snr", "timestep_spacing",
    "use_karras_sigmas", "force_zeros_for_empty_prompt", "requires_aesthetics_score", "added_tokens_decoder",
    "additional_special_tokens", "hidden_size", "quantization_config", "use_linear_projection", "latents_mean",
)  # fmt: skip
VALUES = (
    None, True, False, "", "x", "\x1b[31mred", "a" * 10_000, -1, 0, 1, 2, 3, 32, 0.5, -0.5, 1e308, float("nan"),
    float("inf"), 10**9, 2**31, 2**63, -(2**63), 10**400, [], [1], [[1]], [0] * 5, [32] * 1000, [None], ["x", 3], {},
    {"a": 1}, {"content": 3}, {"1": {"content": "b"}}, [[[[[]]]]], "float16", [8, 8], "model_merge", "text_time",
)  # fmt: skip
NAMES = (
    "x", "../../x", "\x1b[31m", "", "a" * 5000, "encoder.layers.999999999.x", "__metadata__", "v_pred", "ztsnr",
    "alphas_cumprod", "model.diffusion_model.input_blocks.999999999.0.op.weight", "input_blocks.0.0.weight",
    "first_stage_model.encoder.down.99999.block.0.conv1.weight", "model.diffusion_model.label_emb.0.0.weight",
    "cond_stage_model.transformer.text_model.encoder.layers.123456789.layer_norm1.weight", "x.weight.absmax",
    "conditioner.embedders.0.model.x", "conditioner.embedders.1.model.text_projection", "model_ema.x",
)  # fmt: skip
SHAPES = ([], [0], [1], [1000], [2, 3], [-1], [2**62], [1] * 9, ["x"], None, [2, 2, 2, 2], [10**9, 0])
DTYPES = ("F64", "F16", "BF16", "I8", "U8", "I64", "BOOL", "F8_E4M3", "F4", "C64", "", None)
CONTENTS = (
    b"", b"{", b"null", b"[]", b"{}", b"\xff\xfe", b"[" * 10**5, b"version https://git-lfs.github.com/spec/v1\n",
    b"<!DOCTYPE html>", b"GGUF\3\0\0\0", b"PK\3\4", b"\x80\4\x95", b"\0" * 100, b"\xff" * 9,
    b'{"a": ' + b"9" * 5000 + b"}",
)  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder `base` and a single file `one.safetensors`, all weights random."""
    out = tmp_path_factory.mktemp("sound")
    folder, tensors, rng = out / "base", {}, np.random.default_rng(0)
    write_tokenizer(folder / "tokenizer")
    text = TEXT_CONFIG | tokenizer_fields(folder / "tokenizer") | {"num_hidden_layers": 1}
    configs = {"unet": UNET, "vae": VAE_CONFIG | {"block_out_channels": [32] * 4}, "text_encoder": text}
    for name, config in configs.items():
        shapes = naming.torch_shapes(abstract_params(name, config))
        arrays = {key: rng.normal(0, 0.1, shape).astype(np.float32) for key, shape in shapes.items()}
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        save(folder / name / f"{WEIGHTS[name]}.safetensors", arrays)
        spell = single_file.KEYS.get(name, lambda key, _: key)
        tensors |= {single_file.PREFIXES[name][0] + spell(key, config): array for key, array in arrays.items()}
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER_CONFIG))
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    save(out / "one.safetensors", tensors, {"modelspec.prediction_type": "epsilon"})
    return out


def change_config(rng, folder):
    path = folder / rng.choice(CONFIGS)
    config = json.loads(path.read_text()) if path.is_file() else {}
    name = rng.choice([*config, *config, *FIELDS])
    if rng.random() < 0.1:
        config.pop(name, None)
    else:
        config[name] = rng.choice(VALUES)
    path.write_text(json.dumps(config))


def change_tokenizer(rng, folder):
    path = folder / "tokenizer" / "vocab.json"
    vocabulary = json.loads(path.read_text())
    token = rng.choice(list(vocabulary))
    kind = rng.choice(["value", "drop", "add", "clear"])
    if kind == "value":
        vocabulary[token] = rng.choice(VALUES)
    elif kind == "add":
        vocabulary[rng.choice(NAMES)] = len(vocabulary)
    else:
        vocabulary = {} if kind == "clear" else {key: v for key, v in vocabulary.items() if key != token}
    path.write_text(json.dumps(vocabulary))
    if rng.random() < 0.3:
        merges = folder / "tokenizer" / "merges.txt"
        merges.write_text(merges.read_text() + rng.choice(["a b c", "x", "\x1b y", "\n\n \n"]))


def change_header(rng, path):
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    name = rng.choice([key for key in header if key != "__metadata__"])
    kind = rng.choice(["rename", "shape", "dtype", "add", "drop", "metadata", "cut", "nan"])
    if kind == "rename":
        header[rng.choice(NAMES)] = header.pop(name)
    elif kind in ("shape", "dtype"):
        header[name][kind] = rng.choice(SHAPES if kind == "shape" else DTYPES)
    elif kind == "add":
        shape = rng.choice([[1], [0], [2, 3], [1000]])
        end = len(data) + 4 * int(np.prod(shape))
        header[rng.choice(NAMES)] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), end]}
        data = data.ljust(end, b"\0")
    elif kind == "drop":
        header.pop(name)
    elif kind == "metadata":
        header["__metadata__"] = rng.choice([{"modelspec.prediction_type": "\x1b"}, {"x": 3}, [], None])
    elif kind == "cut":
        data = data[: rng.randrange(len(data))]
    else:
        data = b"\xff" * len(data)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def change_contents(rng, folder):
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    kind = rng.random()
    if kind < 0.6:
        path.write_bytes(rng.choice(CONTENTS))
    elif kind < 0.8:
        path.unlink()
    else:
        hostile.replace_by_special(rng, path)


def files_of(path) -> list:
    return [file for file in path.rglob("*") if not file.is_dir() or file.is_symlink()] if path.is_dir() else [path]


def damage(rng, path):
    """Changes a copy of a sound folder or file once to three times; a change may find nothing left to change."""
    folder_changes = [change_config] * 5 + [change_tokenizer, change_contents, change_header]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        change, target = rng.choice(folder_changes) if path.is_dir() else change_header, path
        if change is change_header and path.is_dir():
            target = rng.choice(sorted(path.rglob("*.safetensors")))
        with contextlib.suppress(
            ValueError, LookupError, OSError, TypeError, AttributeError, RecursionError, struct.error
        ):
            change(rng, target)
        if any(not file.is_file() or file.is_symlink() or file.stat().st_size > 2**30 for file in files_of(path)):
            return  # Reading such a file again would block, and writing it could lead elsewhere.


def use(path, base) -> bool:
    """Does what the verbs do before they compute; returns whether the checkpoint can be used."""
    report = inspect([path])
    json.dumps(report)
    assert visible(text := render(report)) == text, "control characters"
    opened = open_checkpoint(path, base if path.is_file() else None)
    problems = standalone_problems(opened, "X") + merge_problems(open_checkpoint(base), [("X", opened)])
    for component in opened.components:
        opened.params(component)
    NoiseSchedule.from_config(opened.scheduler_config)
    opened.tokenizers()(["a large red circle", None])
    return not problems


def test_hostile_checkpoints_end_well_or_in_an_error_for_the_user(sound, tmp_path):
    def case(rng, folder):
        path = folder / ("one.safetensors" if rng.random() < 0.35 else "base")
        if path.suffix:
            folder.mkdir(parents=True)
            shutil.copyfile(sound / path.name, path)
        else:
            shutil.copytree(sound / path.name, path)
        damage(rng, path)
        return use(path, sound / "base")

    hostile.run(case, tmp_path, default=36)
