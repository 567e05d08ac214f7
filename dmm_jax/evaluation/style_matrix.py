"""Every style of the student against every teacher, with what to hold it against: the numbers of metrics.json."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from dmm_jax.evaluation.frechet import Statistics, frechet_distance
from dmm_jax.evaluation.kid import Features
from dmm_jax.runtime.errors import UserError

Kept = Statistics | Features  # Of a model's pictures.


def style_matrix(
    names: Sequence[str],
    student: Sequence[Kept],
    teacher: Sequence[Kept],
    teacher_again: Sequence[Kept],
    base: Kept | Sequence[Kept],
    merged: Mapping[str, Kept | Sequence[Kept]],
    distance: str = "FD (shapes)",
    between: Callable[..., float] = frechet_distance,
) -> dict[str, object]:
    """Returns the distances as metrics.json holds them.

    `floor` is a teacher against itself, the nearest that anyone comes with n pictures; `gap_closed` is
    (base - student) / (base - floor): 1 at the floor, 0 as far off as the base model, and None where the base is no
    farther than the floor. `trace` and `floor_trace` sum the matrix's diagonal (FID_t, arXiv:2504.12364) and the floor.

    Args:
      student, teacher: by style, in the order of `names`.
      teacher_again: the teachers' pictures from other noise than `teacher`'s.
      base: of the base model: one for all styles, or by style.
      merged: of each merge of the teachers' weights, by its method; each becomes a row of that name.
      distance, between: its name, and how it is computed.

    Raises:
      ValueError: a list has another length than `names`, or the sets differ in their number of pictures.
    """
    others = {"base": base, **merged}
    others = {what: list(one) if isinstance(one, Sequence) else [one] * len(names) for what, one in others.items()}
    n = _count(names, {"student": student, "teacher": teacher, "teacher_again": teacher_again, **others})
    matrix = np.array([[between(row, column) for column in teacher] for row in student])
    floor, *rows = (
        np.array([between(*pair) for pair in zip(row, teacher, strict=True)])
        for row in (teacher_again, *others.values())
    )
    rows = dict(zip(others, rows, strict=True))
    return {
        "styles": list(names),
        "distance": distance,
        "n": n,
        "matrix": matrix.tolist(),
        "floor": floor.tolist(),
        **{what: row.tolist() for what, row in rows.items()},
        "weight_merges": list(merged),
        "gap_closed": _gap_closed(np.diagonal(matrix), rows["base"], floor),
        "diagonal_is_minimum": _diagonal_is_minimum(matrix),
        "trace": float(np.trace(matrix)),
        "floor_trace": float(floor.sum()),
    }


def _count(names: Sequence[str], sets: dict[str, Sequence[Kept]]) -> int:
    """Checks the sets and returns the number of pictures in each; the distance's bias falls with it."""
    wrong = [f"{what} has {len(one)}" for what, one in sets.items() if len(one) != len(names)]
    if wrong or not names:
        found = ", ".join(wrong) or "there is none"
        raise UserError(f"expected one set of pictures for each of the {len(names)} styles; {found}.")
    counts = {statistics.count for one in sets.values() for statistics in one}
    if len(counts) != 1:
        raise UserError(
            f"distances of unequally many pictures cannot be compared; got sets of {sorted(counts)}. "
            "Draw as many for every style and model."
        )
    return counts.pop()


def _gap_closed(
    own: Float[np.ndarray, " T"], base: Float[np.ndarray, " T"], floor: Float[np.ndarray, " T"]
) -> list[float | None]:
    return [
        float((far - here) / (far - near)) if far > near else None
        for here, far, near in zip(own, base, floor, strict=True)
    ]


def _diagonal_is_minimum(matrix: Float[np.ndarray, "T T"]) -> bool:
    diagonal = np.diagonal(matrix)
    return bool((diagonal == matrix.min(axis=0)).all() and (diagonal == matrix.min(axis=1)).all())
