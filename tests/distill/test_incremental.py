"""Growing: the old student keeps its styles, new ones are learned, names and parents carry over."""

import json
import shutil

import numpy as np
import pytest

from dmm_jax import train
from dmm_jax.checkpoints import provenance
from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.export import export
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.config import checks
from dmm_jax.config.options import style_names
from dmm_jax.config.serialization import to_json
from dmm_jax.distill import incremental, student
from dmm_jax.models.unet_config import merged_config
from dmm_jax.pipeline import Pipeline
from dmm_jax.runtime.metrics import read
from tests.worlds import UNET


@pytest.fixture(scope="module")
def config(tiny, trained):
    """A student of `left` and `right` that keeps both, one renamed, and learns the base as its null style."""
    config = tiny[1].copy_and_resolve_references()
    config.grow.student, config.grow.styles = str(trained), ("right", "links=left")
    config.teachers = (("none", config.base),)
    config.num_steps, config.validation_every, config.checkpoint_every, config.checkpoints_kept = 3, 1, 1, 0
    config.adversarial.weight = 0.01
    return config


@pytest.fixture(scope="module")
def grown(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("grown") / "run"
    train.run(config, workdir)
    return workdir


def table(path):
    return np.asarray(open_checkpoint(path).tensors("unet")["model_embedding.weight"])


def test_before_the_first_update_a_grown_student_is_the_old_one(grown, trained, tmp_path):
    """The first step's rate is the warm-up's: 0."""
    first, *_, last = (line["validation"] for line in read(grown / "metrics.jsonl") if "validation" in line)
    assert max(first["replay"]) < 1e-9 < 1e-4 < max(first["none"])
    assert max(last["replay"]) > 1e-9
    shutil.copytree(grown, tmp_path / "run", ignore=shutil.ignore_patterns("2", "3"))
    rows = table(tmp_path / "run")
    assert rows.shape[0] == 3
    np.testing.assert_array_equal(rows[:2], table(trained)[[1, 0]])
    assert np.abs(rows - table(grown)).max() > 0


class Old(Checkpoint):
    """The style table of a student that is to grow, and nothing else of a checkpoint."""

    unet_config = {"addition_embed_type": None}

    def __init__(self, table):
        object.__setattr__(self, "table", table)

    def params(self, component):
        return {"model_embedding": {"embedding": self.table}, "add_embedding": {}}


def largest_cosine(rows):
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return np.abs(rows @ rows.T - np.eye(len(rows))).max()


@pytest.mark.parametrize("seed", range(21))
@pytest.mark.parametrize("kept", [[0, 1, 2], [0], [1], [2, 0], [2, 1, 0]])
def test_a_new_style_never_starts_as_a_copy_of_a_kept_one(seed, kept):
    """Kept styles in any subset and order, twice in a row, all with the seed of the first run."""
    config = merged_config(UNET, 3)
    first = student.style_params(config, "zero", seed)["model_embedding"]["embedding"]
    second = incremental.grown_style(Old(first[kept]), ["a", "b"], seed)["model_embedding"]["embedding"]
    third = incremental.grown_style(Old(second[::-1][:3]), ["a", "b", "c"], seed)["model_embedding"]["embedding"]
    for table, old in ((second, first[kept]), (third, second[::-1][:3])):
        np.testing.assert_array_equal(table[: len(old)], old)
        assert largest_cosine(table) < incremental.MAX_COSINE
    fresh = np.concatenate([first, second[len(kept) :], third[3:]])
    assert largest_cosine(fresh) < incremental.MAX_COSINE


def test_a_fresh_row_nearly_parallel_to_another_is_drawn_again(monkeypatch):
    table = np.eye(2, dtype=np.float32)
    monkeypatch.setattr(incremental, "MAX_COSINE", 0.75)  # Few directions in a plane are this far from both axes.
    rows = [incremental.grown_style(Old(table), [name], 0)["model_embedding"]["embedding"] for name in "abcdef"]
    assert max(map(largest_cosine, rows)) < 0.75


def test_old_and_new_styles_are_learned_under_their_names(grown):
    assert open_checkpoint(grown).styles == ("right", "links", "none")
    lines = [line for line in read(grown / "metrics.jsonl") if "score" in line]
    for name in ("score", "adversarial", "discriminator"):
        assert all(sorted(line[name]) == ["none", "replay"] for line in lines)
        assert np.isfinite([list(line[name].values()) for line in lines]).all()


def test_every_style_of_the_old_student_is_replayed(config, grown):
    """Each with its own row: the error of a row that is exchanged shows."""
    cut = config.copy_and_resolve_references()
    cut.grow.styles = ("right",)
    old = incremental.old_student(cut, open_checkpoint(config.base))
    rows = incremental.batch_rows({"none": open_checkpoint(config.base)}, old, 2)
    assert [(row.name, row.first_style, row.num_styles) for row in rows] == [
        ("none", 1, 1),
        ("replay", 0, 1),
        ("replay 2", 0, 1),
    ]
    both = incremental.old_student(config, open_checkpoint(config.base))
    assert [(row.first_style, row.num_styles) for row in incremental.batch_rows({}, both, 1)] == [(0, 2)]


def test_an_old_style_comes_from_the_teacher_of_its_own_round(tiny, config, grown):
    again = config.copy_and_resolve_references()
    again.grow.student, again.grow.styles = str(grown), ("erste=right", "none")
    again.teachers = (("third", str(tiny[0]["left"])),)
    origins = incremental.origins(again)
    assert {name: str(one.path) for name, one in origins.items()} == {
        "erste": str(tiny[0]["right"]), "none": config.base, "third": str(tiny[0]["left"]),
    }  # fmt: skip


def test_the_recipe_holds_the_hashes_of_all_parents_over_all_rounds(tiny, grown):
    found, paths = (
        provenance.parents_of_workdir(grown),
        {"base": "base", "right": "right", "links": "left", "none": "base"},
    )
    told = {name: provenance.record(open_checkpoint(tiny[0][path])) for name, path in paths.items()}
    assert found == told and all(one["files"] for one in found.values())


def test_no_style_is_the_null_style(grown):
    pipeline = Pipeline.from_pretrained(grown)
    none, named = (pipeline.style_weights(style, 1, np.array([999.0])) for style in (None, "none"))
    np.testing.assert_array_equal(none, named)
    assert none.tolist() == [[[0.0, 0.0, 1.0]]]


def test_a_dmm_folder_grows_too_and_its_styles_are_their_own_teachers(config, grown, tmp_path):
    (folder,) = export(grown, tmp_path / "out", ["dmm"], dtype="float32", keep=["null=none", "right"])
    assert open_checkpoint(folder).styles == ("null", "right")
    np.testing.assert_array_equal(table(folder), table(grown)[[2, 0]])
    from_folder = config.copy_and_resolve_references()
    from_folder.grow.student, from_folder.grow.styles = str(folder), ()
    resolved = incremental.resolved(from_folder)
    assert style_names(resolved) == ["null", "right", "none"]
    origins = incremental.origins(resolved)
    bias = "time_embedding.linear_2.bias"
    assert not np.array_equal(origins["null"].tensors("unet")[bias], origins["right"].tensors("unet")[bias])
    assert json.loads(to_json(resolved))["grow"]["styles"] == ["null", "right"]


def test_what_cannot_grow_is_refused(tiny, config, trained):
    base = open_checkpoint(config.base)
    wrong = config.copy_and_resolve_references()
    wrong.grow.styles = ("lefft",)
    with pytest.raises(CheckpointError, match="no style 'lefft'; did you mean 'left'"):
        incremental.old_student(wrong, base)
    wrong.grow.student, wrong.grow.styles = config.base, ()
    with pytest.raises(CheckpointError, match="stock checkpoint"):
        incremental.resolved(wrong)
    wrong.grow.student, wrong.grow.styles = "", ("left",)
    with pytest.raises(ValueError, match="needs grow.student"):
        checks.check(wrong)
    twice = config.copy_and_resolve_references()
    twice.grow.styles = ("a=left", "a=right")
    with pytest.raises(ValueError, match="two styles are to be called 'a'"):
        checks.check(twice)
