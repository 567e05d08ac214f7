"""The study's table: means and spreads of traces, and the tables in docs/study.md."""

import pathlib

import pytest

from dmm_jax.checkpoints.merge_methods import METHODS
from dmm_jax.studies import shapes_table


def references(seed, floor, base, merge):
    """Returns a line of results.jsonl with the same distances for every merge."""
    return {"row": "references", "seed": seed, "floor": floor, "base": base} | dict.fromkeys(METHODS, merge)


def test_the_table_has_traces_means_and_spreads():
    def distances(a, b):
        return {"all": {"a": a, "b": b}, "few": {"a": 10 * a, "b": 10 * b}}

    reference = references(0, floor=distances(1.0, 1.0), base=distances(8.0, 2.0), merge=distances(3.0, 3.0))
    runs = [{"row": "score", "seed": seed, "distances": distances(1.0 + seed, 1.0)} for seed in range(3)]
    lines = shapes_table.table([reference, *runs]).splitlines()
    assert "| base | 10.00 |  | +400.0% | 100.00 |  | +400.0% |  |" in lines
    assert lines[-2] == "| score | 3.00 | 1.00 | +50.0% | 30.00 | 10.00 | +50.0% | 3 |"
    assert lines[-1] == "| floor | 2.00 |  | +0.0% | 20.00 |  | +0.0% |  |"


def test_repeated_references_have_a_spread():
    def distances(a):
        return {"all": {"a": a}, "few": {"a": a}}

    draws = [references(k, distances(floor), distances(8.0), distances(8.0)) for k, floor in enumerate((1.0, 3.0))]
    run = {"row": "score", "seed": 0, "distances": distances(4.0)}
    lines = shapes_table.table([draws[0], run, draws[1]]).splitlines()
    assert lines[-1] == "| floor | 2.00 | 1.41 | +0.0% | 2.00 | 1.41 | +0.0% | 2 |"
    assert lines[-2] == "| score | 4.00 |  | +100.0% | 4.00 |  | +100.0% | 1 |"


@pytest.mark.parametrize("training", ["study", "study/second"])
def test_the_documented_tables_match_the_committed_results(training):
    docs = pathlib.Path(__file__).parents[2] / "docs"
    assert shapes_table.table(shapes_table.read(docs / training / "results.jsonl")) in (docs / "study.md").read_text()
