"""The emoji study's recipe at tiny size on drawn stand-ins: every stage once, in its order."""

import json
import math
import os
import pathlib
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from dmm_jax.checkpoints.abstract import abstract_params
from dmm_jax.checkpoints.naming import torch_shapes
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.recorded_sampling import recorded_sampling
from dmm_jax.config import checks
from dmm_jax.distillation import Distillation
from dmm_jax.models.autoencoder_kl import AutoencoderKL
from dmm_jax.models.unet_config import merged_config
from dmm_jax.runtime.errors import Preempted, UserError
from dmm_jax.studies import (
    emoji_judge,
    emoji_merges,
    emoji_networks,
    emoji_package,
    emoji_pictures,
    emoji_sheet,
    emoji_stages,
)
from dmm_jax.studies.emoji_merges import ROWS
from dmm_jax.studies.emoji_networks import SIZES
from dmm_jax.studies.emoji_study import Study
from dmm_jax.world import training
from dmm_jax.world.training import StretchOver
from tests.studies import emoji_packages

# The tokenizer of the real sets.
VOCABULARY = {"vocab_size": 4354, "bos_token_id": 4352, "eos_token_id": 4353, "pad_token_id": 4353}


JOINT = {"rows": ["joint"], "seeds": [0]}
slow = pytest.mark.slow  # The first test that uses the study makes it: a minute of one core.


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The finished study of two stand-in sets. Compiling its training would take minutes: each network stays as it is.

    The pictures of the measurements are random; `run --size tiny` runs everything in earnest.
    """
    pytest.importorskip("resvg_py", reason="launch/requirements-test.txt installs it")
    folder = tmp_path_factory.mktemp("study")
    sets, names = emoji_packages.write_packages(folder / "packages")
    del sets["outline"]
    emoji_pictures.fetch(folder, sets, names)
    study = Study(folder, SIZES["tiny"], sets)

    def moved(self, params, data, label, seed, stretch):
        """Instead of a fit: parameters that differ from the start, so that no teacher is the base."""
        num_steps = self.plan.num_steps
        stretch.report({"step": num_steps, "num_steps": num_steps, "loss": 1.0, "seconds": 0.0})
        return jax.tree.map(lambda leaf: leaf * (1.0 + 0.001 * seed), params)

    def random_vae(config, *_):
        return training.params_of(AutoencoderKL.from_config(config, rngs=nnx.Rngs(0)))[1]

    def untrained(config, workdir):
        distillation = Distillation(config)
        distillation.save(workdir, distillation.init())
        return {"score": dict.fromkeys(study.sets, 1.0)}

    rng = np.random.default_rng(0)

    def draw_noise(pipeline, jobs, batch_size, **_):
        yield rng.integers(256, size=(len(jobs), 64, 64, 3), dtype=np.uint8), None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Fit, "__call__", moved)
        patch.setattr(training, "add_latents", lambda bank, *_: bank)
        patch.setattr(emoji_stages, "train_vae", random_vae)
        patch.setattr(emoji_merges.train, "run", untrained)
        patch.setattr(emoji_judge, "draw", draw_noise)
        assert emoji_stages.run(study, 0.0, **JOINT) is False and not study.base.exists()
        assert emoji_stages.run(study, 10.0, **JOINT)
    return study


@slow
def test_every_stage_leaves_its_output_and_its_lines(study):
    lines = [json.loads(line) for line in (study.out / "results.jsonl").read_text().splitlines()]
    names = [stage.name for stage in emoji_stages.stages(study, **JOINT)]
    assert [line["stage"] for line in lines if line.get("done")] == names
    trained = {"base", "merge joint, seed 0", "classifier", *(f"teacher {name}" for name in study.sets)}
    assert {line["stage"] for line in lines if line.get("step") == line.get("num_steps", 0)} == trained
    assert emoji_stages.status(study, **JOINT).count("| yes |") == len(names) == 11


@slow
def test_teachers_differ_and_the_student_has_every_style(study):
    student = open_checkpoint(study.student("joint", 0))
    assert student.styles == tuple(study.sets) and student.has("vae") and student.has("text_encoder")
    paths = [*map(study.teacher, study.sets), *study.stock_models.values()]
    assert len({open_checkpoint(path).digest("unet") for path in paths}) == len(paths) == 5
    assert open_checkpoint(study.teacher("round")).license == "MIT"


@slow
def test_the_measures_have_every_model_set_and_strip(study):
    references, (student,) = emoji_judge.read(study)
    assert set(references["models"]) == {"floor", "base", "average", "ties"}
    figures = {"FD (emoji)", *emoji_judge.ACCURACIES}
    for by_set in (*references["models"].values(), student["lines"]):
        assert list(by_set) == list(study.sets) and all(set(line) == figures for line in by_set.values())
    diagonal = [student["matrix"][row][row] for row in range(2)]
    assert diagonal == [student["lines"][name]["FD (emoji)"] for name in study.sets]
    assert all(math.isfinite(value) for row in student["matrix"] for value in row)
    (sums,) = references["strips"].values()
    for strips in (*student["strips"].values(), sums):
        assert [strip["sets"] for strip in strips] == [["round", "square"]]
        assert all(0 <= strip["concept"] <= 1 and strip["largest jump"] > 0 for strip in strips)
    lines = emoji_judge.table(references, [student, student]).splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:]] == [
        ["| floor", "1"], ["| base", "1"], ["| average", "1"], ["| ties", "1"], ["| joint", "2"],
        ["| joint: predictions mixed", "2"],
        ["| weighted sum of two", "1"],
    ]  # fmt: skip


def test_the_base_closes_nothing_and_the_floor_all_of_its_distance():
    models = {name: {"a": {"FD (emoji)": value}} for name, value in {"base": 5.0, "floor": 1.0, "between": 2.0}.items()}
    closed = {name: emoji_judge.closed_shares(by_set, models) for name, by_set in models.items()}
    assert closed == {"base": [0.0], "floor": [1.0], "between": [0.75]}


@slow
def test_what_is_done_is_not_done_again(study, monkeypatch):
    for name in ("make_vae", "make_base", "make_teacher", "train_student", "merge_weights", "make_classifier"):
        monkeypatch.setattr(emoji_stages, name, lambda *_: pytest.fail("done again"))
    monkeypatch.setattr(emoji_judge, "Judge", lambda *_: pytest.fail("measured again"))
    assert emoji_stages.run(study, 10.0, **JOINT)


@slow
def test_a_study_that_is_given_its_base_begins_with_the_teachers(study, tmp_path):
    other = Study(tmp_path, study.size, study.sets)
    (tmp_path / "pictures").symlink_to(study.folder / "pictures")
    shutil.copytree(study.base, other.base)
    assert emoji_stages.run(other, 10.0, only=["vae", "base"]) and not (other.out / "results.jsonl").exists()
    digests = [open_checkpoint(of.base).digest("unet") for of in (study, other)]
    assert digests[0] == digests[1] and sorted(other.base_params) == ["text_encoder", "unet", "vae"]


@slow
def test_a_stage_that_is_deleted_is_made_again_from_what_was_trained(study, monkeypatch):
    path = study.teacher("round")
    before = open_checkpoint(path).digest("unet")
    path.unlink()
    monkeypatch.setattr(emoji_stages.Fit, "__call__", lambda *_, **__: pytest.fail("trained again"))
    assert emoji_stages.run(study, 10.0, only=["teacher round"])
    assert open_checkpoint(path).digest("unet") == before


@slow
def test_prompts_are_captions_of_seen_concepts_then_of_held_out_ones(study):
    prompts = emoji_judge.prompts_of(study.rows, 40)
    splits = {row["concept"]: row["split"] == "train" for row in study.rows}
    assert [splits[concept] for concept, _ in prompts] == [True] * 40 + [False] * 10
    assert {caption for _, caption in prompts} <= {row["caption"] for row in study.rows}


@slow
def test_a_sheet_shows_what_people_drew_and_every_model_drew(study, monkeypatch):
    chosen = emoji_sheet.chosen_rows(study)
    splits = [{row["split"] for row in by_set.values()} == {"train"} for by_set in chosen]
    assert all(list(by_set) == list(study.sets) for by_set in chosen) and splits == sorted(splits, reverse=True)
    assert not all(splits)  # Held-out concepts are last.
    drawn = []

    def draw_grey(pipeline, jobs, batch_size, **_):
        drawn.append([(prompt, seed) for prompt, _, seed in jobs])
        yield np.full((len(jobs), 64, 64, 3), 128, np.uint8), None

    monkeypatch.setattr(emoji_sheet, "draw", draw_grey)
    with Image.open(emoji_sheet.write_sheet(study, "joint", 0)) as sheet:
        assert sheet.width > (2 + 1 + 2 + 2) * 64
    assert drawn == [drawn[0]] * 5  # The base, two teachers, the student's two styles: the same prompts and noise.
    with Image.open(emoji_sheet.write_contact_sheet(study, "joint", 0)) as sheet:
        assert sheet.width == 1400 and sheet.height >= 88
    seen = {row["caption"] for row in study.rows if row["split"] == "train"}
    assert {prompt for prompt, _ in drawn[-1]} <= seen and len(drawn[-1]) == min(200, len(set(drawn[-1])))


@slow
def test_a_package_has_the_authors_and_every_prompt(study, tmp_path):
    folder = emoji_package.write_package(study, "joint", 0, tmp_path)
    written, student = open_checkpoint(folder), open_checkpoint(study.student("joint", 0))
    assert folder == tmp_path / "emoji" and written.digest("unet") == student.digest("unet")
    assert written.license == student.license and recorded_sampling(written) == study.sampling
    card = (folder / "README.md").read_text()
    assert all(f"- {name}: {each.author}, {each.license}" in card for name, each in study.sets.items())
    prompts = (folder / "prompts.txt").read_text().splitlines()
    on_white = [row for row in study.rows if " on pale " not in row["caption"]]
    assert set(prompts) == {row["caption"] for row in on_white if row["split"] == "train"}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("row", ROWS)
def test_the_runs_of_each_row_have_valid_configs(size, row, monkeypatch):
    monkeypatch.setattr(emoji_merges, "num_pictures", lambda _: 10_000)
    study = Study(pathlib.Path("emoji"), SIZES[size])
    configs = [emoji_merges.run_config(study, run, 1, pathlib.Path("before")) for run in ROWS[row]]
    for config in configs:
        checks.check(config)
    learned = [name for config in configs for name, _ in config.teachers]
    assert learned == list(study.sets)  # Each set once, in the order of the styles.
    assert {config.seed for config in configs} == {1} and not configs[0].grow.student
    if row == "joint":
        assert configs[0].batch_size == SIZES[size].plans["merge"].batch_size


def num_parameters(size: str) -> int:
    """Returns the parameters of a size's student with seven styles, VAE and text encoder."""
    configs = SIZES[size].configs(VOCABULARY)
    configs["unet"] = merged_config(configs["unet"], 7)
    shapes = (torch_shapes(abstract_params(name, configs[name])) for name in ("unet", "vae", "text_encoder"))
    return sum(math.prod(shape) for network in shapes for shape in network.values())


