"""Which prompts an evaluation draws, and whether it says truly how many of them were trained on."""

import json

import numpy as np
import pytest

from dmm_jax.config import options as config_lib
from dmm_jax.evaluation.prompts import PROMPT_SEED, choose
from dmm_jax.world import scenes


@pytest.fixture
def config(tmp_path):
    """Of a run on five captioned images."""
    lines = [json.dumps({"file": f"{k}.png", "caption": f"caption {k}"}) for k in range(5)]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    for k in range(5):
        (tmp_path / f"{k}.png").write_bytes(b"")
    config = config_lib.get_config()
    config.data.source = str(tmp_path)
    return config


def test_a_folders_captions_are_drawn_without_repetition_until_they_are_used_up(config):
    found = choose(config, 12)
    assert sorted(found.lines[:5]) == [f"caption {k}" for k in range(5)] and found.lines[5:10] == found.lines[:5]
    assert len(found.lines) == 12 and found.facts["prompts"].startswith("5 of ")
    assert found.facts["prompts trained on"] == "5 of 5"
    config.data.num_examples = 2
    assert set(choose(config, 12).lines) == {"caption 0", "caption 1"}


def test_what_the_teachers_drew_is_drawn_again_where_no_other_prompts_are_given(config, tmp_path):
    (tmp_path / "own.txt").write_text("a\nb\n\nc\n")
    config.data.source, config.data.prompts = "teachers", str(tmp_path / "own.txt")
    found = choose(config, 3)
    assert sorted(found.lines) == ["a", "b", "c"] and found.facts["prompts trained on"] == "3 of 3"


def test_a_files_prompts_keep_their_order_and_the_one_given_now_comes_first(config, tmp_path):
    for name in ("early", "late"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\ncaption 3\n")
    config.evaluation.prompts = str(tmp_path / "early.txt")
    assert choose(config, 2).lines == ["early", "caption 3"]
    found = choose(config, 2, str(tmp_path / "late.txt"))
    assert found.lines == ["late", "caption 3"]
    assert found.facts == {"prompts": f"2 of {tmp_path / 'late.txt'}", "prompts trained on": "1 of 2"}


def test_the_embedded_worlds_are_new_and_those_trained_on_are_counted(config):
    config.data.source, config.data.num_examples, config.seed = "shapes_world", 50, 3
    found = choose(config, 40)
    assert found.lines == list(scenes.sample_scenes(np.random.default_rng(PROMPT_SEED), 40)[1])
    trained = set(scenes.sample_scenes(np.random.default_rng(3), 50)[1])
    assert found.facts["prompts trained on"] == f"{sum(line in trained for line in found.lines)} of 40"


def test_prompts_that_are_not_there_any_more_are_told_with_what_to_do(config, tmp_path):
    config.data.source, config.data.prompts = "teachers", str(tmp_path / "gone.txt")
    with pytest.raises(ValueError, match="no prompt file .*gone.txt.* Or give other prompts: --prompts FILE"):
        choose(config, 3)
    (tmp_path / "new.txt").write_text("a\n")
    assert choose(config, 3, str(tmp_path / "new.txt")).facts["prompts trained on"].startswith("unknown: ")
