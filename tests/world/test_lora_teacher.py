"""The LoRA teacher: training and file agree on the folded weights, and it draws its style."""

import json

import jax
import numpy as np
import pytest

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.evaluation.feature_networks import SHAPES, open_feature_network
from dmm_jax.evaluation.frechet import frechet_distance
from dmm_jax.pipeline import Pipeline
from dmm_jax.world import lora_teacher as lora
from dmm_jax.world.renderer import render
from dmm_jax.world.scenes import sample_scenes
from dmm_jax.world.shipped_checkpoints import BASE, FOLDER, TEACHERS
from dmm_jax.world.styles import STYLES

FILE = FOLDER / TEACHERS["blueprint"].file


@pytest.fixture(scope="module")
def unet():
    return open_checkpoint(FOLDER / BASE).params("unet", np.float32)


@pytest.fixture(scope="module")
def factors(unet):
    return lora.new_factors(unet, jax.random.key(0))


def test_new_factors_do_not_change_the_base(unet, factors):
    for (path, leaf), (_, start) in zip(naming.flat(lora.folded(unet, factors)), naming.flat(unet), strict=True):
        np.testing.assert_array_equal(leaf, start, err_msg=str(path))


def test_training_and_reader_fold_the_same_weights(unet, factors, tmp_path):
    rng = np.random.default_rng(0)
    factors = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float16).astype(np.float32), factors)
    lora.save_lora(tmp_path / "other.safetensors", "other", factors, {})
    read = open_checkpoint(f"{FOLDER / BASE} + {tmp_path / 'other.safetensors'}").params("unet")
    changed = 0
    for (path, expected), (_, leaf), (_, start) in zip(
        *map(naming.flat, (lora.folded(unet, factors), read, unet)), strict=True
    ):
        np.testing.assert_allclose(np.asarray(leaf, np.float32), expected, atol=2e-6, err_msg=str(path))
        changed += not np.array_equal(expected, start)
    assert changed == 78


def test_the_shipped_file_has_kohyas_layout_and_metadata():
    file = TensorFile(FILE)
    layer = "lora_unet_down_blocks_0_resnets_0_conv1"
    assert file.shape(f"{layer}.lora_down.weight") == (lora.RANK, 64, 3, 3)
    assert file.shape(f"{layer}.lora_up.weight") == (64, lora.RANK, 1, 1)
    assert file[f"{layer}.alpha"] == lora.ALPHA and {file.dtype(key) for key in file} == {np.dtype(np.float16)}
    metadata = file.metadata
    assert (metadata["ss_network_module"], metadata["ss_network_dim"]) == ("networks.lora", str(lora.RANK))
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": str(lora.RANK), "conv_alpha": str(lora.ALPHA)}
    assert metadata["ss_v2"] == "False" and metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"


def test_the_teacher_draws_blueprints():
    """With 250 pictures the distances to rendered ones are 22.5 (teacher), 20.6 (other rendered ones), 59 (base)."""
    count, network = 32, open_feature_network(SHAPES)
    scenes, prompts = sample_scenes(np.random.default_rng(0), count)
    truth = render(scenes, STYLES["blueprint"].repeat(count))
    truth = _statistics(network, np.asarray(255.0 * truth).round().astype(np.uint8))
    base = open_checkpoint(FOLDER / BASE)
    stock = Pipeline.for_unet(base, base.unet_config, (), dtype="float32")
    options = {"seeds": list(range(count)), "num_inference_steps": 5, "guidance_scale": 2.5, "solver": "dpmpp_2m"}
    near, far = (
        frechet_distance(_statistics(network, stock.with_unet(model.params("unet"))(prompts, **options)), truth)
        for model in (open_checkpoint(TEACHERS["blueprint"].path()), base)
    )
    assert near < 0.6 * far


def _statistics(network, images):
    return network.empty().update(network.features(images))
