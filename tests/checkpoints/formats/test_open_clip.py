"""OpenCLIP's layout: diffusers' converter finds every tensor, round trips are exact, and damage is refused."""

import numpy as np
import pytest

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints import write as export
from dmm_jax.checkpoints.abstract import abstract_params
from dmm_jax.checkpoints.checkpoint import Checkpoint, Component
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats import open_clip, single_file
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, save
from dmm_jax.checkpoints.open import open_checkpoint

CONFIG = {
    "vocab_size": 50, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2,
    "max_position_embeddings": 77, "hidden_act": "gelu",
}  # fmt: skip
SECOND = CONFIG | {"projection_dim": 32}
PREFIXES = {"text_encoder": single_file.OPEN_CLIP_H, "text_encoder_2": single_file.XL_OPEN_CLIP}
STACK = "transformer.resblocks.1.attn.in_proj_weight"


def tensors(component):
    shapes = naming.torch_shapes(abstract_params(component, SECOND if component == "text_encoder_2" else CONFIG))
    rng = np.random.default_rng(0)
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}


def published_open_clip_h(laid):
    """Returns the encoder as Stability published it: with one unused layer and a projection."""
    layer = {key.replace("blocks.2", "blocks.3"): array for key, array in laid.items() if "blocks.2" in key}
    return laid | layer | {"text_projection": np.ones((128, 128), np.float32), "logit_scale": np.ones((), np.float32)}


def write(folder, component, laid):
    path = folder / "x.safetensors"
    save(path, {PREFIXES[component] + key: np.ascontiguousarray(array) for key, array in laid.items()})
    return path


@pytest.mark.parametrize("component", PREFIXES)
def test_diffusers_converter_finds_every_tensor(component):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    expected, prefix = tensors(component), PREFIXES[component]
    laid = open_clip.to_open_clip(expected)
    ldm = {prefix + key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in laid.items()}
    model = type("Model", (), {"config": transformers.CLIPTextConfig(hidden_size=128)})
    converted = utils.convert_open_clip_checkpoint(model, ldm, prefix)
    assert set(converted) == set(expected)
    assert all(np.array_equal(converted[key].numpy(), expected[key]) for key in expected)


@pytest.mark.parametrize("component", PREFIXES)
def test_an_encoder_comes_back_bit_for_bit_with_its_config(component, tmp_path):
    expected = tensors(component)
    checkpoint = open_checkpoint(write(tmp_path, component, open_clip.to_open_clip(expected)))
    assert set(checkpoint.components) == {component}
    back = naming.to_torch(checkpoint.params(component))
    assert set(back) == set(expected) and all(np.array_equal(back[key], expected[key]) for key in expected)
    config = checkpoint.config(component)
    assert {name: config[name] for name in CONFIG} == CONFIG and config["pad_token_id"] == 0
    assert config["projection_dim"] == (32 if component == "text_encoder_2" else 128)


def test_stable_diffusion_2_uses_all_layers_except_the_last(tmp_path):
    laid = dict(open_clip.to_open_clip(tensors("text_encoder")))
    published = open_checkpoint(write(tmp_path, "text_encoder", published_open_clip_h(laid)))
    assert published.config("text_encoder")["num_hidden_layers"] == 3
    back = naming.to_torch(published.params("text_encoder"))
    assert all(np.array_equal(array, back[key]) for key, array in tensors("text_encoder").items())
    assert {key.rsplit(".", 1)[-1] for key in published.unused if "resblocks" not in key} == {
        "text_projection",
        "logit_scale",
    }
    assert len(published.unused) == 2 + 12


def test_24_layers_are_complete_even_without_the_projection():
    names = [f"transformer.resblocks.{layer}.ln_1.bias" for layer in range(24)]
    assert open_clip.drop_unused_layer(names) == names[:-1]
    assert open_clip.drop_unused_layer(names[:-1]) == names[:-1]


