"""Figures as PNGs, each once for light and once for dark pages, drawn with matplotlib's Agg backend."""

import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

_DPI = 200
MERGES = {"average": "weight average", "task_arithmetic": "task arithmetic", "ties": "TIES", "dare": "DARE"}


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colours of a light or dark page; `steps` run from a small distance to a large one."""

    name: str
    ink: str
    soft: str
    line: str
    steps: tuple[str, ...]
    marks: Mapping[str, str]


LIGHT = Theme(
    "light", "#1c1b19", "#66625a", "#dcd7cc", ("#0b5a5e", "#3f9a94", "#a9d3c6", "#f0ead8", "#f6f1e6"),
    {"base": "#b9b2a4", "average": "#d98b2b", "task_arithmetic": "#7a4fa3", "ties": "#c2453d", "dare": "#3c7bc9",
     "student": "#0b6e6e", "floor": "#1c1b19"},
)  # fmt: skip
DARK = Theme(
    "dark", "#e9e6df", "#9f9a90", "#3a3d41", ("#8fe3d6", "#3fa79f", "#1f6468", "#233438", "#212527"),
    {"base": "#6d6a64", "average": "#e5a04b", "task_arithmetic": "#b795dd", "ties": "#ec7f76", "dare": "#7fb0ee",
     "student": "#63c3bd", "floor": "#e9e6df"},
)  # fmt: skip
_LINES = {
    "light": ("#0b6e6e", "#d98b2b", "#7a4fa3", "#c2453d", "#3c7bc9", "#6b8e23", "#a0522d", "#d4639a"),
    "dark": ("#63c3bd", "#e5a04b", "#b795dd", "#ec7f76", "#7fb0ee", "#a9c95f", "#cf9468", "#eb9cc3"),
}


def render(draw: Callable[[Theme], Figure]) -> dict[str, bytes]:
    """Returns the PNG of `draw(theme)` for "light" and "dark", with a transparent background."""
    with rc_context({"text.parse_math": False}):  # A style's name may be "$x$".
        return {theme.name: _png(draw(theme)) for theme in (LIGHT, DARK)}


def matrix(results: Mapping, theme: Theme) -> Figure:
    """Draws base, weight merges, the style matrix and the floor as heat maps on one scale, in this order."""
    names = [_label(name) for name in results["styles"]]
    merges = results["weight_merges"]
    above = np.asarray([results["base"], *(results[method] for method in merges)], float)
    blocks = [
        (["base model", *(MERGES[method] for method in merges)], above),
        ([f"student: {name}" for name in names], np.asarray(results["matrix"], float)),
        (["floor"], np.asarray([results["floor"]], float)),
    ]
    num = len(names)
    width = min(0.9, 7.8 / num)
    figure = _figure(width * num, 0.75 * width * (num + len(merges) + 2.4))
    axes = figure.subplots(3, 1, gridspec_kw={"height_ratios": [len(rows) for rows, _ in blocks], "hspace": 0.12})
    norm = _norm(np.concatenate([values.ravel() for _, values in blocks]))
    for ax, (rows, values) in zip(axes, blocks, strict=True):
        _heat(ax, rows, values, norm, theme, fontsize=9 if width > 0.6 else 6.5)
    rotation = {"rotation": 40, "ha": "left"} if max(map(len, names)) * 0.09 > width else {}
    axes[0].set_xticks(range(num), names, **rotation)
    for place in range(num):
        axes[1].add_patch(Rectangle((place - 0.5, place - 0.5), 1, 1, fill=False, lw=1.8, ec=theme.ink, clip_on=False))
    return figure


def _heat(ax, rows, values, norm, theme, fontsize):
    colours = LinearSegmentedColormap.from_list("distance", theme.steps)
    ax.imshow(values, cmap=colours, norm=norm, aspect="auto")
    ax.set_yticks(range(len(rows)), rows)
    ax.set_xticks([])
    ax.xaxis.tick_top()
    ax.tick_params(length=0, labelsize=9, colors=theme.ink)
    ax.spines[:].set_visible(False)
    for (row, column), value in np.ndenumerate(values):
        red, green, blue, _ = colours(norm(value)) if np.isfinite(value) else (0.5, 0.5, 0.5, 1)
        ink = "#ffffff" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.45 else "#1c1b19"
        ax.text(column, row, format_number(value), ha="center", va="center", fontsize=fontsize, color=ink)


def distances(results: Mapping, theme: Theme) -> Figure:
    """Draws each style's distances of base, weight merges, student and floor to the teacher."""
    rows = {name: results[name] for name in ("base", *results["weight_merges"])}
    rows |= {"student": np.diagonal(np.asarray(results["matrix"], float)), "floor": results["floor"]}
    return _dot_plot(results["styles"], rows, theme, f"{results['distance']} to the teacher", bar="floor")


