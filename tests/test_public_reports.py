"""Bugs that users reported to tools of this field, as tests of dmm_jax, with the project and number of each report."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from dmm_jax.checkpoints.average import average
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, save
from dmm_jax.checkpoints.modelspec import Recipe
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.write import write_single_file
from dmm_jax.data.fill_cache import encode_images
from dmm_jax.data.sources import FolderSource
from dmm_jax.runtime.errors import UserError
from tests import families, worlds

TEXT = "cond_stage_model.transformer.text_model."
POSITIONS = f"{TEXT}embeddings.position_ids"
RECIPE = Recipe("tiny", [], None)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The paths of a base and two teachers of Stable Diffusion 1."""
    return worlds.write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    """The paths of a base and two teachers of Stable Diffusion XL."""
    return families.write_world(tmp_path_factory.mktemp("xl"), "sdxl")


@pytest.fixture
def single(world, tmp_path):
    """The base of `world` as a single file."""
    return write_single_file(tmp_path / "one.safetensors", open_checkpoint(world["base"]), "float32", RECIPE)


def rewritten(path, out, change, metadata=None):
    """Writes a safetensors file again after `change(tensors)`; returns the new path."""
    file = TensorFile(path)
    tensors = dict(file)
    change(tensors)
    save(out, tensors, dict(file.metadata) if metadata is None else metadata)
    return out


def digests(checkpoint) -> dict[str, str]:
    return {name: checkpoint.digest(name) for name in checkpoint.components}


def test_header_too_large_names_the_git_lfs_pointer(tmp_path):
    """AUTOMATIC1111/stable-diffusion-webui #8123: HeaderTooLarge, for a file that git had not fetched."""
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 2132696762\n")
    with pytest.raises(CheckpointError, match="is a pointer of git-LFS.*git lfs pull"):
        open_checkpoint(path)


def test_merging_does_not_break_position_ids(world, single, tmp_path):
    """AUTOMATIC1111/stable-diffusion-webui #7450: averaged positions became fractions, and prompts lost their words."""
    merged = {}
    for name, positions in {"sound": np.arange(77)[None], "broken": np.full((1, 77), 0.5, np.float16)}.items():
        teacher = rewritten(
            single, tmp_path / f"{name}.safetensors", lambda it, at=positions: it.update({POSITIONS: at})
        )
        merged[name] = tmp_path / f"merged_{name}.safetensors"
        average(merged[name], world["base"], [teacher, world["left"]], "average", dtype="float32")
    assert digests(open_checkpoint(merged["sound"])) == digests(open_checkpoint(merged["broken"]))
    written = TensorFile(merged["broken"])
    assert POSITIONS not in written or np.array_equal(written[POSITIONS], np.arange(77)[None])


@pytest.mark.parametrize("keys", [("v_pred",), ("v_pred", "ztsnr")])
def test_an_xl_file_with_v_prediction_is_not_read_as_epsilon(xl, tmp_path, keys):
    """invoke-ai/InvokeAI #7495: noise, since the keys v_pred and ztsnr were not looked for."""
    empty = dict.fromkeys(keys, np.zeros(0, np.float32))
    path = rewritten(xl["right"], tmp_path / "v.safetensors", lambda it: it.update(empty), metadata={})
    opened = open_checkpoint(path, xl["base"])
    assert opened.prediction_type == "v_prediction"
    assert bool(opened.scheduler_config.get("rescale_betas_zero_snr")) == ("ztsnr" in keys)


def test_a_folder_of_fp16_variants_becomes_a_single_file(world, tmp_path):
    """huggingface/diffusers #8974: its converter looked for model.safetensors alone."""
    folder = shutil.copytree(world["base"], tmp_path / "half")
    for path in list(folder.rglob("*.safetensors")):
        path.rename(path.with_suffix(".fp16.safetensors"))
    out = write_single_file(tmp_path / "one.safetensors", open_checkpoint(folder), "float32", RECIPE)
    assert digests(open_checkpoint(out, world["base"])) == digests(open_checkpoint(world["base"]))


