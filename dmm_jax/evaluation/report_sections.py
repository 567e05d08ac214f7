"""The sections of the report's page: each returns HTML and puts its pictures beside the page, named by number."""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import UInt8

from dmm_jax.evaluation import figures
from dmm_jax.gallery.page import escape


def merge_gap_closed(results: Mapping, method: str) -> list[float | None]:
    """Returns the share of the way from base to floor that a weight merge closes; None where there is no way."""
    rows = zip(results["base"], results[method], results["floor"], strict=True)
    return [(base - merge) / (base - floor) if base > floor else None for base, merge, floor in rows]


def summary(results: Mapping, title: str) -> str:
    """Tells in one paragraph, and a number for each model, what distillation buys."""
    names, student = results["styles"], np.diagonal(np.asarray(results["matrix"], float))
    closed = {"average": merge_gap_closed(results, "average"), "student": results["gap_closed"]}
    merges = [
        f"<div><dt>{_merge(method)}</dt><dd>{_value(np.mean(results[method]))}</dd></div>"
        for method in results["weight_merges"]
    ]
    ending = (
        "Asked for a style, the student is always nearest the teacher of that style."
        if np.all(results["diagonal_is_minimum"])
        else "Not every style is nearest its own teacher: the matrix below shows which."
    )
    return f"""<h1>{escape(title)}</h1>
<p class="lead">{len(names)} models, each with a style of its own{_listed(names)}, were distilled into one student
that takes the style as an input. Simply averaging their weights closes {_percent(_mean(closed["average"]))} of the
distance between the base model and the teachers; the student closes
<strong>{_percent(_mean(closed["student"]))}</strong>. {ending}</p>
<dl class="score">
<div><dt>Base model</dt><dd>{_value(np.mean(results["base"]))}</dd></div>
{_lines(merges)}
<div class="ours"><dt>Student</dt><dd>{_value(np.mean(student))}</dd></div>
<div><dt>Floor</dt><dd>{_value(np.mean(results["floor"]))}</dd></div>
</dl>
<p class="soft note">{escape(results["distance"])} to the teachers on {results["n"]:,} pictures a style, averaged over
the styles; smaller is nearer. The floor is a teacher against a second sample of its own: with so many pictures nothing
can be seen to be nearer.</p>"""


def samples(
    part: pathlib.Path, images: UInt8[np.ndarray, "rows columns H W 3"], prompts: Sequence[str], styles: Sequence[str]
) -> str:
    """Shows the student's pictures: prompts down, styles across."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in styles)
    rows = []
    for row, (prompt, pictures) in enumerate(zip(prompts, images, strict=True)):
        cells = []
        for column, picture in enumerate(pictures):
            file = f"sample_{row:02d}_{column:02d}.png"
            figures.tile(picture).save(part / file)
            cells.append(f'<td><img src="{file}" alt="{escape(prompt)}"></td>')
        rows.append(f'<tr>{"".join(cells)}<th scope="row">{escape(prompt)}</th></tr>')
    return f"""<h2>One prompt, every style</h2>
<p>All drawn by the student; along a row only the style changes.</p>
<div class="scroll"><table class="samples"><tr>{head}<th></th></tr>
{_lines(rows)}</table></div>"""


def gains(part: pathlib.Path, results: Mapping) -> str:
    """Compares base, weight merges, student and floor, style by style, as a figure and as a table."""
    distance, student = escape(results["distance"]), np.diagonal(np.asarray(results["matrix"], float)).tolist()
    text = f"{distance} between each teacher's pictures and those of the other models; the bar is the teacher's floor."
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in [*results["styles"], "mean"])
    merges = results["weight_merges"]
    rows = [
        _row("Base model", results["base"], None),
        *(_row(_merge(method), results[method], merge_gap_closed(results, method)) for method in merges),
        _row("Student", student, results["gap_closed"], mark=' class="student"'),
        _row("Floor", results["floor"], None),
    ]
    return f"""<h2>What distillation buys</h2>
{_figure(part, "distances", lambda theme: figures.distances(results, theme), text)}
<div class="scroll"><table class="numbers"><tr><th></th>{head}</tr>
{_lines(rows)}</table></div>
<p class="soft note">Gap closed: how far a model comes on the way from the base model (0%) to the floor (100%).</p>"""


def _merge(method):
    name = figures.MERGES[method]
    return name[0].upper() + name[1:]


def _row(label, values, closed, mark=""):
    shares = [None] * (len(values) + 1) if closed is None else [*closed, _mean(closed)]
    cells = "".join(
        f"<td>{_value(value)}" + ("" if closed is None else f"<small>{_percent(share)}</small>") + "</td>"
        for value, share in zip([*values, np.mean(values)], shares, strict=True)
    )
    note = "" if closed is None else "<small>gap closed</small>"
    return f'<tr{mark}><th scope="row">{label}{note}</th>{cells}</tr>'


def matrix(part: pathlib.Path, results: Mapping) -> str:
    """Shows the style matrix."""
    text = """Rows: a model, or the student asked for one style. Columns: the teacher it is compared with. The outlined
