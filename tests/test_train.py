"""The run: a resumed run equals an uninterrupted one; files it writes; configs and gradients it refuses."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image
from tqdm import tqdm

from dmm_jax import train
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.states import StateStore
from dmm_jax.config import serialization
from dmm_jax.data.batches import batches
from dmm_jax.data.cache import LatentCache
from dmm_jax.distill.layout import COMPILER_OPTIONS
from dmm_jax.distill.validation import NUM_TIMESTEP_BINS
from dmm_jax.distillation import Distillation
from dmm_jax.gallery.grid import labelled_grid
from dmm_jax.pipeline import Pipeline
from dmm_jax.runtime.errors import Preempted
from dmm_jax.runtime.metrics import MetricsLog, read
from tests import worlds

NUM_STEPS = 6  # Steps of the fixture `trained`.
KILLS = int(os.environ.get("DMM_JAX_KILLS", "5"))  # How many times the kill tests kill.
NOTICE_S = 30  # Seconds that Google gives a spot machine between the signal and its end.


def changed(config, **values):
    """Returns a copy of the config with options set; a dot is written as two underscores."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in values.items()})
    return config


def saved_steps(workdir):
    return [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]


def assert_same_unet(workdir, expected):
    parts, whole = (open_checkpoint(it).tensors("unet") for it in (workdir, expected))
    assert all(np.array_equal(whole[key], parts[key]) for key in whole)


def assert_resumes_exactly(config, workdir, trained, folder):
    """Continues the run of `workdir` and compares it with one that never stopped, bit for bit.

    That one is `trained`, unless more steps than it has were reached.
    """
    config.num_steps = max(NUM_STEPS - 2, *saved_steps(workdir)) + 2
    train.run(config, workdir)
    if config.num_steps > NUM_STEPS:
        trained = folder / "whole"
        train.run(config, trained)
    assert_same_unet(workdir, trained)


def test_a_run_stopped_twice_equals_an_uninterrupted_one(tiny, trained, tmp_path):
    for step in (2, 4, 6):
        train.run(changed(tiny[1], num_steps=step), tmp_path / "run")
    assert_same_unet(tmp_path / "run", trained)
    lines = [[line for line in read(it / "metrics.jsonl") if "loss" in line] for it in (trained, tmp_path / "run")]
    losses = [[(line["step"], line["loss"]) for line in run] for run in lines]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("start, sources", [("base", ["base"]), ("average", ["left", "right"])])
def test_the_student_starts_from_the_mean_of_its_sources(tiny, tmp_path, start, sources):
    # The learning rate of the first step is 0: the warm-up's.
    train.run(changed(tiny[1], num_steps=1, student_init=start, validation_size=0), tmp_path / "run")
    student = open_checkpoint(tmp_path / "run").tensors("unet")
    unets = [open_checkpoint(tiny[0][name]).tensors("unet") for name in sources]
    for key in unets[0]:
        mean = sum(np.asarray(unet[key], np.float64) for unet in unets) / len(unets)
        np.testing.assert_allclose(student[key], mean, rtol=1e-6, atol=1e-8, err_msg=key)