def clip_scores(results: Mapping, theme: Theme) -> Figure:
    """Draws each style's CLIPScores of base, weight merges, student and teacher."""
    scores = results["clip_score"]
    rows = {name: scores[name] for name in ("base", *results["weight_merges"], "student")}
    return _dot_plot(results["styles"], rows | {"floor": scores["teacher"]}, theme, scores["name"], bar="teacher")


def _dot_plot(styles, rows, theme, title, bar):
    """Draws one line per style with one mark per row of values; an upright bar marks the last row, `bar`."""
    names, values = [_label(name) for name in styles], np.asarray(list(rows.values()), float)
    figure = _figure(11.0, 0.9 + 0.42 * len(names))
    ax = figure.subplots()
    places = np.arange(len(names))
    ax.hlines(places, np.nanmin(values, 0), np.nanmax(values, 0), color=theme.line, lw=2, zorder=1)
    labels = {"base": "base model", **MERGES, "student": "student", "floor": bar}
    for name, row in rows.items():
        size, shape = (95, "o") if name == "student" else (60, "|" if name == "floor" else "o")
        ax.scatter(row, places, s=size if shape == "o" else 190, marker=shape, lw=2.2 if shape == "|" else 0,
                   color=theme.marks[name], label=labels[name], zorder=3 if name == "student" else 2)  # fmt: skip
    if isinstance(_norm(values.ravel()), LogNorm):
        ax.set_xscale("log")
        _plain_ticks(ax.xaxis)
    ax.set_yticks(places, names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlabel(title, color=theme.soft, fontsize=9)
    _quiet(ax, theme, grid="x")
    ax.legend(ncols=len(rows), loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False, labelcolor=theme.ink,
              fontsize=9, borderaxespad=0.2, handletextpad=0.3, columnspacing=1.6)  # fmt: skip
    return figure


def runs(rows: Mapping[str, Sequence[float]], floor: float, title: str, theme: Theme) -> Figure:
    """Draws one line per row with a mark for each of its values, and an upright line for the floor."""
    figure = _figure(8.0, 0.6 + 0.3 * len(rows))
    ax = figure.subplots()
    for place, values in enumerate(rows.values()):
        ax.hlines(place, min(values), max(values), color=theme.line, lw=3, zorder=1)
        ax.scatter(values, [place] * len(values), s=38, lw=0, color=theme.marks["student"], alpha=0.75, zorder=2)
    ax.axvline(floor, color=theme.marks["floor"], lw=1.4, zorder=0)
    ax.set_xscale("log")
    _plain_ticks(ax.xaxis)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlabel(title, color=theme.soft, fontsize=9)
    _quiet(ax, theme, grid="x")
    return figure


def losses(lines: Sequence[Mapping], styles: Sequence[str], theme: Theme) -> Figure:
    """Draws each style's training loss, and its validation loss if the log has it, over the steps."""
    keys = {"training": "score", "validation": "validation"}
    panels = [(title, key) for title, key in keys.items() if any(line.get(key) for line in lines)]
    figure = _figure(11.6, 3.3)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, key) in zip(axes, panels, strict=True):
        for place, name in enumerate(styles):
            points = [(line["step"], np.mean(line[key][name])) for line in lines if name in line.get(key, {})]
            colour = _LINES[theme.name][place % len(_LINES[theme.name])]
            dash = ("-", "--", ":")[place // len(_LINES[theme.name]) % 3]
            _curve(ax, points, color=colour, ls=dash, label=_label(name))
        ax.set_yscale("log")
        _plain_ticks(ax.yaxis)
        ax.set_title(f"{title} loss", loc="left", color=theme.ink, fontsize=10)
        ax.set_xlabel("step", color=theme.soft, fontsize=9)
        _quiet(ax, theme, grid="y")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=6, loc="upper left", bbox_to_anchor=(0.115, 0.0), frameon=False,
                  labelcolor=theme.ink, fontsize=9)  # fmt: skip
    return figure


