"""The adversarial term: who moves what, which class is whose, and a run with a discriminator in it."""

import contextlib
import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmm_jax import train
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.distill import adversarial
from dmm_jax.distill.definition import Definition
from dmm_jax.runtime import sharding
from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.metrics import read

STYLES = jnp.array([0, 1, 1])


def judged(params, x0):
    """A discriminator of 2 x 2 classes that is one matrix."""
    return x0.reshape(len(x0), -1) @ params


@pytest.fixture
def samples():
    student, teacher = jax.random.normal(jax.random.key(0), (2, 3, 2, 2, 4))
    return jax.random.normal(jax.random.key(1), (16, 4)), student, teacher


def test_the_student_moves_no_discriminator_and_is_moved_by_none(samples):
    def mean(name, params, student, teacher):
        return adversarial.errors(judged, params, student, teacher, STYLES, 2)[name].mean()

    for name, moved in (("adversarial", [False, True, False]), ("discriminator", [True, False, False])):
        grads = jax.grad(mean, argnums=(1, 2, 3))(name, *samples)
        assert [bool(jnp.abs(grad).max() > 0) for grad in grads] == moved


def test_classes_are_teachers_first_then_the_student_in_each_style():
    """Logits that are sure of exactly these classes have no error; the student, seen through, has a large one."""
    classes = jnp.concatenate([STYLES + 2, STYLES])
    judge = lambda params, x0: params * jax.nn.one_hot(classes[x0[:, 0, 0, 0].astype(int)], 4)  # noqa: E731
    student, teacher = jnp.arange(6.0).reshape(2, 3, 1, 1, 1)
    values = adversarial.errors(judge, 50.0, student, teacher, STYLES, 2)
    assert np.abs(values["discriminator"]).max() < 1e-6
    np.testing.assert_allclose(values["adversarial"], 50.0, rtol=1e-5)


@pytest.mark.parametrize("prediction_type, refused", [("epsilon", True), ("v_prediction", False)])
def test_epsilon_with_zero_terminal_snr_is_refused(tiny, prediction_type, refused):
    """The clean latents of a one-step prediction are infinite at the last timestep: such steps would be skipped."""
    config = tiny[1].copy_and_resolve_references()
    config.adversarial.weight = 0.01
    base = open_checkpoint(tiny[0]["base"])
    schedule = base.scheduler_config | {"rescale_betas_zero_snr": True, "prediction_type": prediction_type}
    base = dataclasses.replace(base, scheduler_config=schedule)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with pytest.raises(UserError, match="zero terminal SNR") if refused else contextlib.nullcontext():
        Definition(config, base, mesh)


def steps(workdir):
    return [line for line in read(workdir / "metrics.jsonl") if "score" in line]


@pytest.fixture(scope="module")
def config(tiny):
    config = tiny[1].copy_and_resolve_references()
    config.adversarial.weight, config.adversarial.learning_rate = 0.01, 3e-3
    config.num_steps, config.checkpoint_every, config.validation_size, config.warmup_steps = 24, 20, 0, 0
    return config


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A run of 24 steps that was not stopped, and what becomes of it where all is lost after step 20."""
    complete, stopped = (tmp_path_factory.mktemp("adversarial") / name for name in ("whole", "stopped"))
    train.run(config, complete)
    shutil.copytree(complete, stopped, ignore=shutil.ignore_patterns("24"))
    lines = (stopped / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_text("".join(lines[:20]))
    train.run(config, stopped)
    return complete, stopped


def test_the_discriminators_error_falls(finished):
    values = [sum(line["discriminator"].values()) for line in steps(finished[0])]
    assert np.mean(values[-5:]) < np.mean(values[:5]) - 1e-3


def test_the_loss_that_is_logged_is_the_students(finished):
    line = steps(finished[0])[0]
    mean = {name: np.mean(list(line[name].values())) for name in ("score", "feature", "adversarial")}
    assert line["loss"] == pytest.approx(mean["score"] + 0.002 * mean["feature"] + 0.01 * mean["adversarial"])


def test_a_stopped_run_resumes_exactly_with_its_discriminator(finished):
    lines = [steps(folder) for folder in finished]
    assert [line["step"] for line in lines[1]] == [*range(1, 25)]
    for name in ("score", "adversarial", "discriminator", "grad_norm"):
        assert [line[name] for line in lines[0]] == [line[name] for line in lines[1]]


def test_with_a_fixed_backbone_only_the_head_is_trained_and_saved(config, tmp_path, capsys):
    config = config.copy_and_resolve_references()
    config.adversarial.train_backbone, config.num_steps, config.dtype = False, 2, "bfloat16"
    line = train.run(config, tmp_path / "run")
    assert np.isfinite(line["loss"])
    keys = (tmp_path / "run" / "checkpoints" / "2" / "state" / "_METADATA").read_text()
    assert "discriminator" in keys and "'head'" in keys and "'backbone'" not in keys