def test_a_log_line_holds_the_loss_of_every_teacher(trained):
    lines = [line for line in read(trained / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(set(line["score"]) == set(worlds.NAMES) for line in lines)


def test_a_finished_run_has_a_page_with_its_losses(trained):
    page = (trained / "report" / "index.html").read_text()
    assert "Step 6 of 6: finished" in page and "refresh" not in page
    assert page.count("<polyline") == 4 and "left" in page and "right" in page


def test_validation_is_written_per_style_and_timestep_bin(trained):
    lines = [line for line in read(trained / "metrics.jsonl") if "validation" in line]
    assert [line["step"] for line in lines] == [3, 6]
    assert all(len(line["validation"][name]) == NUM_TIMESTEP_BINS for line in lines for name in worlds.NAMES)


def test_a_resume_without_a_step_names_changes_and_writes_none(tiny, trained, capsys):
    files = [trained / "config.json", trained / "parents.json"]
    before = [path.read_bytes() for path in files]
    teachers = tuple((name, str(tiny[0]["right"])) for name in worlds.NAMES)
    train.run(changed(tiny[1], learning_rate=0.5, teachers=teachers, num_steps=5), trained)
    printed = capsys.readouterr().err
    assert "learning_rate: 0.001 -> 0.5" in printed and "has 6 steps and num_steps is 5: nothing" in printed
    assert [path.read_bytes() for path in files] == before  # They describe the steps that were trained.


def test_other_styles_need_another_workdir(tiny, trained):
    config = changed(tiny[1])
    config.teachers = (("other", config.teachers[0][1]), config.teachers[1])
    with pytest.raises(ValueError, match="another --workdir"):
        train.run(config, trained)


def test_a_run_without_a_latent_cache_is_refused_before_it_writes(tiny, tmp_path):
    with pytest.raises(ValueError, match="data.cache is empty: set the folder"):
        train.run(changed(tiny[1], data__cache=""), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_metrics_after_the_resumed_step_are_dropped(tmp_path):
    lines = "".join(json.dumps({"step": k}) + "\n" for k in (1, 2, 3)) + '{"step": 4, "lo'
    (tmp_path / "metrics.jsonl").write_text(lines)
    with MetricsLog(tmp_path, 2, ["a"]):
        pass
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [1, 2]


def test_sigterm_saves_the_current_step_and_the_run_resumes_exactly(tiny, trained, tmp_path):
    config = changed(tiny[1], checkpoint_every=0, validation_every=0, num_steps=100_000)
    workdir, requests = tmp_path / "run", []

    def stop():
        while not any("loss" in line for line in read(workdir / "metrics.jsonl")):
            time.sleep(0.01)
        requests.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(Preempted, match="stopped by SIGTERM after step"):
        train.run(config, workdir)
    assert time.monotonic() - requests[0] < NOTICE_S
    with StateStore(workdir) as store:
        step = store.latest_step
    assert step == read(workdir / "metrics.jsonl")[-1]["step"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert_resumes_exactly(config, workdir, trained, tmp_path)


def run_in_a_child(config_json, workdir, settings):
    for name, value in settings.items():
        jax.config.update(name, value)
    train.run(serialization.from_json(config_json), workdir)


def test_a_run_killed_at_random_moments_resumes_exactly(tiny, trained, tmp_path):
    """The first kill follows the first checkpoint; the others come at any moment between the start and that time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dmm_jax.train"])
    config, workdir, rng = changed(tiny[1], num_steps=100_000), tmp_path / "run", random.Random(0)
    reached, longest_s = 0, 0.0
    names = ("jax_default_matmul_precision", "jax_compilation_cache_dir")
    settings = {name: getattr(jax.config, name) for name in names}
    for _ in range(max(KILLS // 5, 1)):
        child = context.Process(target=run_in_a_child, args=(serialization.to_json(config), workdir, settings))
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
    assert_resumes_exactly(config, workdir, trained, tmp_path)


EXPLODING = {"learning_rate": 1e25, "warmup_steps": 0, "max_grad_norm": 0.0, "num_steps": 50, "max_skipped_in_a_row": 3}


def test_a_run_without_finite_gradients_stops_with_a_diagnosis(tiny, tmp_path):
    with pytest.raises(FloatingPointError) as stopped:
        train.run(changed(tiny[1], checkpoint_every=2, **EXPLODING), tmp_path)
    message = str(stopped.value)
    assert "step 4: 3 steps in a row" in message and "the loss of left, right is not finite" in message
    assert "learning rate 1e+25" in message and "lower learning_rate" in message and "dmm-jax inspect" not in message
    lines = read(tmp_path / "metrics.jsonl")
    assert [line["skipped_steps"] for line in lines if "loss" in line] == [0, 1, 2, 3]
    weights = open_checkpoint(tmp_path).tensors("unet")  # The last good ones.
    assert all(np.isfinite(weights[key]).all() for key in weights)


def test_skipped_steps_are_counted_without_log_lines(tiny, tmp_path):
    config = changed(tiny[1], checkpoint_every=0, log_every=0, validation_every=0, **EXPLODING)
    with pytest.raises(FloatingPointError, match="step 4: 3 steps in a row"):
        train.run(config, tmp_path)
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [4]


def test_a_run_ends_at_the_skip_limit_whatever_it_logs(tiny, tmp_path):
    """All steps are judged, in order, and the first at the limit ends the run, though a later one is finite."""
    config = changed(tiny[1], max_skipped_in_a_row=1)
    metrics = {name: np.zeros(2) for name in ("score", "feature")}
    metrics |= {"grad_norm": np.float32(1), "skipped_steps": np.int32(1), "skipped_in_a_row": np.int32(0)}
    with MetricsLog(tmp_path, 0, worlds.NAMES) as log:
        progress = train.Progress(log, tqdm(disable=True), config, {"score": 1.0, "feature": 0.002})
        log.start_clock(0)
        skipped = metrics | {"skipped_in_a_row": np.int32(1)}
        assert progress.wait(6, metrics) == progress.wait(7, skipped) == progress.wait(8, metrics) == ""
        assert "step 7: 1 steps in a row" in progress.settle()
    with MetricsLog(tmp_path, 7, worlds.NAMES) as log:
        progress = train.Progress(log, tqdm(disable=True), config, {"score": 1.0, "feature": 0.002})
        log.start_clock(7)
        assert progress.wait(8, skipped) == progress.wait(9, skipped) == ""
        assert "step 8: 1 steps in a row" in progress.settle()
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [7, 8]


def test_sigterm_during_validation_stops_before_samples_are_drawn(tiny, tmp_path, monkeypatch):
    config = changed(tiny[1], checkpoint_every=0, validation_every=2, samples__every=2, samples__prompts=("a star",))

    def validate(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        return {name: [0.0] for name in worlds.NAMES}

    monkeypatch.setattr(Distillation, "validate", validate)
    monkeypatch.setattr(Distillation, "pipeline", lambda *_: pytest.fail("it draws"))
    with pytest.raises(Preempted, match="stopped by SIGTERM after step 2 of 6, which is saved"):
        train.run(config, tmp_path)
    with StateStore(tmp_path) as store:
        assert store.steps == [2]


def test_a_restart_makes_up_what_sigterm_left_out_of_the_last_step(tiny, trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_text("".join(f"{json.dumps(line)}\n" for line in read(log) if "validation" not in line))
    drawn = []
    monkeypatch.setattr(train, "draw_samples", lambda *_: drawn.append(1))
    monkeypatch.setattr(Distillation, "validate", lambda *_: {name: [0.25] for name in worlds.NAMES})
    config = changed(tiny[1], samples__every=2, samples__prompts=("a star",))
    for _ in range(2):
        train.run(config, tmp_path / "run")
    assert [line["step"] for line in read(log) if "validation" in line] == [6] and drawn == [1, 1]


def test_a_workdir_of_distillation_save_opens_as_a_checkpoint(tiny, tmp_path):
    distillation = Distillation(tiny[1])
    distillation.save(tmp_path / "run", distillation.init())
    student = open_checkpoint(tmp_path / "run")
    assert student.styles == worlds.NAMES and np.isfinite(student.tensors("unet")["conv_in.weight"]).all()


def test_parameters_that_are_not_finite_are_never_saved(tiny, tmp_path, monkeypatch):
    step = Distillation.step

    def poisoned(self, state, batch):
        state, metrics = step(self, state, batch)
        if state.step == 4:
            state.arrays["small"] = state.arrays["small"] * jnp.nan
        return state, metrics

    monkeypatch.setattr(Distillation, "step", poisoned)
    with pytest.raises(FloatingPointError, match="step 4: trained parameters are not finite.*lower learning_rate"):
        train.run(changed(tiny[1]), tmp_path)
    with StateStore(tmp_path) as store:
        assert store.steps == [2]


def test_a_resume_with_another_batch_size_continues_in_its_data(tiny, trained, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained, tmp_path / "run")
    config = changed(tiny[1], num_steps=7, validation_size=0)
    with monkeypatch.context() as patch:  # Six steps with ten examples on average.
        patch.setattr(StateStore, "notes", lambda *_: {"samples_seen": 60})
        train.run(config, tmp_path / "run")
    assert "go on after the 60 samples" in capsys.readouterr().err
    with StateStore(tmp_path / "run") as store:
        assert store.notes(7) == {"samples_seen": 68}
    batch = next(Distillation(config).batches(6, samples_seen=60))
    four_each = batches(LatentCache(config.data.cache), config.seed, 1, 4)
    assert np.array_equal(batch.input_ids, [four_each[15].input_ids[0], four_each[16].input_ids[0]])


def test_the_diagnosis_names_the_style_whose_loss_is_not_finite(tiny):
    line = {"step": 9, "skipped_steps": 4, "skipped_in_a_row": 3, "grad_norm": float("nan")}
    line |= {"score": {"left": 0.1, "right": float("inf")}, "feature": {"left": 0.1, "right": 0.1}}
    message = train.diagnosis(line, tiny[1])
    assert "the loss of right is not finite" in message and "dmm-jax inspect" in message and "float32" not in message


@pytest.fixture(scope="module")
def with_and_without(tiny, tmp_path_factory):
    """The workdirs of a run with an average and samples every second step, and of one without."""
    config = changed(tiny[1], num_steps=3, validation_every=0, checkpoint_every=1, checkpoints_kept=0)
    without, workdir = (tmp_path_factory.mktemp(name) for name in ("plain", "samples"))
    with pytest.MonkeyPatch.context() as patch:
        if "--xla_cpu_use_fusion_emitters=false" in os.environ["XLA_FLAGS"]:  # With them two programs round alike.
            patch.setitem(COMPILER_OPTIONS, "cpu", {"xla_cpu_use_fusion_emitters": True})
        train.run(config, without)
        config.ema_decay = 0.5
        config.samples.every, config.samples.prompts = 2, ("a star", "a square")
        train.run(config, workdir)
    return workdir, without


@pytest.fixture(scope="module")
def with_ema_and_samples(with_and_without):
    return with_and_without[0]


def test_the_average_equals_its_closed_form_over_steps(tiny, with_ema_and_samples):
    states = [restored(with_ema_and_samples, step) for step in (1, 2, 3)]
    teachers = [open_checkpoint(path).params("unet")["conv_in"]["kernel"] for _, path in tiny[1].teachers]
    kernels = [np.mean(teachers, axis=0), *(state["params"]["conv_in"]["kernel"] for state in states)]
    weights = [0.5**3, 0.5**3, 0.5**2, 0.5]  # d^n for the start, (1 - d) d^(n - k) for step k.
    expected = sum(weight * np.asarray(kernel) for weight, kernel in zip(weights, kernels, strict=True))
    np.testing.assert_allclose(states[-1]["ema"]["conv_in"]["kernel"], expected, rtol=1e-5, atol=1e-8)
    assert np.abs(expected - kernels[-1]).max() > 1e-5


def test_a_checkpoint_holds_student_moments_and_counters_alone(trained):
    saved = restored(trained, 6)
    assert saved.keys() == {"params", "opt_state", "step", "skipped_steps", "skipped_in_a_row"}
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(saved[name])) for name in ("params", "opt_state")}
    assert sizes["params"] == sum(np.prod(shape) for shape in open_checkpoint(trained).shapes("unet").values())
    assert 2 * sizes["params"] <= sizes["opt_state"] < 2 * sizes["params"] + 10  # Two moments, and their counts.


def restored(workdir, step):
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        return manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore())).state


def test_validation_judges_the_average_too(with_and_without):
    lines = [[line for line in read(it / "metrics.jsonl") if "validation" in line] for it in with_and_without]
    (average,), (plain,) = lines
    assert average["validation"] == plain["validation"] and "average_validation" not in plain
    assert average["average_validation"].keys() == set(worlds.NAMES)
    assert average["average_validation_loss"] != average["validation_loss"]


def test_exports_read_the_average(with_ema_and_samples):
    kernel = open_checkpoint(with_ema_and_samples).params("unet")["conv_in"]["kernel"]
    assert np.array_equal(kernel, restored(with_ema_and_samples, 3)["ema"]["conv_in"]["kernel"])


def test_sample_grids_show_the_average_in_every_style(with_ema_and_samples):
    """Rows are prompts, columns are styles."""
    files = sorted(path.name for path in (with_ema_and_samples / "samples").iterdir())
    assert files == ["step_0000002.png", "step_0000003.png"]
    pipeline = Pipeline.from_pretrained(with_ema_and_samples)
    prompts = [prompt for prompt in ("a star", "a square") for _ in worlds.NAMES]
    options = {"seeds": [0, 0, 1, 1], "num_inference_steps": 2, "solver": "dpmpp_2m"}
    pictures = pipeline(prompts, styles=list(worlds.NAMES) * 2, **options)
    grid = labelled_grid(pictures.reshape(2, 2, *pictures.shape[1:]), ["a star", "a square"], worlds.NAMES)
    with Image.open(with_ema_and_samples / "samples" / "step_0000003.png") as image:
        assert image.size == grid.size
        assert np.abs(np.asarray(image.convert("RGB"), int) - np.asarray(grid.convert("RGB"), int)).max() <= 1


def test_average_and_samples_do_not_change_the_student(with_and_without):
    lines = [[line for line in read(it / "metrics.jsonl") if "loss" in line] for it in with_and_without]
    losses = [[line["loss"] for line in run] for run in lines]
    assert len(losses[0]) == 3 and losses[0] == losses[1]


def test_a_run_whose_every_step_was_skipped_fails(tiny, tmp_path):
    config = changed(tiny[1], num_steps=2)  # Fewer than max_skipped_in_a_row.
    metrics = {name: np.full(2, np.nan) for name in ("score", "feature")} | {"grad_norm": np.float32(np.nan)}
    metrics |= {"skipped_steps": np.int32(2), "skipped_in_a_row": np.int32(2)}
    with MetricsLog(tmp_path, 0, worlds.NAMES) as log:
        progress = train.Progress(log, tqdm(disable=True), config, {"score": 1.0, "feature": 0.002})
        log.start_clock(0)
        assert progress.wait(2, metrics) == "" and "2 steps in a row" in progress.settle()
