"""The run: resumed equals uninterrupted, twice in a row; what is written; what is refused."""

import json

import numpy as np
import pytest

from dmm_jax import train
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.metrics import read
from tests import worlds


def stopped_at(config, step):
    config = config.copy_and_resolve_references()
    config.num_steps = step
    return config


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
    from dmm_jax.metrics import MetricsLog

    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": k}) + "\n" for k in (1, 2, 3)) + '{"step": 4, "lo'
    )
    with MetricsLog(tmp_path, 2, ["a"]):
        pass
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [1, 2]
