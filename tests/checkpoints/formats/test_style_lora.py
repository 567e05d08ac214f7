"""A style file is the difference of two stock exports, under the keys that the tools' sources read."""

import hashlib
import json

import numpy as np
import pytest

from dmm_jax.checkpoints import naming, write
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats import style_lora
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, raw_bytes

WEIGHTS, BASE = np.array([0.7, 0.5, -0.2], np.float32), np.full(3, 1 / 3, np.float32)
LDM_BIAS, LDM_WEIGHT = (f"model.diffusion_model.time_embed.2.{leaf}" for leaf in ("bias", "weight"))
DIFF = "lora_unet_time_embedding_linear_2.diff_b"


def written(student, recipe, out, dtype="float32", tools=("comfyui",)):
    return style_lora.write_style_lora(out / style_lora.NAME, student, WEIGHTS, BASE, dtype, tools, recipe)


def test_a_stock_export_of_the_base_mix_plus_the_file_is_the_styles_own_export(student, recipe, tmp_path):
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("base", "style")}
    for path, weights in zip(paths.values(), (BASE, WEIGHTS), strict=True):
        write.write_single_file(path, write.fold(student, weights), "float32", recipe)
    base, style = (TensorFile(path) for path in paths.values())
    difference = TensorFile(written(student, recipe, tmp_path))[DIFF]
    assert np.abs(difference).max() > 1e-2
    np.testing.assert_allclose(base[LDM_BIAS] + 1.0 * difference, style[LDM_BIAS], rtol=0, atol=1e-6)
    assert [key for key in base if not np.array_equal(base[key], style[key])] == [LDM_BIAS]


def test_strengths_that_sum_to_1_blend_the_styles_vectors_and_strength_0_is_the_base(student):
    one, two = np.eye(3, dtype=np.float32)[:2]
    vectors = [style_lora.style_difference(student, weights, BASE) for weights in (one, two)]
    tensors = naming.to_torch(student.params("unet"))
    ends = [write.style_vector(tensors, "add_embedding", weights) for weights in (one, two, BASE)]
    blended = 0.25 * vectors[0] + 0.75 * vectors[1] + ends[2]
    np.testing.assert_allclose(blended, 0.25 * ends[0] + 0.75 * ends[1], rtol=1e-5, atol=1e-6)
    assert not style_lora.style_difference(student, BASE, BASE).any()


def test_the_keys_are_those_that_each_tool_asks_for(student):
    difference = style_lora.style_difference(student, WEIGHTS, BASE)
    width, module = len(difference), "unet.time_embedding.linear_2"
    everything = style_lora.lora_tensors(difference, "float16", style_lora.TOOLS)
    assert {key: tensor.shape for key, tensor in everything.items()} == {
        DIFF: (width,),
        "lora_unet_time_embedding_linear_2.diff": (width, width),
        f"{module}.lora_A.weight": (1, width),
        f"{module}.lora_B.weight": (width, 1),
        f"{module}.lora_B.bias": (width,),
    }  # fmt: skip
    assert list(style_lora.lora_tensors(difference, "float16", ["comfyui"])) == [DIFF]
    assert sorted(key for key, tensor in everything.items() if tensor.any()) == [DIFF, f"{module}.lora_B.bias"]
    with pytest.raises(ValueError, match="--lora-for takes comfyui, diffusers, a1111; got forge"):
        style_lora.lora_tensors(difference, "float16", ["forge"])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_file_is_below_10_kb_at_the_width_of_stable_diffusion(tmp_path, dtype, student, recipe, monkeypatch):
    monkeypatch.setattr(style_lora, "style_difference", lambda *_: np.ones(1280, np.float32))
    assert written(student, recipe, tmp_path, dtype).stat().st_size < 10_000


def test_the_file_says_what_it_is_and_how_to_know_its_base(student, recipe, tmp_path):
    said = TensorFile(written(student, recipe, tmp_path, "float16")).metadata
    assert said["modelspec.architecture"] == "stable-diffusion-v1/lora" and said["format"] == "pt"
    base = json.loads(said[style_lora.BASE_KEY])
    out = write.write_single_file(tmp_path / "base.safetensors", write.fold(student, BASE), "float16", recipe)
    assert base["bias_sha256"] == hashlib.sha256(raw_bytes(TensorFile(out)[LDM_BIAS])).hexdigest()
    mixed = dict(part.split("=") for part in base["style"].split(","))
    assert tuple(mixed) == student.styles and [np.float32(weight) for weight in mixed.values()] == BASE.tolist()


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a1111s_documented_rule_makes_the_styles_export_of_the_base_mixs(student, recipe, tmp_path, strength):
    """No package has A1111's loader; this is the rule that its extensions-builtin/Lora follows, applied to values."""
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for path, mix in zip(paths, (BASE, WEIGHTS), strict=True):
        write.write_single_file(path, write.fold(student, mix), "float32", recipe)
    base, style = map(TensorFile, paths)

    def used(tools):
        (tmp_path / style_lora.NAME).unlink(missing_ok=True)
        file = TensorFile(written(student, recipe, tmp_path, tools=tools))
        modules = {}
        for key in file:
            modules.setdefault(key.split(".")[0], {})[key.split(".", 1)[1]] = file[key]
        after = {key: np.array(base[key]) for key in (LDM_WEIGHT, LDM_BIAS)}
        for name, parts in modules.items():
            number = name.removeprefix("lora_unet_time_embedding_linear_")
            if number.isdecimal() and "diff" in parts:  # Without it the module is of no kind that is known.
                layer = f"model.diffusion_model.time_embed.{2 * int(number) - 2}"
                after[f"{layer}.weight"] += strength * parts["diff"]
                after[f"{layer}.bias"] += strength * parts["diff_b"]
        return after

    wanted = base[LDM_BIAS] + strength * (style[LDM_BIAS] - base[LDM_BIAS])
    after = used(("a1111",))
    np.testing.assert_allclose(after[LDM_BIAS], wanted, rtol=0, atol=1e-6)
    assert np.array_equal(after[LDM_WEIGHT], base[LDM_WEIGHT])
    assert np.array_equal(used(("comfyui",))[LDM_BIAS], base[LDM_BIAS])


def test_nothing_is_overwritten(student, recipe, tmp_path):
    (tmp_path / style_lora.NAME).write_text("mine")
    with pytest.raises(CheckpointError, match="nothing is overwritten"):
        written(student, recipe, tmp_path)
    assert (tmp_path / style_lora.NAME).read_text() == "mine"


def test_diffusers_own_loader_makes_the_styles_export_of_the_base_mixs(student, recipe, tmp_path):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    storage = {
        name: write.write_folder(tmp_path / name, write.fold(student, weights), "float32", recipe)
        for name, weights in (("base", BASE), ("style", WEIGHTS))
    }
    file = written(student, recipe, tmp_path, tools=("diffusers",))
    base, style = (
        diffusers.StableDiffusionPipeline.from_pretrained(path, safety_checker=None, local_files_only=True)
        for path in storage.values()
    )
    torch.manual_seed(0)
    given = torch.randn(2, 4, 8, 8), torch.tensor([7, 800]), torch.randn(2, 77, 64)
    with torch.no_grad():
        before = base.unet(*given).sample
        base.load_lora_weights(tmp_path, weight_name=file.name, local_files_only=True)
        after, wanted = base.unet(*given).sample, style.unet(*given).sample
    assert (before - wanted).abs().max() > 1e-3 * wanted.abs().max()
    assert (after - wanted).abs().max() < 1e-5 * wanted.abs().max()
