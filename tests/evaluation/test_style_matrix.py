"""The style matrix, its references and its shares of the gap have their closed forms."""

import dataclasses
import json

import numpy as np
import pytest

from dmm_jax.evaluation.frechet import Statistics, frechet_distance
from dmm_jax.evaluation.report import check
from dmm_jax.evaluation.style_matrix import style_matrix

NAMES = ["ink", "neon", "comic"]
PLACES = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 20.0]])


def at(place) -> Statistics:
    """Returns statistics with unit covariance, so that distances are squared distances of places."""
    return Statistics(5, np.asarray(place, np.float64), 4.0 * np.eye(2))


def sets(student=PLACES + [1.0, 0.0], **other) -> dict:
    places = {"student": student, "teacher": PLACES, "teacher_again": PLACES + [0.0, 0.5]} | other
    merged = {"average": at([3.0, 3.0]), "ties": at([2.0, 3.0])}
    summaries = {model: [at(place) for place in rows] for model, rows in places.items()}
    return summaries | {"merged": merged, "base": at([4.0, 4.0])}


def test_rows_are_the_student_and_columns_are_the_teachers():
    results = style_matrix(NAMES, **sets())
    student = PLACES + [1.0, 0.0]
    expected = np.sum((student[:, None] - PLACES[None]) ** 2, axis=-1)
    np.testing.assert_allclose(results["matrix"], expected, rtol=1e-9)
    assert results["matrix"][0][1] != pytest.approx(results["matrix"][1][0])


def test_references_are_distances_to_each_teacher():
    results = style_matrix(NAMES, **sets())
    np.testing.assert_allclose(results["floor"], [0.25] * 3, rtol=1e-9)
    np.testing.assert_allclose(results["base"], np.sum((PLACES - 4.0) ** 2, axis=-1), rtol=1e-9)
    np.testing.assert_allclose(results["average"], np.sum((PLACES - 3.0) ** 2, axis=-1), rtol=1e-9)
    np.testing.assert_allclose(results["ties"], np.sum((PLACES - [2.0, 3.0]) ** 2, axis=-1), rtol=1e-9)
    assert results["weight_merges"] == ["average", "ties"]
    assert results["trace"] == pytest.approx(3.0) and results["floor_trace"] == pytest.approx(0.75)


def test_gap_closed_is_1_at_the_floor_and_0_at_the_base():
    student = [PLACES[0] + [0.0, 0.5], [4.0, 4.0], PLACES[2] + [1.0, 0.0]]
    closed = style_matrix(NAMES, **sets(student))["gap_closed"]
    np.testing.assert_allclose(closed, [1.0, 0.0, (272.0 - 1.0) / (272.0 - 0.25)], rtol=1e-9, atol=1e-9)


def test_without_a_gap_there_is_no_share_of_it():
    results = style_matrix(NAMES, **(sets() | {"base": [at(place) for place in PLACES]}))
    assert results["gap_closed"] == [None] * 3


def test_one_base_for_all_equals_the_same_base_for_each():
    assert style_matrix(NAMES, **sets()) == style_matrix(NAMES, **(sets() | {"base": [at([4.0, 4.0])] * 3}))


@pytest.mark.parametrize(
    "student, holds",
    [
        (PLACES + [1.0, 0.0], True),
        (PLACES[[1, 0, 2]], False),  # Two styles swapped.
        (PLACES[[0, 1, 0]], False),  # The third style draws as the first teacher.
        (PLACES * 0.6, True),  # All drawn towards one place, yet each nearest to its own.
    ],
)
def test_diagonal_must_be_minimal_in_its_row_and_column(student, holds):
    results = style_matrix(NAMES, **sets(student))
    diagonal, matrix = np.diagonal(results["matrix"]), np.array(results["matrix"])
    assert results["diagonal_is_minimum"] is holds
    assert holds == all(diagonal[i] == min(*matrix[i], *matrix[:, i]) for i in range(3))


def test_a_column_alone_can_fail():
    """Each row has its minimum on the diagonal, yet the second style is nearest the first teacher."""
    student = [[0.0, 5.0], [4.0, -1.0], [0.0, 20.0]]
    teacher = [[0.0, 0.0], [4.5, -3.0], [0.0, 20.0]]
    results = style_matrix(NAMES, **sets(student, teacher=teacher))
    matrix = np.array(results["matrix"])
    assert (matrix.argmin(axis=1) == range(3)).all() and matrix.argmin(axis=0)[0] == 1
    assert results["diagonal_is_minimum"] is False


def test_results_fit_the_report_and_json():
    results = style_matrix(NAMES, **sets())
    check(results)
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert (results["styles"], results["distance"], results["n"]) == (NAMES, "FD (shapes)", 5)


def test_entries_are_frechet_distances_where_covariances_differ():
    own = sets()
    own["student"][1] = dataclasses.replace(own["student"][1], scatter=np.diag([36.0, 4.0]))
    results = style_matrix(NAMES, **own)
    assert results["matrix"][1][2] == pytest.approx(frechet_distance(own["student"][1], own["teacher"][2]), rel=1e-12)


def test_sets_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="each of the 3 styles; student has 2"):
        style_matrix(NAMES, **sets(PLACES[:2]))
    own = sets()
    own["teacher"][0] = dataclasses.replace(own["teacher"][0], count=9)
    with pytest.raises(ValueError, match=r"unequally many.*\[5, 9\]"):
        style_matrix(NAMES, **own)
