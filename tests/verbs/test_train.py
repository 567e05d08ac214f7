"""`dmm-jax train`: checkpoints, caches and options that cannot be used are refused before the workdir is made."""

import numpy as np
import pytest

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.checkpoint import Checkpoint, Component
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, save
from dmm_jax.checkpoints.modelspec import Recipe
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.write import write_single_file
from dmm_jax.models.unet_2d_condition import UNet2DConditionModel
from dmm_jax.verbs import main as cli
from tests import worlds


def test_a_dry_run_prints_the_needs_and_writes_nothing(experiment, tmp_path, capsys):
    assert cli.main(["train", *experiment(), "--dry-run"]) == 0
    printed = capsys.readouterr().err
    assert "Compiling the training step" in printed and "Memory per device" in printed and "dry run" in printed
    assert not (tmp_path / "work").exists()


def test_a_missing_checkpoint_is_named(failing, experiment, tmp_path):
    error = failing("train", *experiment(), f"--config.base={tmp_path / 'nothing_here'}")
    assert "there is no checkpoint" in error and "nothing_here" in error and not (tmp_path / "work").exists()


def test_a_truncated_teacher_is_named(failing, experiment, tiny, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(tiny[0]["left"].read_bytes()[:-100])
    error = failing("train", *experiment(left=tmp_path / "cut.safetensors"))
    assert "cut.safetensors" in error and "safetensors file" in error and not (tmp_path / "work").exists()


def test_nan_weights_are_named_by_their_tensor(failing, experiment, tiny, tmp_path):
    tensors = {key: np.array(array) for key, array in TensorFile(tiny[0]["left"]).items()}
    tensors["model.diffusion_model.out.2.weight"].flat[0] = np.nan
    save(tmp_path / "bad.safetensors", tensors)
    error = failing("train", *experiment(left=tmp_path / "bad.safetensors"))
    assert "NaN" in error and "conv_out.weight" in error


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_pickles_are_refused_with_how_to_convert_them(failing, experiment, tmp_path, suffix):
    (tmp_path / f"model{suffix}").write_bytes(b"\x80\x04K\x01.")
    error = failing("train", *experiment(left=tmp_path / f"model{suffix}"))
    assert "run code when it is opened" in error and "weights_only" in error


def test_another_architecture_is_refused_with_both_shapes(failing, experiment, tiny, tmp_path):
    config = worlds.UNET | {"cross_attention_dim": 32}
    unet = naming.to_torch(worlds.random_params(UNet2DConditionModel, config, 0))
    base = open_checkpoint(tiny[0]["base"])
    parts = {"unet": Component(config, lambda: unet)}
    teacher = Checkpoint(tmp_path, "diffusers", parts, base.scheduler_config, None, None)
    write_single_file(tmp_path / "wide.safetensors", teacher, "float32", Recipe("wide", [], None))
    error = failing("train", *experiment(left=tmp_path / "wide.safetensors"))
    assert "cannot be merged" in error and "attn2.to_k" in error and "(64, 64)" in error and "(64, 32)" in error


def test_a_cache_of_another_resolution_is_refused(failing, experiment, tmp_path):
    error = failing("train", *experiment(), "--config.data.resolution=128")
    assert "resolution: expected 128, the cache has 64" in error and not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    "option, expected", [("solver=foo", "there is no solver 'foo'"), ("num_inference_steps=0", "at least 1")]
)
def test_impossible_sample_grids_are_refused(failing, experiment, tmp_path, option, expected):
    grids = ["--config.samples.every=2", "--config.samples.prompts=a", f"--config.sampling.{option}"]
    assert expected in failing("train", *experiment(), *grids) and not (tmp_path / "work").exists()
