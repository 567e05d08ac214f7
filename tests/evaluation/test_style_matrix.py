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
    """Statistics with unit covariance: the distance of two is the squared distance of their places."""
    return Statistics(5, np.asarray(place, np.float64), 4.0 * np.eye(2))


def sets(student=PLACES + [1.0, 0.0], **other) -> dict:
    places = {"student": student, "teacher": PLACES, "teacher_again": PLACES + [0.0, 0.5]} | other
    merged = {"average": at([3.0, 3.0]), "ties": at([2.0, 3.0])}
    return {what: [at(place) for place in rows] for what, rows in places.items()} | {
        "merged": merged,
        "base": at([4.0, 4.0]),
    }


def test_rows_are_the_student_and_columns_are_the_teachers():
    found = style_matrix(NAMES, **sets())
    student = PLACES + [1.0, 0.0]
    expected = np.sum((student[:, None] - PLACES[None]) ** 2, axis=-1)
    np.testing.assert_allclose(found["matrix"], expected, rtol=1e-9)
    assert found["matrix"][0][1] != pytest.approx(found["matrix"][1][0])


def test_references_are_distances_to_each_teacher():
    found = style_matrix(NAMES, **sets())
    np.testing.assert_allclose(found["floor"], [0.25] * 3, rtol=1e-9)
    np.testing.assert_allclose(found["base"], np.sum((PLACES - 4.0) ** 2, axis=-1), rtol=1e-9)
    np.testing.assert_allclose(found["average"], np.sum((PLACES - 3.0) ** 2, axis=-1), rtol=1e-9)
    np.testing.assert_allclose(found["ties"], np.sum((PLACES - [2.0, 3.0]) ** 2, axis=-1), rtol=1e-9)
    assert found["weight_merges"] == ["average", "ties"]
    assert found["trace"] == pytest.approx(3.0) and found["floor_trace"] == pytest.approx(0.75)


def test_gap_is_closed_wholly_at_the_floor_and_not_at_all_at_the_base():
    student = [PLACES[0] + [0.0, 0.5], [4.0, 4.0], PLACES[2] + [1.0, 0.0]]
    closed = style_matrix(NAMES, **sets(student))["gap_closed"]
    np.testing.assert_allclose(closed, [1.0, 0.0, (272.0 - 1.0) / (272.0 - 0.25)], rtol=1e-9, atol=1e-9)


def test_no_gap_is_no_number():
    found = style_matrix(NAMES, **(sets() | {"base": [at(place) for place in PLACES]}))
    assert found["gap_closed"] == [None] * 3


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
def test_diagonal_must_be_the_minimum_of_its_row_and_of_its_column(student, holds):
    found = style_matrix(NAMES, **sets(student))
    diagonal, matrix = np.diagonal(found["matrix"]), np.array(found["matrix"])
    assert found["diagonal_is_minimum"] is holds
    assert holds == all(diagonal[i] == min(*matrix[i], *matrix[:, i]) for i in range(3))


def test_a_column_alone_can_fail():
    """Each row has its minimum on the diagonal, yet the first teacher is best met by the second style."""
    student = [[0.0, 5.0], [4.0, -1.0], [0.0, 20.0]]
    teacher = [[0.0, 0.0], [4.5, -3.0], [0.0, 20.0]]
    found = style_matrix(NAMES, **sets(student, teacher=teacher))
    matrix = np.array(found["matrix"])
    assert (matrix.argmin(axis=1) == range(3)).all() and matrix.argmin(axis=0)[0] == 1
    assert found["diagonal_is_minimum"] is False


def test_result_is_what_the_report_needs_and_json_holds():
    found = style_matrix(NAMES, **sets())
    check(found)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["styles"], found["distance"], found["n"]) == (NAMES, "FD (shapes)", 5)


def test_entries_are_frechet_distances_where_covariances_differ():
    own = sets()
    own["student"][1] = dataclasses.replace(own["student"][1], scatter=np.diag([36.0, 4.0]))
    found = style_matrix(NAMES, **own)
    assert found["matrix"][1][2] == pytest.approx(frechet_distance(own["student"][1], own["teacher"][2]), rel=1e-12)


def test_sets_that_do_not_compare_are_refused():
    with pytest.raises(ValueError, match="each of the 3 styles; student has 2"):
        style_matrix(NAMES, **sets(PLACES[:2]))
    own = sets()
    own["teacher"][0] = dataclasses.replace(own["teacher"][0], count=9)
    with pytest.raises(ValueError, match=r"unequally many.*\[5, 9\]"):
        style_matrix(NAMES, **own)