def test_tucker_factors_of_the_first_and_last_layers_are_folded(world, tmp_path):
    """huggingface/diffusers #11943: lora_mid of conv_in and conv_out had "not been correctly renamed"."""
    base, tensors, rng = open_checkpoint(world["base"]), {}, np.random.default_rng(0)
    for layer in ("conv_in", "conv_out"):
        outputs, inputs = base.shapes("unet")[f"{layer}.weight"][:2]
        shapes = {"up": (outputs, 2, 1, 1), "mid": (2, 2, 3, 3), "down": (2, inputs, 1, 1)}
        tensors |= {f"lora_unet_{layer}.lora_{role}.weight": rng.normal(0, 1, shape).astype(np.float32)
                    for role, shape in shapes.items()}  # fmt: skip
    save(tmp_path / "lyco.safetensors", tensors)
    before, after = base.tensors("unet"), open_checkpoint(f"{world['base']} + {tmp_path / 'lyco.safetensors'}*0.5")
    after = after.tensors("unet")
    for layer in ("conv_in", "conv_out"):
        up, mid, down = (tensors[f"lora_unet_{layer}.lora_{role}.weight"] for role in ("up", "mid", "down"))
        update = 0.5 * np.einsum("or,rshw,si->oihw", up[..., 0, 0], mid, down[..., 0, 0])
        np.testing.assert_allclose(after[f"{layer}.weight"], before[f"{layer}.weight"] + update, rtol=1e-5, atol=1e-5)


def test_the_usual_special_tokens_listed_as_added_are_no_new_ones(world, tmp_path):
    """huggingface/diffusers #5423: "Should have index 49408 but has index 49406 in saved vocabulary"."""
    folder = shutil.copytree(world["base"], tmp_path / "base")
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    special = {token: vocabulary[token] for token in ("<|startoftext|>", "<|endoftext|>")}
    (folder / "tokenizer" / "added_tokens.json").write_text(json.dumps(special))
    prompts = ["a large red circle", ""]
    ids = [open_checkpoint(path).tokenizers()(prompts) for path in (folder, world["base"])]
    np.testing.assert_array_equal(*ids)


def test_photographs_that_exif_alone_turns_are_turned(tmp_path):
    """kohya-ss/sd-scripts #1316: turned photographs were trained on lying on their side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (32, 16), "blue")
    image.paste("red", (0, 0, 16, 16))
    image.save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "a.txt").write_text("a photograph")
    pixels = FolderSource(tmp_path)[0]["image"]
    assert pixels.shape == (32, 16, 3) and pixels[4, 8, 0] > 200 and pixels[28, 8, 2] > 200


def test_position_ids_may_be_there_or_not(single, tmp_path):
    """kohya-ss/sd-scripts #687 and #694: with and without them, files had unexpected or missing keys."""
    with_ids = rewritten(single, tmp_path / "with.safetensors", lambda it: it.update({POSITIONS: np.arange(77)[None]}))
    without = rewritten(single, tmp_path / "without.safetensors", lambda it: it.pop(POSITIONS, None))
    assert digests(open_checkpoint(with_ids)) == digests(open_checkpoint(without)) == digests(open_checkpoint(single))


def test_a_caption_with_a_windows_quote_names_its_file(tmp_path):
    """MNeMoNiCuZ/joy-caption-batch #1: "can't decode byte 0x92 in position 412", and no file was named."""
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"the artist\x92s cat")
    with pytest.raises(UserError, match=r"a.txt, line 1: not UTF-8 text. Save the file as UTF-8."):
        FolderSource(tmp_path)