def scaling(lines: Mapping[str, Sequence[tuple[int, float]]], theme: Theme) -> Figure:
    """Draws images/s over the number of devices, one line per layout; a dotted line shows linear scaling."""
    figure = _figure(7.2, 4.2)
    ax = figure.subplots()
    for colour, (layout, points) in zip(_LINES[theme.name], lines.items(), strict=False):
        _curve(ax, points, color=colour, label=layout)
    devices = sorted({count for points in lines.values() for count, _ in points})
    first = min(point for points in lines.values() for point in points)
    ax.plot([0, devices[-1]], [0, first[1] / first[0] * devices[-1]], ls=":", lw=1.2, color=theme.soft, label="linear")
    ax.set_xlim(0, devices[-1] * 1.03)
    ax.set_ylim(0)
    ax.set_xticks(devices)
    ax.set_xlabel("devices", color=theme.soft, fontsize=9)
    ax.set_ylabel("images/s", color=theme.soft, fontsize=9)
    _quiet(ax, theme, grid="y")
    ax.legend(loc="upper left", frameon=False, labelcolor=theme.ink, fontsize=9)
    return figure


def latencies(lines: Mapping[str, Sequence[tuple[float, float]]], theme: Theme) -> Figure:
    """Draws the 99th percentile of the time to an image over the load, one line per way to serve."""
    figure = _figure(7.2, 4.2)
    ax = figure.subplots()
    for colour, (name, points) in zip(_LINES[theme.name], lines.items(), strict=False):
        _curve(ax, points, color=colour, label=name)
    ax.set_yscale("log")
    _plain_ticks(ax.yaxis)
    ax.set_xlabel("requests/s, as a share of the engine's images/s at saturation", color=theme.soft, fontsize=9)
    ax.set_ylabel("seconds to an image, 99th percentile", color=theme.soft, fontsize=9)
    _quiet(ax, theme, grid="y")
    ax.legend(loc="upper left", frameon=False, labelcolor=theme.ink, fontsize=9)
    return figure


def _curve(ax, points, **style):
    """Draws a line; a long one is faint, under its running mean."""
    if not points:
        return
    steps, values = np.asarray(points, float).T
    window = len(points) // 40
    if window > 1:
        ax.plot(steps, values, lw=0.6, alpha=0.3, **style | {"label": None})
        values = np.convolve(values, np.ones(window) / window, "valid")
        steps = steps[window // 2 :][: len(values)]
    ax.plot(steps, values, lw=1.6, **style, marker="o" if len(points) < 30 else None, ms=3)


def format_number(value: float) -> str:
    """Returns a number with three digits, without an exponent unless it is tiny."""
    if not np.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1000:
        return f"{value:#.3g}".rstrip(".")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1e}"


def _figure(width, height):
    figure = Figure(figsize=(width, height), layout=None)
    FigureCanvasAgg(figure)
    return figure


def _png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, transparent=True, bbox_inches="tight", pad_inches=0.06)
    return buffer.getvalue()


def _norm(values):
    """Returns a logarithmic scale if the values span more than a factor of eight, else a linear one from zero."""
    values = values[np.isfinite(values)]
    low, high = (values.min(), values.max()) if values.size else (0.0, 1.0)
    return LogNorm(low, high) if low > 0 and high / low > 8 else Normalize(min(low, 0.0), max(high, 1e-12))


def _label(name):
    short = name if len(name) <= 20 else name[:19] + "…"
    return "\u200b" + short if short.startswith("_") else short  # Matplotlib omits labels with a leading _.


def _plain_ticks(axis):
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _quiet(ax, theme, grid):
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(theme.line)
    ax.tick_params(which="both", length=0, labelsize=9, colors=theme.soft)
    ax.grid(axis=grid, color=theme.line, lw=0.6, alpha=0.7)
    ax.set_axisbelow(True)
    if grid == "x":
        ax.tick_params(axis="y", labelcolor=theme.ink)
