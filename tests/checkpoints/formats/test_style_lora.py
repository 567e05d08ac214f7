"""A style file holds the difference of two stock exports, under the keys that each tool reads."""

import hashlib
import itertools
import json

import numpy as np
import pytest

from dmm_jax.checkpoints import naming, write
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats import style_lora
from dmm_jax.checkpoints.formats.lora_tools import TOOLS
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, raw_bytes
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.styles import fold_style, style_vector
from dmm_jax.runtime.errors import UserError

WEIGHTS, BASE = np.array([0.7, 0.5, -0.2], np.float32), np.full(3, 1 / 3, np.float32)
LDM_BIAS, LDM_WEIGHT = (f"model.diffusion_model.time_embed.2.{leaf}" for leaf in ("bias", "weight"))
DIFF = "lora_unet_time_embedding_linear_2.diff_b"


def written(student, recipe, out, dtype="float32", tools=("comfyui",)):
    return style_lora.write_style_loras(out, student, WEIGHTS, BASE, dtype, tools, recipe)[0]


def test_the_base_mixs_export_plus_the_file_is_the_styles_export(student, recipe, tmp_path):
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("base", "style")}
    for path, weights in zip(paths.values(), (BASE, WEIGHTS), strict=True):
        write.write_single_file(path, fold_style(student, weights), "float32", recipe)
    base, style = (TensorFile(path) for path in paths.values())
    difference = TensorFile(written(student, recipe, tmp_path))[DIFF]
    assert np.abs(difference).max() > 1e-2
    np.testing.assert_allclose(base[LDM_BIAS] + 1.0 * difference, style[LDM_BIAS], rtol=0, atol=1e-6)
    assert [key for key in base if not np.array_equal(base[key], style[key])] == [LDM_BIAS]


def test_strengths_of_sum_1_blend_vectors_and_strength_0_is_the_base(student):
    first, second = np.eye(3, dtype=np.float32)[:2]
    vectors = [style_lora.style_difference(student, weights, BASE) for weights in (first, second)]
    tensors = naming.to_torch(student.params("unet"))
    ends = [style_vector(tensors, "add_embedding", weights) for weights in (first, second, BASE)]
    blended = 0.25 * vectors[0] + 0.75 * vectors[1] + ends[2]
    np.testing.assert_allclose(blended, 0.25 * ends[0] + 0.75 * ends[1], rtol=1e-5, atol=1e-6)
    assert not style_lora.style_difference(student, BASE, BASE).any()


def test_the_keys_are_those_that_each_tool_asks_for(student):
    difference = style_lora.style_difference(student, WEIGHTS, BASE)
    width, module = len(difference), "unet.time_embedding.linear_2"
    kohya, diffusers = (style_lora.lora_tensors(difference, "float16", it, True) for it in ("kohya", "diffusers"))
    assert {key: tensor.shape for key, tensor in (kohya | diffusers).items()} == {
        DIFF: (width,),
        "lora_unet_time_embedding_linear_2.diff": (width, width),
        f"{module}.lora_A.weight": (1, width),
        f"{module}.lora_B.weight": (width, 1),
        f"{module}.lora_B.bias": (width,),
    }  # fmt: skip
    assert list(style_lora.lora_tensors(difference, "float16", "kohya")) == [DIFF]
    changing = sorted(key for key, tensor in (kohya | diffusers).items() if tensor.any())
    assert changing == [DIFF, f"{module}.lora_B.bias"]


SOME_TOOLS = [some for count in (1, 2, 3) for some in itertools.combinations(TOOLS, count)]


@pytest.mark.parametrize("tools", SOME_TOOLS, ids=",".join)
def test_our_reader_reads_the_files_for_any_tools(student, recipe, tmp_path, tools):
    base = write.write_single_file(tmp_path / "base.safetensors", fold_style(student, BASE), "float32", recipe)
    files = style_lora.write_style_loras(tmp_path, student, WEIGHTS, BASE, "float32", tools, recipe)
    assert len(files) == len({TOOLS[tool] for tool in tools})
    expected = fold_style(student, WEIGHTS).tensors("unet")
    for file in files:
        tensors = open_checkpoint(f"{base} + {file}").tensors("unet")
        for key in expected:
            np.testing.assert_allclose(tensors[key], expected[key], rtol=0, atol=1e-6, err_msg=key)


def test_another_base_than_the_file_s_own_is_refused(student, recipe, tmp_path):
    file = written(student, recipe, tmp_path, "float16")
    for dtype, mix, is_right in (
        ("float16", BASE, True), ("float32", BASE, True), ("float16", WEIGHTS, False), ("float32", WEIGHTS, False),
    ):  # fmt: skip
        folded = fold_style(student, mix)
        base = write.write_single_file(tmp_path / f"{dtype}_{is_right}.safetensors", folded, dtype, recipe)
        if is_right:
            assert open_checkpoint(f"{base} + {file}").loras
            continue
        with pytest.raises(CheckpointError, match=f"anime=.*{base.name} is not that export.*meaningless"):
            open_checkpoint(f"{base} + {file}")


