"""The study's rows: each is a chain of valid configs, and rows that begin alike share runs."""

import pathlib

import pytest

from dmm_jax.config import checks
from dmm_jax.config.options import style_names
from dmm_jax.studies.shapes_rows import ROWS, SEEDS, SHARES, STYLES, Node, data_of, stage_config, study_config
from dmm_jax.world import styles as world_styles

OUT = pathlib.Path("out")


@pytest.mark.parametrize("row", ROWS)
def test_each_stage_is_a_valid_config_and_a_row_learns_all_styles(row):
    """A student that has grown keeps its styles; no style is learned twice."""
    learned, before = (), None
    for stage in ROWS[row]:
        config = study_config(OUT, stage.styles, 100, seed=1)
        config = stage_config(OUT, config, stage, before)
        if stage.replay is not None:
            assert config.grow.student == "stage"
            config.grow.styles, learned = learned, learned + stage.styles
        else:
            learned = stage.styles
        checks.check(config)
        assert tuple(style_names(config)) == learned and config.num_steps == int(100 * stage.steps)
        assert config.data.cache == str(OUT / "caches" / stage.data)
        before = pathlib.Path("stage")
    assert learned == STYLES


def test_the_eight_styles_are_styles_of_the_world():
    assert set(STYLES) <= set(world_styles.STYLES) and len(STYLES) == 8


def test_data_of_rows():
    assert data_of(["score", "4 + 4"]) == {"rendered"}
    assert data_of(["+ feature, then teacher-made data"]) == {"rendered", "made"}
    assert data_of(ROWS) == {"rendered", "made", "short", *SHARES}


def test_rows_share_nodes_and_each_node_has_its_own_folder():
    chains = [stages[:size] for stages in ROWS.values() for size in range(1, len(stages) + 1)]
    nodes = [Node(chain, seed) for chain in chains for seed in SEEDS]
    distinct = [node for k, node in enumerate(nodes) if node not in nodes[:k]]
    assert len(distinct) < len(nodes)
    assert len({node.folder(OUT, 10) for node in distinct}) == len(distinct)
    assert {node.row for node in distinct} - {None} == set(ROWS)
    assert all(node.parent is None or node.parent in distinct for node in distinct)


def test_steps_left_counts_the_longest_row_through_a_node():
    first = Node(ROWS["4 + 4"][:1], 0)
    assert first == Node(ROWS["4 + 2 + 2"][:1], 0)
    assert first.steps_left(["score", "4 + 4"]) == 2.0 and first.steps_left(["4 + 4", "4 + 2 + 2"]) == 3.0
    assert first.steps_left(["score"]) == 0.0