@pytest.mark.parametrize("shape", [(385, 128), (256, 128), (384, 127), ()])
def test_a_stack_without_three_equal_parts_is_misshapen(shape, tmp_path):
    laid = dict(open_clip.to_open_clip(tensors("text_encoder"))) | {STACK: np.zeros(shape, np.float32)}
    with pytest.raises(CheckpointError, match="3 misshapen: .*layers.1.self_attn.q_proj.weight"):
        open_checkpoint(write(tmp_path, "text_encoder", laid)).params("text_encoder")


def test_a_projection_may_be_the_weight_of_a_dense_layer(tmp_path):
    expected = tensors("text_encoder_2")
    laid = dict(open_clip.to_open_clip(expected))
    laid["text_projection.weight"] = np.ascontiguousarray(laid.pop("text_projection").T)
    checkpoint = open_checkpoint(write(tmp_path, "text_encoder_2", laid))
    assert checkpoint.config("text_encoder_2")["projection_dim"] == 32 and checkpoint.unused == ()
    back = naming.to_torch(checkpoint.params("text_encoder_2"))
    assert all(np.array_equal(back[key], expected[key]) for key in expected)


def test_missing_and_unexpected_tensors_are_named(tmp_path):
    laid = dict(open_clip.to_open_clip(tensors("text_encoder_2")))
    del laid["transformer.resblocks.0.attn.in_proj_bias"]
    laid["transformer.resblocks.0.lora_up.weight"] = np.zeros(1, np.float32)
    with pytest.raises(CheckpointError, match="(?s)3 missing: .*q_proj.bias.*1 unexpected: .*lora_up.weight"):
        open_checkpoint(write(tmp_path, "text_encoder_2", laid)).params("text_encoder_2")


def tiny_sd_2(folder, text):
    """Returns a tiny Stable Diffusion 2 with a UNet of ones."""
    unet = {"block_out_channels": [64], "down_block_types": ["CrossAttnDownBlock2D"], "cross_attention_dim": 128,
            "up_block_types": ["CrossAttnUpBlock2D"], "layers_per_block": 1, "use_linear_projection": True,
            "attention_head_dim": [1], "sample_size": 8}  # fmt: skip
    shapes = naming.torch_shapes(abstract_params("unet", unet))
    numbers = {key: np.ones(shape, np.float32) for key, shape in shapes.items()}
    parts = {"unet": Component(unet, lambda: numbers), "text_encoder": Component(CONFIG, lambda: text)}
    schedule = {"prediction_type": "v_prediction"}
    return Checkpoint(folder, "diffusers", parts, schedule, None, None)


def test_an_export_holds_no_unused_layer(tmp_path):
    text, recipe = tensors("text_encoder"), export.Recipe("tiny", [], None)
    out = export.write_single_file(tmp_path / "out.safetensors", tiny_sd_2(tmp_path, text), "float32", recipe)
    keys = set(TensorFile(out))
    assert {f"cond_stage_model.model.{key}" for key in open_clip.to_open_clip(text)} <= keys and "v_pred" in keys
    back = open_checkpoint(out)
    assert back.architecture == "stable-diffusion-v2" and back.prediction_type == "v_prediction"
    assert all(np.array_equal(array, text[key]) for key, array in naming.to_torch(back.params("text_encoder")).items())


def test_sd_2_turbo_has_its_encoder_under_the_refiners_prefix(tmp_path):
    text, recipe = tensors("text_encoder"), export.Recipe("tiny", [], None)
    out = export.write_single_file(tmp_path / "out.safetensors", tiny_sd_2(tmp_path, text), "float32", recipe)
    file = {key: np.array(array) for key, array in TensorFile(out).items()}
    laid = {key.removeprefix(single_file.OPEN_CLIP_H): file.pop(key) for key in list(file) if "cond_stage" in key}
    file |= {single_file.SOLE_OPEN_CLIP + key: array for key, array in published_open_clip_h(laid).items()}
    save(tmp_path / "turbo.safetensors", file)
    turbo = open_checkpoint(tmp_path / "turbo.safetensors")
    assert (turbo.architecture, turbo.unsupported) == ("stable-diffusion-v2", "")
    back = naming.to_torch(turbo.params("text_encoder"))
    assert set(back) == set(text) and all(np.array_equal(array, text[key]) for key, array in back.items())