@pytest.mark.parametrize("tools", [["forge"], []])
def test_an_unknown_tool_is_an_error(student, recipe, tmp_path, tools):
    with pytest.raises(UserError, match="--lora-for takes comfyui, diffusers, a1111; got (forge|nothing)"):
        written(student, recipe, tmp_path, tools=tools)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_file_is_below_10_kb_at_the_width_of_stable_diffusion(tmp_path, dtype, student, recipe, monkeypatch):
    monkeypatch.setattr(style_lora, "style_difference", lambda *_: np.ones(1280, np.float32))
    assert written(student, recipe, tmp_path, dtype).stat().st_size < 10_000


def test_the_metadata_identifies_the_file_and_its_base(student, recipe, tmp_path):
    metadata = TensorFile(written(student, recipe, tmp_path, "float16")).metadata
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora" and metadata["format"] == "pt"
    base = json.loads(metadata[style_lora.BASE_KEY])
    out = write.write_single_file(tmp_path / "base.safetensors", fold_style(student, BASE), "float16", recipe)
    assert base["bias_sha256"] == hashlib.sha256(raw_bytes(TensorFile(out)[LDM_BIAS])).hexdigest()
    mixed = dict(part.split("=") for part in base["style"].split(","))
    assert tuple(mixed) == student.styles and [np.float32(weight) for weight in mixed.values()] == BASE.tolist()


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a1111s_documented_rule_gives_the_styles_export(student, recipe, tmp_path, strength):
    """No package has A1111's loader; this test applies the rule of its extensions-builtin/Lora."""
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for path, mix in zip(paths, (BASE, WEIGHTS), strict=True):
        write.write_single_file(path, fold_style(student, mix), "float32", recipe)
    base, style = map(TensorFile, paths)

    def applied(tools):
        (folder := tmp_path / tools[0]).mkdir()
        file = TensorFile(written(student, recipe, folder, tools=tools))
        modules = {}
        for key in file:
            modules.setdefault(key.split(".")[0], {})[key.split(".", 1)[1]] = file[key]
        after = {key: np.array(base[key]) for key in (LDM_WEIGHT, LDM_BIAS)}
        for name, parts in modules.items():
            number = name.removeprefix("lora_unet_time_embedding_linear_")
            if number.isdecimal() and "diff" in parts:  # A1111 does not recognise a module without it.
                layer = f"model.diffusion_model.time_embed.{2 * int(number) - 2}"
                after[f"{layer}.weight"] += strength * parts["diff"]
                after[f"{layer}.bias"] += strength * parts["diff_b"]
        return after

    expected = base[LDM_BIAS] + strength * (style[LDM_BIAS] - base[LDM_BIAS])
    after = applied(("a1111",))
    np.testing.assert_allclose(after[LDM_BIAS], expected, rtol=0, atol=1e-6)
    assert np.array_equal(after[LDM_WEIGHT], base[LDM_WEIGHT])
    assert np.array_equal(applied(("comfyui",))[LDM_BIAS], base[LDM_BIAS])


@pytest.mark.parametrize("name", ["style_lora.safetensors", "style_lora_diffusers.safetensors"])
def test_nothing_is_overwritten(student, recipe, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(CheckpointError, match="nothing is overwritten"):
        written(student, recipe, tmp_path, tools=("comfyui", "diffusers"))
    assert (tmp_path / name).read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_diffusers_own_loader_gives_the_styles_export(student, recipe, tmp_path):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    storage = {
        name: write.write_folder(tmp_path / name, fold_style(student, weights), "float32", recipe)
        for name, weights in (("base", BASE), ("style", WEIGHTS))
    }
    file = written(student, recipe, tmp_path, tools=("diffusers",))
    base, style = (
        diffusers.StableDiffusionPipeline.from_pretrained(path, safety_checker=None, local_files_only=True)
        for path in storage.values()
    )
    torch.manual_seed(0)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([7, 800]), torch.randn(2, 77, 64)
    with torch.no_grad():
        before = base.unet(*inputs).sample
        base.load_lora_weights(tmp_path, weight_name=file.name, local_files_only=True)
        after, expected = base.unet(*inputs).sample, style.unet(*inputs).sample
    assert (before - expected).abs().max() > 1e-3 * expected.abs().max()
    assert (after - expected).abs().max() < 1e-5 * expected.abs().max()