diagonal should be the smallest of its row and of its column, and come close to the floor. Base model and merged weights
know no styles, so they have one row each."""
    figure = _figure(part, "matrix", lambda theme: figures.matrix(results, theme), text, mark=' class="beside"')
    return f"<h2>Every style against every teacher</h2>\n{figure}"


def pairs(part: pathlib.Path, grids: Mapping[str, tuple]) -> str:
    """Shows teacher, student and difference for each style and prompt."""
    blocks = []
    for style, (name, columns) in enumerate(grids.items()):
        cards = []
        for row, (prompt, teacher, student) in enumerate(zip(*columns, strict=True)):
            file = f"pair_{style:02d}_{row:02d}.png"
            figures.triple(teacher, student).save(part / file)
            cards.append(_picture(file, f"teacher, student and difference: {prompt}", escape(prompt)))
        blocks.append(f'<h3>{escape(name)}</h3>\n<div class="pairs">{"".join(cards)}</div>')
    if not blocks:
        return ""
    return f"""<h2>Same prompt, same noise</h2>
<p>From left to right: the teacher, the student in that style, and the difference between them, amplified
{figures.DIFFERENCE_GAIN} times (black is equal).</p>
{_lines(blocks)}"""


def interpolation(
    part: pathlib.Path,
    images: UInt8[np.ndarray, "k H W 3"],
    weights: Sequence[float],
    name_a: str,
    name_b: str,
    prompt: str,
) -> str:
    """Shows the way from one style to another."""
    cells = []
    for place, (image, weight) in enumerate(zip(images, weights, strict=True)):
        file = f"interpolation_{place:02d}.png"
        figures.tile(image).save(part / file)
        cells.append(_picture(file, f"weight {weight:g}", f"{weight:.2f}"))
    return f"""<h2>Between two styles</h2>
<p>Styles mix by weights. From {escape(name_a)} (0) to {escape(name_b)} (1), with one noise and the prompt
“{escape(prompt)}”.</p>
<div class="strip">{"".join(cells)}</div>"""


def losses(part: pathlib.Path, metrics: Sequence[Mapping], styles: Sequence[str]) -> str:
    """Shows the losses on the way; nothing when no line has any."""
    if not any(line.get("score") or line.get("validation") for line in metrics):
        return ""
    text = "Mean squared difference between the student's and the teacher's predictions, one line per style."
    figure = _figure(part, "losses", lambda theme: figures.losses(metrics, styles, theme), text)
    return f"<h2>Training</h2>\n{figure}"


def fidelity(results: Mapping) -> str:
    """Lists how alike teacher and student draw from the same noise; nothing without measures."""
    styles, rows = results["styles"], []
    for name, values in (results.get("fidelity") or {}).items():
        if not isinstance(values, Mapping):
            values = dict(zip(styles, values, strict=True)) if isinstance(values, (list, tuple)) else {"": values}
        cells = "".join(f"<td><small>{escape(key)}</small>{_shown(one)}</td>" for key, one in values.items())
        rows.append(f'<tr><th scope="row">{escape(_words(name))}</th>{cells}</tr>')
    if not rows:
        return ""
    pairs = f"{results['pairs']:,} pairs a style" if "pairs" in results else "The pairs"
    return f"""<h2>Paired fidelity</h2>
<p>Teacher and student start from the same noise, so that their pictures can be compared one by one. The floor is the
teacher against itself in another precision, from the same noise: nearer than its own rounding nothing can come. Other
noise: the teacher against itself from there, as far apart as unrelated pictures of one prompt are.</p>
<div class="scroll"><table class="numbers">
{_lines(rows)}</table></div>
<p class="soft note">{pairs}: means, of PSNR the median.</p>"""


def kernel(measured: Mapping | None, styles: Sequence[str]) -> str:
    """Lists the kernel's distances of student and floor, mean and standard deviation over subsets; else nothing."""
    if not measured:
        return ""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in styles)
    rows = []
    for what in ("student", "floor"):
        cells = "".join(f"<td>{_value(one['mean'])} ± {_value(one['std'])}</td>" for one in measured[what].values())
        rows.append(f'<tr><th scope="row">{what.capitalize()}</th>{cells}</tr>')
    return f"""<h2>{escape(measured["distance"])}</h2>
<p>A distance without bias, for few pictures: mean ± standard deviation over {escape(measured["subsets"])} pictures.</p>
<div class="scroll"><table class="numbers"><tr><th></th>{head}</tr>
{_lines(rows)}</table></div>"""


