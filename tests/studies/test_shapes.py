"""The study: every row is a run that can be made, and the table is the mean and the spread of its traces."""

import pathlib

import numpy as np
import pytest

from dmm_jax.config import checks
from dmm_jax.config import options as config_lib
from dmm_jax.data.cache import LatentCache
from dmm_jax.studies import shapes, shapes_data
from dmm_jax.studies import shapes_rows as rows
from dmm_jax.world import styles as world_styles

OUT = pathlib.Path("out")


@pytest.mark.parametrize("row", shapes.ROWS)
def test_every_stage_of_a_row_is_a_config_that_can_run(row):
    """And the styles that are learned are the study's, each once; what a student has grown from is kept."""
    learned, before = (), None
    for stage in shapes.ROWS[row]:
        config = rows.study_config(OUT, stage.styles, 100, seed=1)
        config = rows.stage_config(OUT, config, stage, before)
        if stage.replay is not None:
            assert config.grow.student == "stage"
            config.grow.styles, learned = learned, learned + stage.styles
        else:
            learned = stage.styles
        checks.check(config)
        assert tuple(config_lib.style_names(config)) == learned and config.num_steps == int(100 * stage.steps)
        assert config.data.cache == str(OUT / "caches" / stage.data)
        before = pathlib.Path("stage")
    assert learned == shapes.STYLES


def test_the_table_holds_traces_means_and_spreads():
    def both(a, b):
        return {"all": {"a": a, "b": b}, "few": {"a": 10 * a, "b": 10 * b}}

    references = {"row": "references", "seed": 0, "base": both(8.0, 2.0), "floor": both(1.0, 1.0)}
    references |= dict.fromkeys(shapes.METHODS, both(3.0, 3.0))
    runs = [{"row": "score", "seed": seed, "distances": both(1.0 + seed, 1.0)} for seed in range(3)]
    lines = shapes.table([references, *runs]).splitlines()
    assert "| base | 10.00 |  | +400.0% | 100.00 |  | +400.0% |  |" in lines
    assert lines[-2] == "| score | 3.00 | 1.00 | +50.0% | 30.00 | 10.00 | +50.0% | 3 |"
    assert lines[-1] == "| floor | 2.00 |  | +0.0% | 20.00 |  | +0.0% |  |"


def test_the_floor_and_the_merges_have_a_spread_where_they_were_drawn_more_than_once():
    def both(a):
        return {"all": {"a": a}, "few": {"a": a}}

    def references(seed, floor):
        return {"row": "references", "seed": seed, "floor": both(floor)} | dict.fromkeys(
            ("base", *shapes.METHODS), both(8.0)
        )

    runs = [{"row": "score", "seed": 0, "distances": both(4.0)}]
    lines = shapes.table([references(0, 1.0), *runs, references(1, 3.0)]).splitlines()
    assert lines[-1] == "| floor | 2.00 | 1.41 | +0.0% | 2.00 | 1.41 | +0.0% | 2 |"
    assert lines[-2] == "| score | 4.00 |  | +100.0% | 4.00 |  | +100.0% | 1 |"


def test_mixed_data_holds_its_share_of_what_teachers_drew_and_the_rest_rendered(tiny, tmp_path):
    rendered = LatentCache(tiny[1].data.cache)

    class Made(LatentCache):
        """The same pictures, told apart by their latents."""

        def __len__(self):
            return 8

        def __getitem__(self, index):
            return super().__getitem__(index) | {"latents": np.full(self.header.latent_shape, 7, np.float16)}

    mixed = shapes_data.mix(rendered, Made(tiny[1].data.cache), tmp_path / "mixed", 0.25)
    examples = [mixed[k] for k in range(len(mixed))]
    assert [bool((one["latents"] == 7).all()) for one in examples] == [True] * 2 + [False] * 6
    for name in ("latents", "input_ids", "time_ids"):
        np.testing.assert_array_equal(examples[5][name], rendered[3][name])
    mixed.check(vae=rendered.header.vae, tokenizer=rendered.header.tokenizer)
    assert "2 of [" in mixed.header.source and "6 of [" in mixed.header.source
    assert len(shapes_data.mix(rendered, rendered, tmp_path / "mixed", 0.5)) == 8  # It is there already.


def test_short_prompts_name_one_object():
    assert shapes_data.short("a large red circle left of a small blue square") == "red circle"


def test_only_the_data_of_the_rows_that_are_run_are_made():
    assert rows.data_of(["score", "4 + 4"]) == {"rendered"}
    assert rows.data_of(["+ feature, then teacher-made data"]) == {"rendered", "made"}
    assert rows.data_of(shapes.ROWS) == {"rendered", "made", "short", *rows.SHARES}


@pytest.mark.parametrize("training", ["study", "study/second"])
def test_the_documents_tables_are_those_of_the_committed_results(training):
    docs = pathlib.Path(__file__).parents[2] / "docs"
    assert shapes.table(shapes.read(docs / training / "results.jsonl")) in (docs / "study.md").read_text()


def test_a_mean_distance_is_of_disjoint_parts():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 21, 3)).astype(np.float32)
    whole = shapes.mean_distance(a, b, 21)
    halves = [shapes.mean_distance(a[k : k + 10], b[k : k + 10], 10) for k in (0, 10)]
    assert shapes.mean_distance(a, b, 10) == pytest.approx(np.mean(halves)) and whole != pytest.approx(np.mean(halves))
    assert shapes.mean_distance(a, a, 10) == pytest.approx(0.0, abs=1e-5)


def test_relatives_stand_beside_each_other_and_are_styles_of_the_world():
    assert set(shapes.STYLES) <= set(world_styles.STYLES) and len(shapes.STYLES) == 8


def test_what_rows_have_in_common_is_trained_once_and_everything_in_a_folder_of_its_own():
    chains = [stages[:size] for stages in shapes.ROWS.values() for size in range(1, len(stages) + 1)]
    nodes = [shapes.Node(chain, seed) for chain in chains for seed in shapes.SEEDS]
    distinct = [node for k, node in enumerate(nodes) if node not in nodes[:k]]
    assert len(distinct) < len(nodes)
    assert len({node.folder(pathlib.Path("out"), 10) for node in distinct}) == len(distinct)
    assert {node.row for node in distinct} - {None} == set(shapes.ROWS)
    assert all(node.parent is None or node.parent in distinct for node in distinct)


def test_a_node_knows_how_much_comes_after_it():
    first = shapes.Node(shapes.ROWS["4 + 4"][:1], 0)
    assert first == shapes.Node(shapes.ROWS["4 + 2 + 2"][:1], 0)
    assert first.steps_left(["score", "4 + 4"]) == 2.0 and first.steps_left(["4 + 4", "4 + 2 + 2"]) == 3.0
    assert first.steps_left(["score"]) == 0.0
