"""An evaluation chooses its prompts by their source, and counts those that were trained on."""

import json

import numpy as np
import pytest

from dmm_jax.config.options import get_config
from dmm_jax.evaluation.prompts import PROMPT_SEED, choose_prompts
from dmm_jax.world import scenes


@pytest.fixture
def config(tmp_path):
    """The config of a run on five captioned images."""
    lines = [json.dumps({"file": f"{k}.png", "caption": f"caption {k}"}) for k in range(5)]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    for k in range(5):
        (tmp_path / f"{k}.png").write_bytes(b"")
    config = get_config()
    config.data.source = str(tmp_path)
    return config


def test_a_folders_captions_repeat_only_after_the_last(config):
    prompts = choose_prompts(config, 12)
    assert sorted(prompts.lines[:5]) == [f"caption {k}" for k in range(5)] and prompts.lines[5:10] == prompts.lines[:5]
    assert len(prompts.lines) == 12 and prompts.settings["prompts"].startswith("5 of ")
    assert prompts.settings["prompts trained on"] == "5 of 5"
    config.data.num_examples = 2
    assert set(choose_prompts(config, 12).lines) == {"caption 0", "caption 1"}
    assert prompts.are_captions


def test_teacher_made_data_gives_its_own_prompts(config, tmp_path):
    (tmp_path / "own.txt").write_text("a\nb\n\nc\n")
    config.data.kind, config.data.source = "prompts", str(tmp_path / "own.txt")
    prompts = choose_prompts(config, 3)
    assert sorted(prompts.lines) == ["a", "b", "c"] and prompts.settings["prompts trained on"] == "3 of 3"
    assert not prompts.are_captions


def test_a_file_keeps_its_order_and_has_precedence_over_the_run(config, tmp_path):
    (tmp_path / "late.txt").write_text("late\ncaption 3\n")
    prompts = choose_prompts(config, 2, str(tmp_path / "late.txt"))
    assert prompts.lines == ["late", "caption 3"] and not prompts.are_captions
    assert prompts.settings == {"prompts": f"2 of {tmp_path / 'late.txt'}", "prompts trained on": "1 of 2"}


def test_embedded_world_prompts_are_new_and_counted(config):
    config.data.kind, config.data.num_examples, config.seed = "shapes_world", 50, 3
    prompts = choose_prompts(config, 40)
    assert prompts.lines == list(scenes.sample_scenes(np.random.default_rng(PROMPT_SEED), 40)[1])
    trained = set(scenes.sample_scenes(np.random.default_rng(3), 50)[1])
    assert prompts.settings["prompts trained on"] == f"{sum(line in trained for line in prompts.lines)} of 40"


def test_missing_prompts_are_refused_with_advice(config, tmp_path):
    config.data.kind, config.data.source = "prompts", str(tmp_path / "gone.txt")
    with pytest.raises(ValueError, match="no prompt file .*gone.txt.* Or give other prompts: --prompts FILE"):
        choose_prompts(config, 3)
    (tmp_path / "new.txt").write_text("a\n")
    assert choose_prompts(config, 3, str(tmp_path / "new.txt")).settings["prompts trained on"].startswith("unknown: ")
