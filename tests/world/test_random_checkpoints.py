"""Random checkpoints: published layouts, and teachers that differ from the base by the chosen strength."""

import json

import numpy as np
import pytest

from dmm_jax.checkpoints.inspect import inspect
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.data.sources import FolderSource
from dmm_jax.world import random_checkpoints


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("random")
    random_checkpoints.write_checkpoints(out, random_checkpoints.SIZES["tiny"], num_teachers=2, strength=0.1)
    random_checkpoints.write_images(out / "images", 3)
    return out


def test_random_checkpoints_can_be_merged(folder):
    report = inspect([folder / "base", folder / "teacher_0.safetensors", folder / "teacher_1.safetensors"])
    assert report["mergeable"], json.dumps(report, indent=1)


def test_the_tiny_xl_has_the_layers_of_xl():
    """Its text encoders give the widths that its UNet reads, and one group of blocks runs as a loop."""
    unet, texts = (random_checkpoints.SIZES["tiny_xl"][name] for name in ("unet", "text_encoder_2"))
    widths = [random_checkpoints.SIZES["tiny_xl"][name]["hidden_size"] for name in ("text_encoder", "text_encoder_2")]
    assert unet["cross_attention_dim"] == sum(widths) and max(unet["transformer_layers_per_block"]) == 4
    pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
    assert pooled == texts["projection_dim"]


def test_teachers_differ_from_the_base_by_the_strength(folder):
    names = ("base", "teacher_0.safetensors", "teacher_1.safetensors")
    base, *teachers = (open_checkpoint(folder / name).tensors("unet") for name in names)
    key = "down_blocks.0.resnets.0.conv1.weight"
    weight, *moved = (np.float32(tensors[key]) for tensors in (base, *teachers))
    rms = [float(np.sqrt(np.mean(np.square(values - weight)))) for values in moved]
    assert rms == pytest.approx([0.1 * float(np.sqrt(np.mean(np.square(weight))))] * 2, rel=0.05)
    assert not np.array_equal(teachers[0][key], teachers[1][key])


def test_a_tensor_depends_on_seed_and_key_alone():
    shapes = {"a.weight": (4, 3), "b.weight": (4, 3)}
    both = random_checkpoints.random_tensors(shapes, 1)
    alone = random_checkpoints.random_tensors({"b.weight": (4, 3)}, 1)
    np.testing.assert_array_equal(both["b.weight"], alone["b.weight"])
    assert not np.array_equal(both["a.weight"], both["b.weight"])


def test_images_are_a_captioned_folder(folder):
    source = FolderSource(folder / "images")
    assert len(source) == 3 and source[0]["image"].shape == (64, 64, 3) and source[0]["caption"]