def test_what_ships_has_25_megabytes_and_large_60_million_weights():
    assert 24e6 < 2 * num_parameters("ship") < 24.9e6  # In float16; the files' headers need some room.
    assert 55e6 < num_parameters("large") < 66e6
    assert set(emoji_networks.STAGES) == set(SIZES["ship"].plans) == set(SIZES["ship"].rates)


@pytest.mark.parametrize(
    "minutes, only, message",
    [
        (-1.0, (), "at least 0; got -1"),
        (math.nan, (), "got nan"),
        (1.0, ["vea"], "no stage vea.*vae"),
        (1.0, (), "fetch"),
    ],
)
def test_a_run_that_cannot_begin_writes_nothing(tmp_path, minutes, only, message):
    with pytest.raises(UserError, match=message):
        emoji_stages.run(Study(tmp_path / "emoji", SIZES["tiny"]), minutes, only)
    assert not any(tmp_path.iterdir())


def test_a_run_is_stopped_by_a_signal_when_the_stretch_ends():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StretchOver, match="not begun"), emoji_merges.stopped_in_time(time.monotonic()):
        time.sleep(60)  # The signal comes before the run has its own handler.
    with pytest.raises(StretchOver, match="step 3 of 9"), emoji_merges.stopped_in_time(time.monotonic() + 600):
        raise Preempted("stopped after step 3 of 9, which is saved.", 0)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_finished_run_is_not_stopped_later(monkeypatch):
    signals = []
    monkeypatch.setattr(os, "kill", lambda *signal: signals.append(signal))
    with emoji_merges.stopped_in_time(time.monotonic() + 0.2):
        pass
    time.sleep(0.5)
    assert signals == []
