"""HTML elements of a report: numbers, tables and figures, and their CSS."""

import json
import pathlib
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
from matplotlib.figure import Figure

from dmm_jax.evaluation import figures
from dmm_jax.gallery.page import escape


def number(value: float) -> str:
    """Returns a number rounded for the eye; its `value` attribute is exact."""
    return f'<data value="{float(value)!r}">{figures.format_number(float(value))}</data>'


def percent(share: float | None) -> str:
    """Returns a share in whole percent; its `value` attribute is exact."""
    if share is None or not np.isfinite(share):
        return "–"
    return f'<data value="{float(share)!r}">{100 * share:.0f}%</data>'


def text(value: object) -> str:
    """Returns any value of the results, escaped."""
    if value is None:
        return "–"
    if isinstance(value, (float, np.floating)):
        return number(value)
    return escape(value if isinstance(value, (str, int)) else json.dumps(value, ensure_ascii=False, default=str))


def words(key: str) -> str:
    """Returns a key as words; a unit at its end goes into brackets."""
    *first, last = str(key).split("_")
    return " ".join(first) + f" ({last})" if last in ("s", "db", "gb") and first else " ".join([*first, last])


def mean(values: Iterable[float | None]) -> float | None:
    """Returns the mean of the finite values; None without any."""
    finite = [value for value in values if value is not None and np.isfinite(value)]
    return float(np.mean(finite)) if finite else None


def lines(blocks: Iterable[str]) -> str:
    """Joins blocks, one per line."""
    return "\n".join(blocks)


def table(rows: Iterable[str], columns: Sequence[str] = ()) -> str:
    """Returns a wide table of rows under a head of columns, which scrolls sideways."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    head = f"<tr><th></th>{head}</tr>" if columns else ""
    return f'<div class="scroll"><table class="numbers">{head}\n{lines(rows)}</table></div>'


def model_row(
    label: str, values: Collection[float], closed: Collection[float | None] | None = None, mark: str = ""
) -> str:
    """Returns a row of one model's numbers and their mean, with the share of the gap under each.

    Args:
      mark: attributes of the row.
    """
    shares = [None] * (len(values) + 1) if closed is None else [*closed, mean(closed)]
    cells = "".join(
        f"<td>{number(value)}" + ("" if closed is None else f"<small>{percent(share)}</small>") + "</td>"
        for value, share in zip([*values, np.mean(values)], shares, strict=True)
    )
    note = "" if closed is None else "<small>gap closed</small>"
    return f'<tr{mark}><th scope="row">{label}{note}</th>{cells}</tr>'


def figure(
    folder: pathlib.Path, name: str, draw: Callable[[figures.Theme], Figure], caption: str, mark: str = ""
) -> str:
    """Writes a figure's PNGs for light and dark pages and returns its element."""
    pngs = figures.render(draw)
    for theme, png in pngs.items():
        (folder / f"{name}_{theme}.png").write_bytes(png)
    width = int.from_bytes(pngs["light"][16:20], "big") // 2  # A PNG's header holds its width.
    return (
        f'<figure{mark}><picture><source srcset="{name}_dark.png" media="(prefers-color-scheme: dark)">'
        f'<img src="{name}_light.png" alt="{name}" width="{width}"></picture>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def picture(file: str, alt: str, caption: str) -> str:
    """Returns a picture with its caption, which is HTML."""
    return f'<figure><img src="{file}" alt="{escape(alt)}"><figcaption>{caption}</figcaption></figure>'


STYLE = """
main { max-width: 66rem; }
.score { display: flex; flex-wrap: wrap; gap: .6rem 3.5rem; margin: 1.8rem 0 1rem; }
.score dt { color: var(--soft); font-size: .88rem; } .ours dt, .student th { color: var(--accent); }
.score dd { margin: 0; font-size: 2.1rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.ours dd, .student td { font-weight: 600; } .ours dd { color: var(--accent); }
.note { font-size: .88rem; margin-top: .8rem; }
.numbers { width: 100%; } .numbers td, .numbers th { padding: .45rem .8rem; white-space: nowrap; }
.numbers td, .numbers th[scope=col] { text-align: right; }
small { display: block; color: var(--soft); font-weight: 400; font-size: .8rem; }
.student { background: var(--wash); }
.beside { display: flex; flex-wrap: wrap; gap: 1.5rem 2.5rem; align-items: flex-end; }
.beside figcaption { flex: 1 1 14rem; margin-bottom: .4rem; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1.4rem 1.8rem; }
.pairs figure, .strip figure { margin: 0; } .pairs img { width: 100%; outline: 1px solid var(--line); }
figcaption { line-height: 1.4; overflow-wrap: anywhere; }
.strip { display: flex; gap: .4rem; overflow-x: auto; } .strip figure { flex: 1 1 0; min-width: 5rem; }
.strip img { width: 100%; } .strip figcaption { text-align: center; font-variant-numeric: tabular-nums; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 0 3rem; font-size: .9rem; }
.facts table { width: 100%; } .facts th { font-weight: 400; color: var(--soft); width: 45%; }
.facts td { overflow-wrap: anywhere; }
"""
