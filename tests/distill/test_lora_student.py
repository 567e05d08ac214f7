"""A student that trains as a LoRA: what it trains, saves and resumes, and what its run opens and exports as."""

import shutil

import jax
import numpy as np
import pytest

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.export import export
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.styles import fold_style
from dmm_jax.config import checks
from dmm_jax.distill.incremental import one_hot
from dmm_jax.distillation import Distillation
from dmm_jax.models import lora
from dmm_jax.planning import memory
from dmm_jax.runtime import sharding
from dmm_jax.runtime.errors import UserError
from tests import worlds

ONE_DEVICE = sharding.make_mesh(devices=jax.devices()[:1])


def lora_config(tiny):
    config = tiny[1].copy_and_resolve_references()
    config.student_init, config.ema_decay = "base", 0.5
    config.lora.rank, config.lora.conv_rank = 4, 2
    config.learning_rate, config.weight_decay = 1e-2, 0.0
    return config


@pytest.fixture(scope="module")
def run(tiny):
    return Distillation(lora_config(tiny), mesh=ONE_DEVICE)


def stepped(run, state, stop):
    for batch in run.batches(state.step, stop):
        state, metrics = run.step(state, batch)
    return state, metrics


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """A workdir that holds step 2, and the state and metrics of the same run at step 4, without a stop."""
    workdir = tmp_path_factory.mktemp("lora") / "run"
    state, _ = stepped(run, run.init(), 2)
    run.save(workdir, state)
    pipeline = run.pipeline(state)
    return workdir, jax.tree.map(np.asarray, pipeline.unet.params), stepped(run, state, 4)


def test_only_factors_and_the_style_path_are_trained_and_saved(run, trained):
    state = run.abstract_state(looped=False)
    for tree in (state.student.params, state.ema):
        paths = [path for path, _ in naming.flat(tree)]
        assert {path[0] for path in paths if not lora.is_factor(path)} == {"model_embedding", "add_embedding"}
        assert sum(map(lora.is_factor, paths)) == 58
    arrays = run.abstract_state(), run.teachers, run.frozen, run.abstract_batch()
    sizes = memory.array_bytes(*arrays)
    assert sizes["moments"] < 2.01 * sizes["student"] and sizes["gradients"] == sizes["average"] == sizes["student"]
    assert sizes["frozen student"] == sum(leaf.nbytes for leaf in jax.tree.leaves(run.frozen.student))


def test_step_zero_is_the_whole_students(tiny):
    config, full = lora_config(tiny), lora_config(tiny)
    config.loop_blocks, full.lora.rank, full.lora.conv_rank = 1, 0, 0
    runs = [Distillation(it, mesh=ONE_DEVICE) for it in (config, full)]
    students = [it.pipeline(it.init()).unet.params for it in runs]
    assert all(map(np.array_equal, *map(jax.tree.leaves, students)))


def test_a_run_resumes_exactly(run, trained):
    workdir, _, (expected, metrics) = trained
    state, resumed = stepped(run, run.restore(workdir), 4)
    both = [jax.tree.leaves(jax.tree.map(np.asarray, it)) for it in (state.arrays, expected.arrays)]
    assert all(map(np.array_equal, *both)) and np.array_equal(metrics["score"], resumed["score"])
    assert float(metrics["grad_norm"]) > 0


def test_a_run_opens_as_the_student_that_it_draws_with(trained, tiny):
    workdir, drawn_with, _ = trained
    opened, base = open_checkpoint(workdir), open_checkpoint(tiny[0]["base"])
    assert worlds.differing(opened.params("unet"), drawn_with) < 1e-6
    weight = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    assert worlds.differing(opened.tensors("unet")[weight], base.tensors("unet")[weight]) > 1e-3
    assert opened.styles == worlds.NAMES and set(opened.shapes("unet")) == set(opened.tensors("unet"))


def test_a_lora_export_is_the_trained_factors_themselves(trained, tiny, tmp_path):
    workdir, _, _ = trained
    files = export(workdir, tmp_path / "out", ["lora"], "left", "float32", lora_for=("comfyui", "diffusers"))
    saved, tensors = open_checkpoint(workdir).factors(), TensorFile(files[1])
    for key, (up, down) in saved.items():
        layer = f"unet.{key.removesuffix('.weight')}"
        assert np.array_equal(tensors[f"{layer}.lora_A.weight"], down)
        assert np.array_equal(tensors[f"{layer}.lora_B.weight"], up)
    style = fold_style(open_checkpoint(workdir), one_hot(open_checkpoint(workdir), 0)).params("unet")
    for file in files:
        assert worlds.differing(open_checkpoint(f"{tiny[0]['base']} + {file}").params("unet"), style) < 1e-6


def test_a_lora_export_of_less_rank_or_on_another_base_is_decomposed(trained, tiny, tmp_path):
    workdir, _, _ = trained
    (small,) = export(workdir, tmp_path / "small", ["lora"], "left", "float32", rank="1")
    (other,) = export(workdir, tmp_path / "other", ["lora"], "left", "float32", base=tiny[0]["right"])
    downs = [TensorFile(small)[key] for key in TensorFile(small) if key.endswith("lora_down.weight")]
    assert {len(down) for down in downs} == {1}
    weight = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"  # Its rank is at most 64, the default.
    changed = open_checkpoint(f"{tiny[0]['right']} + {other}").tensors("unet")[weight]
    assert worlds.differing(changed, open_checkpoint(workdir).tensors("unet")[weight]) < 1e-4


def test_a_dmm_export_is_the_folded_student(trained, tmp_path):
    workdir, drawn_with, _ = trained
    (folder,) = export(workdir, tmp_path / "out", ["dmm"], dtype="float32")
    assert worlds.differing(open_checkpoint(folder).params("unet"), drawn_with) < 1e-6


def test_a_run_on_a_changed_base_is_refused(run, trained, tiny, tmp_path):
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    config = (workdir / "config.json").read_text()
    (workdir / "config.json").write_text(config.replace(str(tiny[0]["base"]), str(tiny[0]["right"])))
    with pytest.raises(CheckpointError, match="start has changed: the base"):
        open_checkpoint(workdir, tiny[0]["base"]).params("unet")
    config = lora_config(tiny)
    config.student_init = "average"
    with pytest.raises(CheckpointError, match="start has changed"):
        Distillation(config, mesh=ONE_DEVICE).restore(workdir)


def test_a_student_may_start_from_the_mean_of_its_teachers(tiny, tmp_path):
    config = lora_config(tiny)
    config.student_init, config.loop_blocks = "average", 1
    run = Distillation(config, mesh=ONE_DEVICE)
    run.save(tmp_path / "run", run.init())
    teachers = [open_checkpoint(tiny[0][name]).tensors("unet") for name in worlds.NAMES]
    opened = open_checkpoint(tmp_path / "run")
    for key in teachers[0]:
        assert np.allclose(opened.tensors("unet")[key], (teachers[0][key] + teachers[1][key]) / 2, atol=1e-6)
    assert worlds.differing(opened.params("unet"), run.pipeline(run.init()).unet.params) < 1e-6
    assert opened.factors is None  # A LoRA of the base has to be decomposed.


def test_ranks_that_cannot_be_trained_are_refused(tiny):
    config = lora_config(tiny)
    config.lora.rank = 0
    with pytest.raises(UserError, match="lora.conv_rank needs lora.rank"):
        checks.check(config)
    config.lora.rank, config.grow.student = 4, "somewhere"
    with pytest.raises(UserError, match="a student that grows trains whole"):
        checks.check(config)
