"""The report of an evaluation: `metrics.json` and one static page with its pictures, fit to be shown to others."""

import json
import os
from collections.abc import Mapping, Sequence

import numpy as np

from dmm_jax.evaluation import report_sections as sections
from dmm_jax.evaluation.report_html import STYLE
from dmm_jax.gallery.page import render
from dmm_jax.runtime.errors import UserError, refuse
from dmm_jax.runtime.storage import Location, locate, staged_folder

TITLE = "Many styles, one model"
_NEEDED = (
    "styles", "distance", "n", "matrix", "floor", "base", "average", "weight_merges", "gap_closed",
    "diagonal_is_minimum",
)  # fmt: skip


def write_report(
    folder: str | os.PathLike,
    results: Mapping,
    pairs: Mapping[str, sections.Pairs] | None = None,
    interpolation: sections.Interpolation | None = None,
    training_log: Sequence[Mapping] = (),
    links: Mapping[str, str] | None = None,
) -> Location:
    """Writes `index.html`, PNGs and `metrics.json` (the results themselves); returns the path of the page.

    Args:
      results: without a distance between sets of pictures, `styles`, `fidelity` and the optional keys except `kernel`
        and `clip_score`.
        With a distance, the keys of `style_matrix`: `styles`, `distance` (its name), `n` (pictures per style), `matrix`
        (one row per style of the student, one column per teacher), and one value per teacher in `floor`, `base`,
        `gap_closed` and in each key that `weight_merges` names (`average` is always among them);
        `diagonal_is_minimum`.
        Optional: `kernel` {distance: its name, subsets: their number and size, student and floor: {style: {mean,
        std}}}; `clip_score` {name, and lists in the order of the styles: base, each weight merge, student, teacher,
        teacher_again}; `fidelity` {measure: {style: value}} with the number of `pairs` per style; `settings`;
        `weights` {model: {network: SHA-256}}; `timings` (seconds); `command`.
      pairs: by style.
      training_log: the lines of the run's metrics.jsonl.
      links: {what it is: path relative to the folder} of further pages and files.

    Raises:
      ValueError: the results lack a key or their shapes differ.
    """
    check(results)
    values = plain(results)
    with staged_folder(folder) as part:
        blocks = [sections.paired_summary(results, TITLE), sections.links(links or {})]
        if has_distances(results):
            blocks[0] = sections.summary(results, TITLE)
            blocks += [sections.gains(part, results), sections.matrix(part, results)]
        blocks += [
            sections.pairs(part, pairs or {}),
            sections.interpolation(part, interpolation) if interpolation else "",
            sections.losses(part, training_log, results["styles"]),
            sections.fidelity(values),
            sections.kernel(values),
            sections.clip_score(part, results),
            sections.provenance(values),
        ]
        (part / "metrics.json").write_text(json.dumps(values, indent=2, allow_nan=False) + "\n")
        page = render(TITLE, "\n".join(filter(None, blocks)), STYLE)
        (part / "index.html").write_text(page, encoding="utf-8")
    return locate(folder) / "index.html"


def has_distances(results: Mapping) -> bool:
    """Tells whether results compare sets of pictures, and not pairs alone."""
    return "matrix" in results or "fidelity" not in results


def check(results: Mapping) -> None:
    """Raises ValueError naming every key of `results` that is missing or has the wrong shape."""
    if not has_distances(results):
        return
    merges = results.get("weight_merges", ())
    missing = [key for key in dict.fromkeys((*_NEEDED, *merges)) if key not in results]
    if missing:
        raise UserError(
            f"the results of the evaluation lack {', '.join(missing)}; a report needs {', '.join(_NEEDED)}."
        )
    num = len(results["styles"])
    shapes = {"matrix": (num, num)} | dict.fromkeys(("floor", "base", *merges, "gap_closed"), (num,))
    refuse(
        f"the results do not fit their {num} styles",
        [num == 0 and "a report needs at least one style"]
        + [
            f"{key} is {np.shape(results[key])}, expected {shape}"
            for key, shape in shapes.items()
            if np.shape(results[key]) != shape
        ],
    )


def plain(value: object) -> object:
    """Returns `value` in JSON's types: arrays become lists, numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
