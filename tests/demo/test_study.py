"""The study: every row is a run that can be made, and the table is the mean and the spread of its traces."""

import pathlib

import numpy as np
import pytest

from dmm_jax import config as config_lib
from dmm_jax.demo import study


@pytest.mark.parametrize("row", study.ROWS)
def test_every_stage_of_a_row_is_a_config_that_can_run(row):
    """And the styles that are learned are the study's, each once; what a student has grown from is kept."""
    learned, before = (), None
    for number, stage in enumerate(study.ROWS[row]):
        config = study.study_config(pathlib.Path("out"), stage.styles, 100, seed=1)
        config = study.stage_config(config, stage, before)
        if stage.replay is not None:
            assert config.grow.student == "stage"
            config.grow.styles, learned = learned, learned + stage.styles
        else:
            learned = stage.styles
        config_lib.check(config)
        assert tuple(config_lib.style_names(config)) == learned and config.num_steps == int(100 * stage.steps)
        assert config.data.cache.endswith("_made") == ("data.source" in stage.changes), number
        before = pathlib.Path("stage")
    assert learned == study.STYLES


def test_the_table_holds_traces_means_and_spreads():
    def both(a, b):
        return {"all": {"a": a, "b": b}, "few": {"a": 10 * a, "b": 10 * b}}

    references = {"row": "references", "seed": 0, "base": both(8.0, 2.0), "floor": both(1.0, 1.0)}
    references |= dict.fromkeys(study.METHODS, both(3.0, 3.0))
    runs = [{"row": "score", "seed": seed, "distances": both(1.0 + seed, 1.0)} for seed in range(3)]
    lines = study.table([references, *runs]).splitlines()
    assert "| base | 10.00 |  | +400.0% | 100.00 |  | +400.0% |  |" in lines
    assert lines[-2] == "| score | 3.00 | 1.00 | +50.0% | 30.00 | 10.00 | +50.0% | 3 |"
    assert lines[-1] == "| floor | 2.00 |  | +0.0% | 20.00 |  | +0.0% |  |"


def test_the_documents_table_is_that_of_the_committed_results():
    docs = pathlib.Path(__file__).parents[2] / "docs"
    assert study.table(study.read(docs / "study" / "results.jsonl")) in (docs / "study.md").read_text()


def test_a_mean_distance_is_of_disjoint_parts():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 21, 3)).astype(np.float32)
    whole = study.mean_distance(a, b, 21)
    halves = [study.mean_distance(a[k : k + 10], b[k : k + 10], 10) for k in (0, 10)]
    assert study.mean_distance(a, b, 10) == pytest.approx(np.mean(halves)) and whole != pytest.approx(np.mean(halves))
    assert study.mean_distance(a, a, 10) == pytest.approx(0.0, abs=1e-5)


def test_relatives_stand_beside_each_other_and_are_styles_of_the_world():
    assert set(study.STYLES) <= set(study.world.STYLES) and len(study.STYLES) == 8


def test_what_rows_have_in_common_is_trained_once_and_everything_in_a_folder_of_its_own():
    chains = [stages[:size] for stages in study.ROWS.values() for size in range(1, len(stages) + 1)]
    nodes = [study.Node(chain, seed) for chain in chains for seed in study.SEEDS]
    distinct = [node for k, node in enumerate(nodes) if node not in nodes[:k]]
    assert len(distinct) < len(nodes)
    assert len({node.folder(pathlib.Path("out"), 10) for node in distinct}) == len(distinct)
    assert {node.row for node in distinct} - {None} == set(study.ROWS)
    assert all(node.parent is None or node.parent in distinct for node in distinct)


def test_a_node_knows_how_much_comes_after_it():
    first = study.Node(study.ROWS["4 + 4"][:1], 0)
    assert first == study.Node(study.ROWS["4 + 2 + 2"][:1], 0)
    assert first.steps_left(["score", "4 + 4"]) == 2.0 and first.steps_left(["4 + 4", "4 + 2 + 2"]) == 3.0
    assert first.steps_left(["score"]) == 0.0
