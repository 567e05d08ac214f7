"""The report of an evaluation: one static page with its pictures and `metrics.json`, made to be shown to others."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from dmm_jax.evaluation import report_sections as sections
from dmm_jax.gallery.page import render
from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.storage import Location, locate, staged_folder

_NEEDED = (
    "styles", "distance", "n", "matrix", "floor", "base", "average", "weight_merges", "gap_closed",
    "diagonal_is_minimum",
)  # fmt: skip


class Pairs(NamedTuple):
    """The same prompts and the same noise, drawn by a teacher and by the student in that teacher's style."""

    prompts: Sequence[str]
    teacher: UInt8[np.ndarray, "n H W 3"]
    student: UInt8[np.ndarray, "n H W 3"]


class Interpolation(NamedTuple):
    """One prompt and one noise from style `name_a` to `name_b`; `weights` are those of `name_b`, in [0, 1]."""

    images: UInt8[np.ndarray, "k H W 3"]
    weights: Sequence[float]
    name_a: str
    name_b: str
    prompt: str


class Samples(NamedTuple):
    """Pictures in prompt rows and style columns."""

    images: UInt8[np.ndarray, "rows columns H W 3"]
    prompts: Sequence[str]
    styles: Sequence[str]


def write_report(
    folder: str | os.PathLike,
    results: Mapping,
    *,
    grids: Mapping[str, tuple] | None = None,
    interpolation: tuple | None = None,
    metrics: Sequence[Mapping] = (),
    samples: tuple | None = None,
    title: str = "Many styles, one model",
) -> Location:
    """Writes `index.html`, PNGs and `metrics.json` (the results themselves) and returns the path of the page.

    Args:
      results: `styles`, `distance` (its name), `n` (pictures a style), `matrix` (row: student style, column: teacher),
        and per teacher `floor`, `base`, `average` and `gap_closed` = (base - student) / (base - floor), or None where
        the base is at the floor; `weight_merges`: the names of such rows, of which `average` is one;
        `diagonal_is_minimum`: of every row and every column.
        Optional: `kernel` {distance: its name, subsets: their number and size, student and floor: {style: {mean,
        std}}}, `clip_score` {name, and in the order of the styles: base, each weight merge, student, teacher,
        teacher_again}, `fidelity` {measure: {style: value}, or values in the order of the styles} of so many `pairs` a
        style, `settings`, `weights` {model: {network: SHA-256}}, `timings` (seconds), `command`.
      grids: fields of `Pairs` by style. interpolation, samples: fields of the classes of those names.
      metrics: the lines of metrics.jsonl.

    Raises:
      ValueError: the results lack something or their shapes differ.
    """
    check(results)
    with staged_folder(folder) as part:
        blocks = [
            sections.summary(results, title),
            sections.samples(part, *Samples(*samples)) if samples else "",
            sections.gains(part, results),
            sections.matrix(part, results),
            sections.pairs(part, {name: Pairs(*one) for name, one in (grids or {}).items()}),
            sections.interpolation(part, *Interpolation(*interpolation)) if interpolation else "",
            sections.losses(part, metrics, results["styles"]),
            sections.fidelity(plain(results)),
            sections.kernel(plain(results.get("kernel")), results["styles"]),
            sections.clip_score(part, results),
            sections.made(plain(results)),
        ]
        (part / "metrics.json").write_text(json.dumps(plain(results), indent=2, allow_nan=False) + "\n")
        page = render(title, "\n".join(filter(None, blocks)), sections.STYLE)
        (part / "index.html").write_text(page, encoding="utf-8")
    return locate(folder) / "index.html"


def check(results: Mapping) -> None:
    """Raises ValueError naming every key of `results` that is missing or has the wrong shape."""
    merges = results.get("weight_merges", ())
    missing = [key for key in dict.fromkeys((*_NEEDED, *merges)) if key not in results]
    if missing:
        raise UserError(
            f"the results of the evaluation lack {', '.join(missing)}; a report needs {', '.join(_NEEDED)}."
        )
    num = len(results["styles"])
    shapes = {"matrix": (num, num)} | dict.fromkeys(("floor", "base", *merges, "gap_closed"), (num,))
    wrong = [
        f"{key} is {np.shape(results[key])}, expected {shape}"
        for key, shape in shapes.items()
        if np.shape(results[key]) != shape
    ]
    if wrong or not num:
        raise UserError(f"the results do not fit their {num} styles: {'; '.join(wrong) or 'there is none'}.")


def plain(value: object) -> object:
    """Returns `value` as JSON can hold it: arrays as lists, numbers that are not finite as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