def clip_score(part: pathlib.Path, results: Mapping) -> str:
    """Compares how well the models' pictures fit their prompts, as a figure and as a table; nothing without a CLIP."""
    scores = results.get("clip_score")
    if not scores:
        return ""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in [*results["styles"], "mean"])
    rows = [
        _row("Base model", scores["base"], None),
        *(_row(_merge(method), scores[method], None) for method in results["weight_merges"]),
        _row("Student", scores["student"], None, mark=' class="student"'),
        _row("Teacher", scores["teacher"], None),
        _row("Teacher, other noise", scores["teacher_again"], None),
    ]
    text = f"""The mean over {results["n"]:,} pictures of 100 times the cosine between a picture and its prompt, never
below 0; the bar is the teacher. What the teacher's two rows differ by is chance."""
    return f"""<h2>{escape(scores["name"])}: do the pictures show what was asked for?</h2>
{_figure(part, "clip_scores", lambda theme: figures.clip_scores(results, theme), text)}
<div class="scroll"><table class="numbers"><tr><th></th>{head}</tr>
{_lines(rows)}</table></div>"""


def made(results: Mapping) -> str:
    """Tells how the numbers came about: the command, the settings, the times."""
    lists = []
    weights = [(model, one) for model, networks in (results.get("weights") or {}).items() for one in networks.items()]
    hashes = {f"{model}: {network}": sha256[:16] for model, (network, sha256) in weights}
    facts = [
        *((name, results.get(name) or {}) for name in ("settings", "timings")),
        ("weights, SHA-256 of the contents", hashes),
    ]
    for name, values in facts:
        rows = [
            f'<tr><th scope="row">{escape(key if values is hashes else _words(key))}</th><td>{_shown(value)}</td></tr>'
            for key, value in values.items()
        ]
        lists.append(f"<div><h3>{name.capitalize()}</h3><table>{_lines(rows)}</table></div>" if rows else "")
    command = f"<pre>{escape(results['command'])}</pre>" if results.get("command") else ""
    return f"""<h2>How the numbers were made</h2>
<p>A distance compares {results["n"]:,} pictures of a model with {results["n"]:,} of the teacher. The unrounded numbers
are in <a href="metrics.json">metrics.json</a>.</p>
{command}
<div class="facts">{"".join(lists)}</div>"""


def _figure(part: pathlib.Path, name: str, draw: Callable, text: str, mark: str = "") -> str:
    drawn = figures.render(draw)
    for theme, png in drawn.items():
        (part / f"{name}_{theme}.png").write_bytes(png)
    width = int.from_bytes(drawn["light"][16:20], "big") // 2  # A PNG's width; drawn at twice the screen's size.
    return (
        f'<figure{mark}><picture><source srcset="{name}_dark.png" media="(prefers-color-scheme: dark)">'
        f'<img src="{name}_light.png" alt="{name}" width="{width}"></picture><figcaption>{text}</figcaption></figure>'
    )


def _picture(file, alt, caption):
    return f'<figure><img src="{file}" alt="{escape(alt)}"><figcaption>{caption}</figcaption></figure>'


def _value(value):
    """Returns a number rounded for the eye, exact for a program."""
    return f'<data value="{float(value)!r}">{figures.number(float(value))}</data>'


def _percent(share):
    if share is None or not np.isfinite(share):
        return "–"
    return f'<data value="{float(share)!r}">{100 * share:.0f}%</data>'


def _shown(value):
    if value is None:
        return "–"
    if isinstance(value, (float, np.floating)):
        return _value(value)
    return escape(value if isinstance(value, (str, int)) else json.dumps(value, ensure_ascii=False, default=str))


def _mean(values):
    known = [value for value in values if value is not None and np.isfinite(value)]
    return float(np.mean(known)) if known else None


def _words(name):
    """Returns a key as words; a unit at its end goes into brackets."""
    words = str(name).split("_")
    return (
        " ".join(words[:-1]) + f" ({words[-1]})" if words[-1] in ("s", "db", "gb") and words[:-1] else " ".join(words)
    )


def _listed(names):
    """Returns the names in brackets, as long as they are few enough to be read."""
    quoted = [escape(name) for name in names]
    return f" ({' and '.join(filter(None, [', '.join(quoted[:-1]), quoted[-1]]))})" if len(quoted) <= 8 else ""


def _lines(blocks):
    return "\n".join(blocks)


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
.samples th, .samples td { border: 0; padding: 0 .5rem .5rem 0; vertical-align: middle; overflow-wrap: anywhere; }
.samples th[scope=row] { font-weight: 400; color: var(--soft); font-size: .88rem; min-width: 10rem; max-width: 16rem;
  line-height: 1.4; padding-left: .6rem; }
.samples th[scope=col] { max-width: 9.5rem; vertical-align: bottom; } .samples img { width: 9.5rem; max-width: none; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 0 3rem; font-size: .9rem; }
.facts table { width: 100%; } .facts th { font-weight: 400; color: var(--soft); width: 45%; }
.facts td { overflow-wrap: anywhere; }
"""
