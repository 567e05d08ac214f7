"""The style matrix: distances between every style of the student and every teacher, with reference distances."""

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from dmm_jax.evaluation.feature_networks import Summary
from dmm_jax.evaluation.frechet import frechet_distance
from dmm_jax.runtime.errors import UserError


def style_matrix(
    names: Sequence[str],
    student: Sequence[Summary],
    teacher: Sequence[Summary],
    teacher_again: Sequence[Summary],
    base: Summary | Sequence[Summary],
    merged: Mapping[str, Summary | Sequence[Summary]],
    distance_name: str = "FD (shapes)",
    distance: Callable[..., float] = frechet_distance,
) -> dict[str, object]:
    """Returns the distances with the keys of metrics.json.

    `floor` is the distance between two samples of one teacher, the smallest that n pictures can show. `gap_closed` is
    (base - student) / (base - floor): 1 at the floor, 0 at the base model, and None unless the base is farther than the
    floor. `trace` and `floor_trace` sum the matrix's diagonal (FID_t, arXiv:2504.12364) and the floor.

    Args:
      student, teacher: one per style, in the order of `names`.
      teacher_again: the teachers' pictures from other noise than `teacher`'s.
      base: one for all styles, or one per style.
      merged: the same for each merge of the teachers' weights; each method becomes a key of the result.

    Raises:
      ValueError: a list has another length than `names`, or the summaries differ in their number of pictures.
    """
    references = {
        name: list(summary) if isinstance(summary, Sequence) else [summary] * len(names)
        for name, summary in {"base": base, **merged}.items()
    }
    n = _count(names, {"student": student, "teacher": teacher, "teacher_again": teacher_again, **references})
    matrix = np.array([[distance(row, column) for column in teacher] for row in student])
    floor, *rows = (
        np.array([distance(*pair) for pair in zip(row, teacher, strict=True)])
        for row in (teacher_again, *references.values())
    )
    rows = dict(zip(references, rows, strict=True))
    return {
        "styles": list(names),
        "distance": distance_name,
        "n": n,
        "matrix": matrix.tolist(),
        "floor": floor.tolist(),
        **{name: row.tolist() for name, row in rows.items()},
        "weight_merges": list(merged),
        "gap_closed": gap_closed(np.diagonal(matrix), rows["base"], floor),
        "diagonal_is_minimum": _diagonal_is_minimum(matrix),
        "trace": float(np.trace(matrix)),
        "floor_trace": float(floor.sum()),
    }


def gap_closed(model: Collection[float], base: Collection[float], floor: Collection[float]) -> list[float | None]:
    """Returns the share of the way from base to floor that a model closes, by style; None if floor >= base."""
    return [
        float((start - distance) / (start - end)) if start > end else None
        for distance, start, end in zip(model, base, floor, strict=True)
    ]


def _count(names: Sequence[str], models: dict[str, Sequence[Summary]]) -> int:
    """Checks the summaries and returns the number of pictures in each; the distance's bias depends on it."""
    wrong = [f"{model} has {len(summaries)}" for model, summaries in models.items() if len(summaries) != len(names)]
    if wrong or not names:
        raise UserError(
            f"expected one set of pictures for each of the {len(names)} styles; {', '.join(wrong) or 'got no style'}."
        )
    counts = {summary.count for summaries in models.values() for summary in summaries}
    if len(counts) != 1:
        raise UserError(
            f"distances of unequally many pictures cannot be compared; got sets of {sorted(counts)}. "
            "Draw the same number for every style and model."
        )
    return counts.pop()


def _diagonal_is_minimum(matrix: Float[np.ndarray, "T T"]) -> bool:
    diagonal = np.diagonal(matrix)
    return bool((diagonal == matrix.min(axis=0)).all() and (diagonal == matrix.min(axis=1)).all())
