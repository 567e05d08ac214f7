"""The page of a run that trains: losses, newest samples and the time left, in one file that refreshes itself."""

import base64
import io
import math
from collections.abc import Mapping, Sequence

from PIL import Image

from dmm_jax.gallery.page import escape, render

REFRESH_S = 15
MAX_POINTS = 300  # Per curve.
MAX_SAMPLE_SIDE = 1600  # Pixels of the embedded grid; the files in samples/ have all of them.
WIDTH, HEIGHT, MARGIN = 720, 240, 48
COLOURS = ("#0b6e6e", "#c1462f", "#3b5bb5", "#b07d12", "#7a3b8f", "#4d8a2e", "#b03a6b", "#5c5c5c")
_STYLE = """
progress { width: 100%; height: 1rem; accent-color: var(--accent); }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font: 11px ui-sans-serif, system-ui, sans-serif; }
.key span { display: inline-block; margin-right: 1.2rem; } .key i { display: inline-block; width: 1.2rem; height: .2rem;
  vertical-align: middle; margin-right: .4rem; }
"""


def training_page(
    name: str, lines: Sequence[Mapping], num_steps: int, seconds_left: float | None, samples: bytes | None = None
) -> str:
    """Returns the page of a run.

    Args:
      name: of the run.
      lines: of its metrics.jsonl.
      seconds_left: None once the run has ended.
      samples: the newest sample grid, a PNG.
    """
    training = [line for line in lines if "loss" in line]
    validations = [line for line in lines if "validation" in line]
    step = max((line["step"] for line in lines), default=0)
    state = "finished" if seconds_left is None else f"{duration(seconds_left)} left"
    speed = f", {training[-1]['images_per_s']:.1f} images/s" if training else ""
    blocks = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="lead">Step {step:,} of {num_steps:,}: {state}{speed}.</p>',
        f'<progress value="{step}" max="{num_steps}"></progress>',
    ]
    blocks += _chart("Score loss per style", _curves(training, "score"))
    means = [
        {"step": line["step"], "validation": {style: _mean(bins) for style, bins in line["validation"].items()}}
        for line in validations
    ]
    blocks += _chart("Validation loss per style", _curves(means, "validation"))
    if samples:
        blocks.append(f'<h2>Newest samples</h2>\n<img alt="samples" src="{_data_url(samples)}">')
    page = render(name, "\n".join(blocks), _STYLE)
    refresh = f'<meta http-equiv="refresh" content="{REFRESH_S}">\n' if seconds_left is not None else ""
    return page.replace("<title>", f"{refresh}<title>", 1)


def duration(seconds: float) -> str:
    """Returns a duration such as "2 h 05 min"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def _mean(bins: Sequence[float | None]) -> float:
    values = [value for value in bins if value is not None]
    return sum(values) / len(values) if values else math.nan


def _curves(lines, key) -> dict[str, list[tuple[int, float]]]:
    """Returns {style: (step, loss) points that a logarithmic axis can show}."""
    curves = {}
    for line in lines[:: len(lines) // MAX_POINTS + 1]:
        for style, loss in line[key].items():
            if math.isfinite(loss) and loss > 0:
                curves.setdefault(style, []).append((line["step"], loss))
    return curves


def _chart(title: str, curves: Mapping[str, Sequence[tuple[int, float]]]) -> list[str]:
    """Returns a heading, a chart with a logarithmic axis, and its key; nothing without points."""
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return []
    first, last = min(step for step, _ in points), max(step for step, _ in points)
    low, high = (math.log10(pick(loss for _, loss in points)) for pick in (min, max))

    def place(step, loss):
        x = MARGIN + (step - first) / max(last - first, 1) * (WIDTH - MARGIN - 8)
        y = 8 + (high - math.log10(loss)) / max(high - low, 1e-9) * (HEIGHT - 32)
        return f"{x:.1f},{y:.1f}"

    lines = "".join(
        f'<polyline fill="none" stroke="{COLOURS[k % len(COLOURS)]}" stroke-width="1.5" '
        f'points="{" ".join(place(*point) for point in curve)}"/>'
        for k, curve in enumerate(curves.values())
    )
    labels = (
        f'<text x="0" y="14">{10**high:.2g}</text><text x="0" y="{HEIGHT - 24}">{10**low:.2g}</text>'
        f'<text x="{MARGIN}" y="{HEIGHT - 4}">step {first:,}</text>'
        f'<text x="{WIDTH - 8}" y="{HEIGHT - 4}" text-anchor="end">{last:,}</text>'
    )
    key = "".join(
        f'<span><i style="background:{COLOURS[k % len(COLOURS)]}"></i>{escape(style)} {curve[-1][1]:.3g}</span>'
        for k, (style, curve) in enumerate(curves.items())
    )
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{lines}{labels}</svg>'
    return [f'<h2>{escape(title)}</h2>\n{svg}\n<p class="key">{key}</p>']


def _data_url(png: bytes) -> str:
    with Image.open(io.BytesIO(png), formats=("PNG",)) as grid:
        grid.thumbnail((MAX_SAMPLE_SIDE, MAX_SAMPLE_SIDE))
        file = io.BytesIO()
        grid.convert("RGB").save(file, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
