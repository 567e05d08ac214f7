"""The study's results as a Markdown table and a figure."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from dmm_jax.checkpoints.merge_methods import METHODS
from dmm_jax.evaluation import figures
from dmm_jax.runtime import metrics
from dmm_jax.studies.shapes_rows import ROWS


def read(path: pathlib.Path) -> list[dict]:
    """Returns the lines of a results.jsonl; none if the file is missing."""
    return metrics.read(path, strict=True)


def trace(distances: Mapping[str, Mapping[str, float]], pictures: str = "all") -> float:
    """Returns FID_t, the sum over the styles; `pictures` is "all" or "few"."""
    return sum(distances[pictures].values())


def traces(lines: Sequence[Mapping], pictures: str = "all") -> dict[str, list[float]]:
    """Returns FID_t by row, one value per seed: base and weight merges first, then students, the floor last."""
    references = [line for line in lines if line["row"] == "references"]
    by_row = {name: [trace(line[name], pictures) for line in references] for name in ("base", *METHODS)}
    for name in ROWS:
        runs = [trace(line["distances"], pictures) for line in lines if line["row"] == name]
        by_row |= {name: runs} if runs else {}
    return by_row | {"floor": [trace(line["floor"], pictures) for line in references]}


def table(lines: Sequence[Mapping]) -> str:
    """Returns a Markdown table of the traces: mean and standard deviation over the seeds."""
    text = [
        "| row | trace: mean | spread over seeds | over the floor | few: mean | spread | over the floor | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    by_pictures = [traces(lines, pictures) for pictures in ("all", "few")]
    for name, runs in by_pictures[0].items():
        cells = [name]
        for by_row in by_pictures:
            mean, floor = np.mean(by_row[name]), np.mean(by_row["floor"])
            spread = f"{np.std(by_row[name], ddof=1):.2f}" if len(runs) > 1 else ""
            cells += [f"{mean:.2f}", spread, f"{mean / floor - 1:+.1%}"]
        cells.append(str(len(runs)) if name in ROWS or len(runs) > 1 else "")
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def figure(lines: Sequence[Mapping]) -> dict[str, bytes]:
    """Returns PNGs for light and dark pages: every run's trace, and the floor."""
    by_row = traces(lines)
    floor = float(np.mean(by_row.pop("floor")))
    title = "FID_t, the trace of the style matrix in FD (shapes); one mark per seed; the vertical line is the floor"
    return figures.render(lambda theme: figures.runs(by_row, floor, title, theme))
