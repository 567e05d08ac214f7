"""What users do next with an export works in stock diffusers: ControlNet, IP-Adapter, LCM, and LoRAs of the base."""

import numpy as np
import pytest

from dmm_jax.checkpoints import naming, write
from dmm_jax.checkpoints.modelspec import Recipe
from dmm_jax.checkpoints.open import open_checkpoint
from tests.checkpoints.formats import test_lora

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
IMAGE_WIDTH, SIDE = 24, 16
WEIGHTS = np.array([0.7, 0.5, -0.2], np.float32)


@pytest.fixture(scope="module")
def exported(student, tmp_path_factory):
    """A mix as a stock folder."""
    return write.write_format(
        tmp_path_factory.mktemp("next"), "diffusers", student, WEIGHTS, "float32", Recipe("tiny", [], None)
    )


@pytest.fixture
def pipe(exported):
    """The export in stock diffusers."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(exported, safety_checker=None, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, steps=2, guidance=3.0, **options):
    size = {"height": SIDE, "width": SIDE} if "image" not in options else {}
    return pipe(
        "a large red circle", num_inference_steps=steps, guidance_scale=guidance, output_type="latent",
        generator=torch.manual_seed(0), **size, **options,
    ).images  # fmt: skip


def test_a_controlnet_of_the_base_steers_an_export(pipe, folder):
    base = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet", local_files_only=True)
    torch.manual_seed(1)
    control = diffusers.ControlNetModel.from_unet(base, conditioning_embedding_out_channels=(8, 16))
    parts = {**pipe.components, "controlnet": control, "requires_safety_checker": False}
    steered = diffusers.StableDiffusionControlNetPipeline(**parts)
    steered.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, SIDE, SIDE)
    # A new ControlNet ends in zeros, so that it changes nothing yet.
    torch.testing.assert_close(draw(steered, image=image), draw(pipe))
    with torch.no_grad():
        for block in (*control.controlnet_down_blocks, control.controlnet_mid_block):
            block.weight.normal_(0, 0.1)
    assert (draw(steered, image=image) - draw(pipe)).abs().max() > 1e-3


def ip_adapter(unet):
    """Returns a random IP-Adapter for a UNet, in the form of its published files."""
    torch.manual_seed(2)
    width = unet.config.cross_attention_dim
    projection = {
        "proj.weight": torch.randn(4 * width, IMAGE_WIDTH) / 5, "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width),
    }  # fmt: skip
    cross = [name for name in unet.attn_processors if "attn2" in name]
    layers = {}
    for number, name in enumerate(cross):
        inner = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
        layers |= {f"{2 * number + 1}.to_{part}_ip.weight": torch.randn(inner, width) / 8 for part in "kv"}
    return {"image_proj": projection, "ip_adapter": layers}


def test_an_ip_adapter_of_the_base_guides_an_export(pipe):
    plain = draw(pipe)
    pipe.load_ip_adapter(ip_adapter(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None)
    embeds = [torch.randn(2, 1, IMAGE_WIDTH)]
    pipe.set_ip_adapter_scale(0.0)
    torch.testing.assert_close(draw(pipe, ip_adapter_image_embeds=embeds), plain)
    pipe.set_ip_adapter_scale(1.0)
    assert (draw(pipe, ip_adapter_image_embeds=embeds) - plain).abs().max() > 1e-3


@pytest.mark.parametrize("style", ["kohya", "PEFT"])
def test_a_lora_of_the_base_changes_an_export_as_ours(pipe, exported, folder, tmp_path, style):
    layers = [("unet", test_lora.DENSE), ("unet", test_lora.CONV_1)]
    updates = test_lora.factors(open_checkpoint(folder), layers)
    alpha = test_lora.ALPHA if style == "kohya" else None
    path = test_lora.write(tmp_path / "x.safetensors", test_lora.tensors_of(updates, style, alpha))
    plain = draw(pipe)
    pipe.load_lora_weights(tmp_path, weight_name=path.name, local_files_only=True)
    with_lora = draw(pipe)
    tensors = open_checkpoint(f"{exported} + {path}").tensors("unet")
    names = naming.spellings(tensors)
    pipe.unload_lora_weights()
    pipe.unet.load_state_dict({key: torch.tensor(np.array(tensors[name])) for key, name in names.items()})
    torch.testing.assert_close(with_lora, draw(pipe), rtol=0, atol=1e-5)
    assert (with_lora - plain).abs().max() > 1e-3


def test_an_lcm_lora_draws_from_an_export_in_four_steps(pipe, folder, tmp_path):
    # An LCM-LoRA changes dense layers and convolutions of the UNet, under kohya's names.
    layers = [("unet", layer) for layer in (test_lora.DENSE, test_lora.CONV_1, test_lora.CONV_3)]
    path = test_lora.write(
        tmp_path / "lcm.safetensors", test_lora.tensors_of(test_lora.factors(open_checkpoint(folder), layers))
    )
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    plain = draw(pipe, steps=4, guidance=1.0)
    pipe.load_lora_weights(tmp_path, weight_name=path.name, local_files_only=True)
    fast = draw(pipe, steps=4, guidance=1.0)
    pipe.fuse_lora()
    torch.testing.assert_close(draw(pipe, steps=4, guidance=1.0), fast, rtol=0, atol=1e-4)
    assert torch.isfinite(fast).all() and (fast - plain).abs().max() > 1e-3