def test_one_decompression_bomb_or_damaged_file_costs_one_image(tmp_path, monkeypatch):
    """bmaltais/kohya_ss #2641 and ShivamShrirao/diffusers #79: one image stopped the caching of all latents."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for name, size in {"bomb": (60, 60), "broken": (16, 16), "sound": (16, 16)}.items():
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a cat")
    data = (tmp_path / "broken.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(data[:-30])
    sizes = {"sizes": ((8, 8),), "scaling_factor": 1.0, "vae": "", "tokenizer": ""}
    tokens = np.zeros((1, 3), np.int32)
    cache = encode_images(FolderSource(tmp_path), lambda images, _: images[:, ::4, ::4] / 255.0,
                          lambda texts: tokens.repeat(len(texts), 0), tmp_path / "cache", 1, **sizes)  # fmt: skip
    assert len(cache) == 1 and cache.header.dropped == 2


def test_a_lora_that_is_not_applied_is_refused(world, tmp_path):
    """Comfy-Org/ComfyUI #1144 and #5972: "lora key not loaded" went by, and the images ignored the LoRA."""
    layer = "lora_unet_input_blocks_99_0"
    tensors = {f"{layer}.lora_{role}.weight": np.ones((2, 2), np.float32) for role in ("up", "down")}
    save(tmp_path / "other.safetensors", tensors)
    with pytest.raises(CheckpointError, match=layer):
        open_checkpoint(f"{world['base']} + {tmp_path / 'other.safetensors'}")
    save(tmp_path / "lokr.safetensors", {"lora_te2_text_model_encoder_layers_11_mlp_fc2.lokr_w1": np.ones((2, 2))})
    with pytest.raises(CheckpointError, match="(?i)lokr"):
        open_checkpoint(f"{world['base']} + {tmp_path / 'lokr.safetensors'}")


def test_a_file_with_averages_next_to_its_weights_merges(world, single, tmp_path):
    """ogkalu2/Merge-Stable-Diffusion-models-without-distortion #19: KeyError 'model_ema.diffusion_model...'."""
    names = ("model_ema.decay", "model_ema.diffusion_modeltime_embed0weight")
    ema = dict.fromkeys(names, np.ones(1, np.float32))
    teacher = rewritten(single, tmp_path / "ema.safetensors", lambda it: it.update(ema))
    merged = [tmp_path / f"{name}.safetensors" for name in ("with", "without")]
    for out, path in zip(merged, (teacher, single), strict=True):
        average(out, world["base"], [path, world["left"]], "average")
    assert len({TensorFile(out)._start + TensorFile(out).num_bytes for out in merged}) == 1
    assert digests(open_checkpoint(merged[0])) == digests(open_checkpoint(merged[1]))


def test_text_encoders_without_the_prefix_text_model_open(single, tmp_path):
    """d8ahazard/sd_dreambooth_extension #6: "unexpected key embeddings.position_ids" in NovelAI's spelling."""

    def rename(tensors):
        for key in [key for key in tensors if key.startswith(TEXT)]:
            tensors[key.replace("text_model.", "")] = tensors.pop(key)

    renamed = rewritten(single, tmp_path / "nai.safetensors", rename)
    assert digests(open_checkpoint(renamed)) == digests(open_checkpoint(single))


def test_inpainting_models_are_no_size_of_tensor_a_9_but_4(world, tmp_path):
    """s1dlx/meh #42: "The size of tensor a (9) must match the size of tensor b (4)"."""
    key = "model.diffusion_model.input_blocks.0.0.weight"

    def widen(tensors):
        tensors[key] = np.repeat(tensors[key], 3, axis=1)[:, :9]

    path = rewritten(world["left"], tmp_path / "inpainting.safetensors", widen)
    with pytest.raises(CheckpointError, match="inpainting model.*cannot be merged.*Use the plain model"):
        average(tmp_path / "out.safetensors", world["base"], [path, world["right"]], "average")
    assert not (tmp_path / "out.safetensors").exists()


def test_an_xl_file_without_text_encoders_takes_the_bases(xl, tmp_path):
    """hako-mikan/sd-webui-supermerger #407: a merged XL file had no text encoder, and could not be opened."""
    base = open_checkpoint(xl["base"])
    bare = dataclasses.replace(base, components={name: base.components[name] for name in ("unet", "vae")})
    path = write_single_file(tmp_path / "bare.safetensors", bare, "float32", RECIPE)
    assert digests(open_checkpoint(path, xl["base"])) == digests(base)
    average(tmp_path / "out.safetensors", xl["base"], [path, xl["left"]], "average")
    assert set(open_checkpoint(tmp_path / "out.safetensors").components) == set(base.components)
