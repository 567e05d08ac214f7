"""The sections of a report's page. Each returns HTML and writes its pictures into the report's folder.

The names of picture files hold numbers, never a style or a prompt.
"""

import pathlib
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from dmm_jax.evaluation import figures
from dmm_jax.evaluation import report_html as html
from dmm_jax.evaluation.style_matrix import gap_closed
from dmm_jax.evaluation.tiles import DIFFERENCE_GAIN, difference_strip, tile
from dmm_jax.gallery.page import escape


class Pairs(NamedTuple):
    """Pictures of one teacher, and of the student in that teacher's style, from the same prompts and noise."""

    prompts: Sequence[str]
    teacher: UInt8[np.ndarray, "n H W 3"]
    student: UInt8[np.ndarray, "n H W 3"]


class Interpolation(NamedTuple):
    """Pictures from one style to another, with the same prompt and noise; `weights` are those of `name_b`, 0 to 1."""

    images: UInt8[np.ndarray, "k H W 3"]
    weights: Sequence[float]
    name_a: str
    name_b: str
    prompt: str


def summary(results: Mapping, title: str) -> str:
    """Shows the gain of distillation: one paragraph, and one number per model."""
    names, student = results["styles"], np.diagonal(np.asarray(results["matrix"], float))
    average = gap_closed(results["average"], results["base"], results["floor"])
    merges = [
        f"<div><dt>{_merge_label(method)}</dt><dd>{html.number(np.mean(results[method]))}</dd></div>"
        for method in results["weight_merges"]
    ]
    *first, last = map(escape, names)
    listed = f" ({' and '.join(filter(None, [', '.join(first), last]))})" if len(names) <= 8 else ""
    ending = (
        "In each style, the student is always nearest the teacher of that style."
        if np.all(results["diagonal_is_minimum"])
        else "Not every style is nearest its own teacher: the matrix below shows which."
    )
    return f"""<h1>{escape(title)}</h1>
<p class="lead">{len(names)} models, each with a style of its own{listed}, were distilled into one student
that takes the style as an input. Simply averaging their weights closes {html.percent(html.mean(average))} of the
distance between the base model and the teachers; the student closes
<strong>{html.percent(html.mean(results["gap_closed"]))}</strong>. {ending}</p>
<dl class="score">
<div><dt>Base model</dt><dd>{html.number(np.mean(results["base"]))}</dd></div>
{html.lines(merges)}
<div class="ours"><dt>Student</dt><dd>{html.number(np.mean(student))}</dd></div>
<div><dt>Floor</dt><dd>{html.number(np.mean(results["floor"]))}</dd></div>
</dl>
<p class="soft note">{escape(results["distance"])} to the teachers on {results["n"]:,} pictures per style, averaged over
the styles; smaller is nearer. The floor compares two samples of the same teacher: with this number of pictures, no
smaller distance can be measured.</p>"""


def paired_summary(results: Mapping, title: str) -> str:
    """Says what the report compares where no distance between sets of pictures was measured."""
    return f"""<h1>{escape(title)}</h1>
<p class="lead">{len(results["styles"])} models, each with a style of its own, were distilled into one student that
takes the style as an input. This report compares teacher and student picture by picture.</p>
<p class="soft note">A distance between sets of pictures needs a network's weights:
<code>dmm-jax evaluate --features</code>.</p>"""


def links(paths: Mapping[str, str]) -> str:
    """Links further pages and files of the run; empty without any."""
    anchors = [f'<a href="{escape(urllib.parse.quote(path))}">{escape(name)}</a>' for name, path in paths.items()]
    return f'<p class="soft">Also of this run: {" · ".join(anchors)}</p>' if anchors else ""


def gains(folder: pathlib.Path, results: Mapping) -> str:
    """Compares base, weight merges, student and floor, style by style, as a figure and as a table."""
    distance, student = escape(results["distance"]), np.diagonal(np.asarray(results["matrix"], float)).tolist()
    caption = f"{distance} between each teacher's pictures and other models' pictures; the bar is the teacher's floor."
    base, floor = results["base"], results["floor"]
    rows = [
        html.model_row("Base model", base),
        *(
            html.model_row(_merge_label(method), results[method], gap_closed(results[method], base, floor))
            for method in results["weight_merges"]
        ),
        html.model_row("Student", student, results["gap_closed"], mark=' class="student"'),
        html.model_row("Floor", floor),
    ]
    return f"""<h2>What distillation buys</h2>
{html.figure(folder, "distances", lambda theme: figures.distances(results, theme), caption)}
{html.table(rows, [*results["styles"], "mean"])}
<p class="soft note">Gap closed: how far a model comes on the way from the base model (0%) to the floor (100%).</p>"""


def _merge_label(method):
    name = figures.MERGES[method]
    return name[0].upper() + name[1:]


def matrix(folder: pathlib.Path, results: Mapping) -> str:
    """Shows the style matrix as a heat map."""
    caption = """Each row is a model, or the student in one style. Each column is the teacher it is compared with. The
outlined diagonal should be the smallest of its row and of its column, and come close to the floor. Base model and
merged weights know no styles, so they have one row each."""
    figure = html.figure(
        folder, "matrix", lambda theme: figures.matrix(results, theme), caption, mark=' class="beside"'
    )
    return f"<h2>Every style against every teacher</h2>\n{figure}"


