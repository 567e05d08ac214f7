"""The run: resumed equals uninterrupted, twice in a row; what is written; what is refused."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from dmm_jax import train
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.states import StateStore
from dmm_jax.config import options as config_lib
from dmm_jax.data.cache import LatentCache
from dmm_jax.gallery.grid import labelled_grid
from dmm_jax.pipeline import Pipeline
from dmm_jax.runtime import processes
from dmm_jax.runtime.metrics import read
from tests import worlds

NUM_STEPS = 6  # Of `trained`.
KILLS = int(os.environ.get("DMM_JAX_KILLS", "5"))  # How many times the kill tests kill.
NOTICE_S = 30  # What Google gives a spot machine between the signal and its end.


def stopped_at(config, step):
    config = config.copy_and_resolve_references()
    config.num_steps = step
    return config


def saved_steps(workdir):
    return [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]


def assert_as_if_it_never_stopped(config, workdir, trained, folder):
    """Lets the run of `workdir` go on, and compares it with one of as many steps that never stopped, bit for bit.

    That is `trained` but where more steps than it has were reached.
    """
    config.num_steps = max(NUM_STEPS - 2, *saved_steps(workdir)) + 2
    train.run(config, workdir)
    if config.num_steps > NUM_STEPS:
        trained = folder / "whole"
        train.run(config, trained)
    whole, parts = (open_checkpoint(one).tensors("unet") for one in (trained, workdir))
    assert all(np.array_equal(whole[key], parts[key]) for key in whole)


def test_a_run_that_was_stopped_twice_equals_one_that_never_stopped_bit_for_bit(tiny, trained, tmp_path):
    for step in (2, 4, 6):
        train.run(stopped_at(tiny[1], step), tmp_path / "run")
    whole, parts = (open_checkpoint(workdir).tensors("unet") for workdir in (trained, tmp_path / "run"))
    assert all(np.array_equal(whole[key], parts[key]) for key in whole)
    lines = [
        [{k: v for k, v in line.items() if k != "images_per_s"} for line in read(d / "metrics.jsonl")]
        for d in (trained, tmp_path / "run")
    ]
    losses = [[(line["step"], line["loss"]) for line in one if "loss" in line] for one in lines]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("start, sources", [("base", ["base"]), ("average", ["left", "right"])])
def test_the_student_starts_from_the_base_or_from_the_mean_of_the_teachers(tiny, tmp_path, start, sources):
    config = stopped_at(tiny[1], 1)  # The first step's rate is the warm-up's: 0.
    config.student_init, config.validation_size = start, 0
    train.run(config, tmp_path / "run")
    found = open_checkpoint(tmp_path / "run").tensors("unet")
    unets = [open_checkpoint(tiny[0][name]).tensors("unet") for name in sources]
    for key in unets[0]:
        mean = sum(np.asarray(unet[key], np.float64) for unet in unets) / len(unets)
        np.testing.assert_allclose(found[key], mean, rtol=1e-6, atol=1e-8, err_msg=key)


def test_the_loss_of_every_teacher_is_written(trained):
    lines = [line for line in read(trained / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(set(line["score"]) == set(worlds.NAMES) for line in lines)


def test_validation_is_written_per_style_and_timestep_bin(trained):
    lines = [line for line in read(trained / "metrics.jsonl") if "validation" in line]
    assert [line["step"] for line in lines] == [3, 6]
    assert all(len(line["validation"][name]) == train.NUM_TIMESTEP_BINS for line in lines for name in worlds.NAMES)


def test_a_changed_config_is_told_when_resuming(tiny, trained, capsys):
    config = tiny[1].copy_and_resolve_references()
    config.learning_rate = 0.5
    train.run(config, trained)  # Finished already: nothing is trained.
    assert "learning_rate: 0.001 -> 0.5" in capsys.readouterr().err
    (trained / "config.json").write_text((trained / "config.json").read_text().replace("0.5", "0.001"))


def test_other_styles_need_another_workdir(tiny, trained):
    config = tiny[1].copy_and_resolve_references()
    config.teachers = (("other", config.teachers[0][1]), config.teachers[1])
    with pytest.raises(ValueError, match="another --workdir"):
        train.run(config, trained)


def test_metrics_past_the_resumed_step_are_dropped(tmp_path):
    from dmm_jax.runtime.metrics import MetricsLog

    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": k}) + "\n" for k in (1, 2, 3)) + '{"step": 4, "lo'
    )
    with MetricsLog(tmp_path, 2, ["a"]):
        pass
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [1, 2]


def test_sigterm_saves_the_step_that_was_reached_and_the_next_run_goes_on_bit_for_bit(tiny, trained, tmp_path, capsys):
    config = tiny[1].copy_and_resolve_references()
    config.checkpoint_every = config.validation_every = 0
    workdir, asked_at = tmp_path / "run", []

    def stop():
        while not any("loss" in line for line in read(workdir / "metrics.jsonl")):
            time.sleep(0.01)
        asked_at.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    config.num_steps = 100_000
    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(processes.Preempted, match="stopped by SIGTERM after step"):
        train.run(config, workdir)
    assert time.monotonic() - asked_at[0] < NOTICE_S
    with StateStore(workdir) as store:
        step = store.latest_step
    assert step == read(workdir / "metrics.jsonl")[-1]["step"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert_as_if_it_never_stopped(config, workdir, trained, tmp_path)


def run_in_a_child(config_json, workdir, settings):
    for name, value in settings.items():
        jax.config.update(name, value)
    train.run(config_lib.from_json(config_json), workdir)


def test_a_run_that_was_killed_at_random_moments_equals_one_that_never_was_bit_for_bit(tiny, trained, tmp_path):
    """The first kill comes when a checkpoint has been written, the others at any moment between the start and then."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dmm_jax.train"])
    config, workdir, rng = stopped_at(tiny[1], 100_000), tmp_path / "run", random.Random(0)
    reached, longest_s = 0, 0.0
    settings = {
        name: getattr(jax.config, name) for name in ("jax_default_matmul_precision", "jax_compilation_cache_dir")
    }
    for _ in range(max(KILLS // 5, 1)):
        child = context.Process(target=run_in_a_child, args=(config_lib.to_json(config), workdir, settings))
        started = time.monotonic()
        child.start()
        if longest_s:
            time.sleep(rng.uniform(0.0, longest_s))
        else:
            while not saved_steps(workdir):
                assert child.is_alive()
                time.sleep(0.01)
            longest_s = 1.2 * (time.monotonic() - started)
        child.kill()
        child.join()
        assert max(saved_steps(workdir), default=0) >= reached
        reached = max(saved_steps(workdir), default=0)
    assert_as_if_it_never_stopped(config, workdir, trained, tmp_path)
    print(f"killed {max(KILLS // 5, 1)} times, up to step {reached}; then as if it never had been")


def test_a_run_without_finite_gradients_stops_with_a_diagnosis_and_keeps_its_last_good_weights(tiny, tmp_path, capsys):
    config = tiny[1].copy_and_resolve_references()
    config.learning_rate, config.warmup_steps, config.max_grad_norm = 1e25, 0, 0.0
    config.num_steps, config.checkpoint_every, config.max_skipped_in_a_row = 50, 2, 3
    with pytest.raises(FloatingPointError) as stopped:
        train.run(config, tmp_path)
    said = str(stopped.value)
    assert "step 4: 3 steps in a row" in said and "the loss of left, right is not finite" in said
    assert "learning rate 1e+25" in said and "lower learning_rate" in said and "dmm-jax inspect" not in said
    lines = read(tmp_path / "metrics.jsonl")
    assert [line["skipped_steps"] for line in lines if "loss" in line] == [0, 1, 2, 3]
    kept = open_checkpoint(tmp_path).tensors("unet")
    assert all(np.isfinite(kept[key]).all() for key in kept)


def test_steps_without_finite_gradients_are_counted_where_none_is_logged(tiny, tmp_path):
    config = tiny[1].copy_and_resolve_references()
    config.learning_rate, config.warmup_steps, config.max_grad_norm = 1e25, 0, 0.0
    config.num_steps, config.checkpoint_every, config.max_skipped_in_a_row = 50, 0, 3
    config.log_every = config.validation_every = 0
    with pytest.raises(FloatingPointError, match="step 4: 3 steps in a row"):
        train.run(config, tmp_path)
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [4]


def test_sigterm_while_the_run_validates_stops_it_before_it_draws(tiny, tmp_path, monkeypatch):
    config = tiny[1].copy_and_resolve_references()
    config.checkpoint_every, config.validation_every, config.samples.every = 0, 2, 2
    config.samples.prompts = ("a star",)

    def validate(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        return {name: [0.0] for name in worlds.NAMES}

    monkeypatch.setattr(train, "build_validator", lambda *_: validate)
    monkeypatch.setattr(train, "build_sampler", lambda *_: lambda *_: pytest.fail("it draws"))
    with pytest.raises(processes.Preempted, match="stopped by SIGTERM after step 2 of 6, which is saved"):
        train.run(config, tmp_path)
    with StateStore(tmp_path) as store:
        assert store.steps == [2]


def test_parameters_that_are_not_finite_are_never_saved(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train.distill_step, "all_finite", lambda state: state["step"] < 4)
    with pytest.raises(FloatingPointError, match="step 4: trained parameters are not finite.*lower learning_rate"):
        train.run(tiny[1].copy_and_resolve_references(), tmp_path)

    with StateStore(tmp_path) as store:
        assert store.steps == [2]


def test_a_run_that_goes_on_with_another_batch_size_goes_on_in_its_data(tiny, trained, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained, tmp_path / "run")
    config = stopped_at(tiny[1], 7)  # Its first steps had batches of another size: ten examples on average.
    config.validation_size, sources, batches = 0, [], train.data_pipeline.batches
    with monkeypatch.context() as patch:
        patch.setattr(StateStore, "notes", lambda *_: {"samples_seen": 60})
        patch.setattr(train.data_pipeline, "batches", lambda *given: sources.append(batches(*given)) or sources[-1])
        train.run(config, tmp_path / "run")
    assert "go on after the 60 samples" in capsys.readouterr().err
    of_four = batches(LatentCache(config.data.cache), config.seed, 1, 4)
    assert np.array_equal(sources[0][6]["input_ids"], [of_four[15]["input_ids"][0], of_four[16]["input_ids"][0]])
    with StateStore(tmp_path / "run") as store:
        assert store.notes(7) == {"samples_seen": 68}


def test_the_diagnosis_names_the_one_style_that_is_at_fault(tiny):
    line = {"step": 9, "skipped_steps": 4, "skipped_in_a_row": 3, "grad_norm": float("nan")}
    line |= {"score": {"left": 0.1, "right": float("inf")}, "feature": {"left": 0.1, "right": 0.1}}
    said = train.diagnosis(line, tiny[1])
    assert "the loss of right is not finite" in said and "dmm-jax inspect" in said and "float32" not in said


@pytest.fixture(scope="module")
def with_and_without(tiny, tmp_path_factory):
    """The workdirs of a run that keeps an average and draws samples every second step, and of one that does not."""
    config = tiny[1].copy_and_resolve_references()
    config.num_steps, config.validation_every = 3, 0
    config.checkpoint_every, config.checkpoints_kept = 1, 0
    without, workdir = (tmp_path_factory.mktemp(name) for name in ("plain", "samples"))
    with pytest.MonkeyPatch.context() as patch:
        if "--xla_cpu_use_fusion_emitters=false" in os.environ["XLA_FLAGS"]:  # With them two programs round alike.
            patch.setitem(train.distill_step.COMPILER_OPTIONS, "cpu", {"xla_cpu_use_fusion_emitters": True})
        train.run(config, without)
        config.ema_decay = 0.5
        config.samples.every, config.samples.prompts, config.samples.num_inference_steps = 2, ("a star", "a square"), 2
        train.run(config, workdir)
    return workdir, without


@pytest.fixture(scope="module")
def with_ema_and_samples(with_and_without):
    return with_and_without[0]


def test_the_average_is_the_closed_form_of_the_steps_before(tiny, with_ema_and_samples):
    states = [restored(with_ema_and_samples, step) for step in (1, 2, 3)]
    teachers = [open_checkpoint(path).params("unet")["conv_in"]["kernel"] for _, path in tiny[1].teachers]
    start = np.mean(teachers, axis=0)
    kernels = [start, *(state["params"]["conv_in"]["kernel"] for state in states)]
    weights = [0.5**3, 0.5**3, 0.5**2, 0.5]  # d^n of the start, (1 - d) d^(n - k) of step k.
    wanted = sum(weight * np.asarray(kernel) for weight, kernel in zip(weights, kernels, strict=True))
    np.testing.assert_allclose(states[-1]["ema"]["conv_in"]["kernel"], wanted, rtol=1e-5, atol=1e-8)
    assert np.abs(wanted - kernels[-1]).max() > 1e-5


def test_a_checkpoint_holds_the_student_its_moments_and_the_counters_and_no_teacher(trained):
    saved = restored(trained, 6)
    assert saved.keys() == {"params", "opt_state", "step", "skipped_steps", "skipped_in_a_row"}
    counted = {name: sum(leaf.size for leaf in jax.tree.leaves(saved[name])) for name in ("params", "opt_state")}
    assert counted["params"] == sum(np.prod(shape) for shape in open_checkpoint(trained).shapes("unet").values())
    assert 2 * counted["params"] <= counted["opt_state"] < 2 * counted["params"] + 10  # Two moments, and their counts.


def restored(workdir, step):
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        return manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore())).state


def test_exports_read_the_average(with_ema_and_samples):
    kernel = open_checkpoint(with_ema_and_samples).params("unet")["conv_in"]["kernel"]
    assert np.array_equal(kernel, restored(with_ema_and_samples, 3)["ema"]["conv_in"]["kernel"])


def test_sample_grids_show_the_average_prompts_down_styles_across(with_ema_and_samples):
    files = sorted(path.name for path in (with_ema_and_samples / "samples").iterdir())
    assert files == ["step_0000002.png", "step_0000003.png"]
    pipeline = Pipeline.from_pretrained(with_ema_and_samples)
    prompts = [prompt for prompt in ("a star", "a square") for _ in worlds.NAMES]
    pictures = pipeline(prompts, styles=list(worlds.NAMES) * 2, num_inference_steps=2, solver="dpmpp_2m")
    grid = labelled_grid(pictures.reshape(2, 2, *pictures.shape[1:]), ["a star", "a square"], worlds.NAMES)
    with Image.open(with_ema_and_samples / "samples" / "step_0000003.png") as drawn:
        assert drawn.size == grid.size
        assert np.abs(np.asarray(drawn.convert("RGB"), int) - np.asarray(grid.convert("RGB"), int)).max() <= 1


def test_average_and_samples_do_not_change_the_student(with_and_without):
    losses = [
        [line["loss"] for line in read(folder / "metrics.jsonl") if "loss" in line] for folder in with_and_without
    ]
    assert len(losses[0]) == 3 and losses[0] == losses[1]