def pairs(folder: pathlib.Path, by_style: Mapping[str, Pairs]) -> str:
    """Shows teacher, student and difference for each style and prompt."""
    blocks = []
    for style, (name, columns) in enumerate(by_style.items()):
        cards = []
        for row, (prompt, teacher, student) in enumerate(zip(*columns, strict=True)):
            file = f"pair_{style:02d}_{row:02d}.png"
            difference_strip(teacher, student).save(folder / file)
            cards.append(html.picture(file, f"teacher, student and difference: {prompt}", escape(prompt)))
        blocks.append(f'<h3>{escape(name)}</h3>\n<div class="pairs">{"".join(cards)}</div>')
    if not blocks:
        return ""
    return f"""<h2>Same prompt, same noise</h2>
<p>From left to right: the teacher, the student in that style, and the difference between them, amplified
{DIFFERENCE_GAIN} times (black is equal).</p>
{html.lines(blocks)}"""


def interpolation(folder: pathlib.Path, strip: Interpolation) -> str:
    """Shows pictures from one style to another."""
    cells = []
    for place, (image, weight) in enumerate(zip(strip.images, strip.weights, strict=True)):
        file = f"interpolation_{place:02d}.png"
        tile(image).save(folder / file)
        cells.append(html.picture(file, f"weight {weight:g}", f"{weight:.2f}"))
    return f"""<h2>Between two styles</h2>
<p>Styles mix by weights: here from {escape(strip.name_a)} (0) to {escape(strip.name_b)} (1). All pictures share their
noise and the prompt “{escape(strip.prompt)}”.</p>
<div class="strip">{"".join(cells)}</div>"""


def losses(folder: pathlib.Path, training_log: Sequence[Mapping], styles: Sequence[str]) -> str:
    """Shows the losses during training; empty if the log has none."""
    if not any(line.get("score") or line.get("validation") for line in training_log):
        return ""
    caption = "Mean squared difference between the student's and the teacher's predictions, one line per style."
    figure = html.figure(folder, "losses", lambda theme: figures.losses(training_log, styles, theme), caption)
    return f"<h2>Training</h2>\n{figure}"


def fidelity(results: Mapping) -> str:
    """Lists how alike teacher and student draw from the same noise; empty without measures."""
    rows = []
    for name, values in (results.get("fidelity") or {}).items():
        cells = "".join(f"<td><small>{escape(key)}</small>{html.text(value)}</td>" for key, value in values.items())
        rows.append(f'<tr><th scope="row">{escape(html.words(name))}</th>{cells}</tr>')
    if not rows:
        return ""
    return f"""<h2>Paired fidelity</h2>
<p>Teacher and student start from the same noise, so that their pictures can be compared one by one. The floor compares
the teacher with itself in another precision, from the same noise: rounding alone makes this difference. Other noise
compares the teacher with itself from different noise: unrelated pictures of the same prompt.</p>
{html.table(rows)}
<p class="soft note">{results["pairs"]:,} pairs per style. Each number is their mean; for PSNR, the median.</p>"""


def kernel(results: Mapping) -> str:
    """Lists KID of student and floor, mean and standard deviation over subsets; empty if it was not measured."""
    measured = results.get("kernel")
    if not measured:
        return ""
    rows = []
    for model in ("student", "floor"):
        cells = "".join(
            f"<td>{html.number(kid['mean'])} ± {html.number(kid['std'])}</td>" for kid in measured[model].values()
        )
        rows.append(f'<tr><th scope="row">{model.capitalize()}</th>{cells}</tr>')
    return f"""<h2>{escape(measured["distance"])}</h2>
<p>An unbiased distance, which suits few pictures: mean ± standard deviation over random subsets
({escape(measured["subsets"])} pictures).</p>
{html.table(rows, results["styles"])}"""


def clip_score(folder: pathlib.Path, results: Mapping) -> str:
    """Compares how well the models' pictures fit their prompts, as a figure and as a table; empty without a CLIP."""
    scores = results.get("clip_score")
    if not scores:
        return ""
    rows = [
        html.model_row("Base model", scores["base"]),
        *(html.model_row(_merge_label(method), scores[method]) for method in results["weight_merges"]),
        html.model_row("Student", scores["student"], mark=' class="student"'),
        html.model_row("Teacher", scores["teacher"]),
        html.model_row("Teacher, other noise", scores["teacher_again"]),
    ]
    caption = f"""The mean over {results["n"]:,} pictures of 100 times the cosine between a picture and its prompt;
negative cosines count as 0. The bar is the teacher. The difference between the teacher's two rows is chance."""
    return f"""<h2>{escape(scores["name"])}: do the pictures show what was asked for?</h2>
{html.figure(folder, "clip_scores", lambda theme: figures.clip_scores(results, theme), caption)}
{html.table(rows, [*results["styles"], "mean"])}"""


def provenance(results: Mapping) -> str:
    """Lists how the numbers were made: the command, the settings, the times and the weights."""
    weights = {
        f"{model}: {network}": sha256[:16]
        for model, networks in (results.get("weights") or {}).items()
        for network, sha256 in networks.items()
    }
    tables = {
        name.capitalize(): {html.words(key): value for key, value in (results.get(name) or {}).items()}
        for name in ("settings", "timings")
    }
    blocks = []
    for name, values in (tables | {"Weights, SHA-256 of the contents": weights}).items():
        rows = [
            f'<tr><th scope="row">{escape(key)}</th><td>{html.text(value)}</td></tr>' for key, value in values.items()
        ]
        blocks.append(f"<div><h3>{name}</h3><table>{html.lines(rows)}</table></div>" if rows else "")
    counted = (
        f"A distance compares {results['n']:,} pictures of a model with {results['n']:,} of the teacher. "
        if "n" in results
        else ""
    )
    command = f"<pre>{escape(results['command'])}</pre>" if results.get("command") else ""
    return f"""<h2>How the numbers were made</h2>
<p>{counted}The unrounded numbers are in <a href="metrics.json">metrics.json</a>.</p>
{command}
<div class="facts">{"".join(blocks)}</div>"""
