"""Turns styles as people write them (a name, a mix, a schedule over timesteps) into rows of weights.

A style enters the network as one vector that is added to the timestep embedding: a weighted sum of the style table's
rows (DMM, arXiv:2504.12364, 4.5). So it may differ per image of a batch, and per evaluation of the solver: one style
for the structure, which the solver draws at high timesteps, and one for the detail.
"""

import re
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from dmm_jax.runtime.errors import UserError, meant

Mix = str | Mapping[str, float]
Schedule = Sequence[Sequence]  # Pairs: a first timestep, or a span (high, low) for a fade; and a mix.
Style = Mix | Schedule | None
NULL_STYLE = "none"  # The style of a request without one; the base is its teacher.
SUM_TOLERANCE = 0.02  # Users write 0.33 three times and mean 1.
_START = re.compile(r":([0-9.]+(?:-[0-9.]+)?):")


def style_row(style: Style, names: Sequence[str]) -> Float[np.ndarray, " N"]:
    """Returns the weights of a style name or a mix; None is the null style, if the model has one.

    Raises:
      UserError: the style is unknown or missing, all weights are 0, or it is a schedule, which is more than one row.
    """
    if style is None and NULL_STYLE not in names:
        raise UserError(f"this merged model needs a style for every image; it has: {', '.join(names)}.")
    if is_schedule(style):
        raise UserError(
            f"{style_text(style)!r} is a schedule over timesteps, and a checkpoint holds one style for all of them. "
            "Give a name or a mix."
        )
    if not isinstance(style, (str, Mapping, type(None))):
        raise UserError(
            f"a style is a name, a mix such as {{'anime': 0.7, 'photo': 0.3}} or a schedule such as "
            f"[(1000, 'photo'), (600, 'anime')]; got {style!r}."
        )
    style = NULL_STYLE if style is None else style
    mix = {style: 1.0} if isinstance(style, str) else dict(style)
    row = np.zeros(len(names), np.float32)
    for name, weight in mix.items():
        if name not in names:
            mix = _as_mix(name, names)
            end = f"; did you mean {mix!r}? The weights of a mix sum to 1." if mix else meant(name, names, repr)
            raise UserError(f"there is no style {name!r}{end} There are: {', '.join(names)}.")
        row[list(names).index(name)] = weight
    if not np.isfinite(row).all() or not row.any():
        raise UserError(f"a mix needs finite weights, at least one of them not 0; got {style_text(mix)!r}.")
    total = float(row.sum(dtype=np.float64))
    faults = [f"sum to {total:.6g} instead of 1"] if abs(total - 1.0) > SUM_TOLERANCE else []
    faults += ["are negative in part"] if (row < 0).any() else []
    if faults:
        warnings.warn(
            f"the weights of {style_text(mix)!r} {' and '.join(faults)}: the result is outside the range of the "
            "trained styles.",
            stacklevel=2,
        )
    return row


def _as_mix(text: str, names: Sequence[str]) -> str:
    """Returns NAME=WEIGHT,... for a mix in another program's notation (a:0.5, "a,b", (a:0.7)+b*0.3); "" for no mix."""
    parts = [re.split("[:*]", part.strip(" ()")) for part in re.split("[,+]", text)]
    try:
        mix = [(name.strip(), float(weight[0]) if weight else 1 / len(parts)) for name, *weight in parts]
    except ValueError:
        return ""
    return ",".join(f"{name}={weight:.3g}" for name, weight in mix) if {name for name, _ in mix} <= set(names) else ""


def is_writable(name: str) -> bool:
    """Tells whether a mix can hold a style's name as the command line writes it."""
    return bool(name) and name.isprintable() and not set("=,") & set(name) and parse_style(name) == name


def style_rows(
    style: Style, names: Sequence[str], timesteps: Float[np.ndarray, " S"], num_train_timesteps: int
) -> Float[np.ndarray, "S N"]:
    """Returns the weights of a style at every evaluation of a solver, by the evaluation's own timestep.

    Args:
      style: a name, a mix, or a schedule. [(1000, "photo"), (600, "anime")] is photo down to timestep 600 and anime
        below; [(1000, "photo"), ((800, 400), "anime")] fades linearly from photo at 800 to anime at 400.

    Raises:
      UserError: as `style_row`; or a schedule that leaves timesteps without a style, or with two.
    """
    if not is_schedule(style):
        return np.tile(style_row(style, names), (len(timesteps), 1))
    spans = [tuple(np.broadcast_to(np.asarray(start, float), 2)) for start, _ in style]
    _check_spans(spans, style, num_train_timesteps)
    rows = np.zeros((len(timesteps), len(names)), np.float32)
    for number, ((high, low), (_, mix)) in enumerate(zip(spans, style, strict=True)):
        share = (np.asarray(timesteps) <= low).astype(np.float32) if number else np.ones(len(timesteps), np.float32)
        if high > low:
            share = np.clip((high - np.asarray(timesteps)) / (high - low), 0.0, 1.0).astype(np.float32)
        rows = (1.0 - share[:, None]) * rows + share[:, None] * style_row(mix, names)
    return rows


def single_styles(weights: Float[np.ndarray, "B S N"]) -> Float[np.ndarray, "B S K N"]:
    """Splits mixes into the K styles of the largest mix: each of the K weights (N,) has at most one that is not 0.

    The weights of a mix are divided by their sum, which may differ from 1 by rounding (0.33 three times).

    Raises:
      UserError: the weights of a mix do not sum to 1, so their sum of predictions would not be a mean.
    """
    totals = weights.sum(axis=-1, dtype=np.float64)
    if np.any(np.abs(totals - 1.0) > SUM_TOLERANCE):
        wrong = totals.flat[np.abs(totals - 1.0).argmax()]
        raise UserError(f"predictions are mixed by weights that sum to 1; those of a mix sum to {wrong:.6g}.")
    weights = (weights / totals[..., None]).astype(np.float32)
    most = int(np.count_nonzero(weights, axis=-1).max())
    largest = np.argsort(-np.abs(weights), axis=-1, kind="stable")[..., :most]
    is_kept = largest[..., None] == np.arange(weights.shape[-1])
    return np.where(is_kept, weights[..., None, :], np.float32(0.0))


def is_schedule(style) -> bool:
    """Tells whether this is a schedule, a sequence of pairs (timestep or span, mix), and no list of styles."""
    return (
        isinstance(style, Sequence)
        and not isinstance(style, str)
        and bool(style)
        and all(isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2 for pair in style)
        and all(isinstance(mix, (str, Mapping)) and not isinstance(start, (str, Mapping)) for start, mix in style)
    )


def _check_spans(spans, style, num_train_timesteps):
    last = num_train_timesteps - 1
    if spans[0][0] != spans[0][1] or not spans[0][1] >= last:
        raise UserError(
            f"a schedule's first style must hold from the first timestep, {num_train_timesteps}, on; "
            f"got {spans[0][0]:g} for {style_text([*style[:1]])!r}: the timesteps above have no style."
        )
    for (_, above), (high, low) in zip(spans, spans[1:], strict=False):
        if not (0.0 <= low <= high <= above and low < above):
            raise UserError(
                f"a schedule's timesteps must fall, from {num_train_timesteps} to 0 at least, and its fades must not "
                f"overlap; got {high:g} to {low:g} below {above:g} in {style_text(style)!r}."
            )


def parse_style(text: str, num_train_timesteps: int = 1000) -> Style:
    """Reads a style as the command line writes it: `anime`, `anime=0.7,photo=0.3`, or a schedule of these.

    `photo:600:anime` is photo down to timestep 600 and anime below; `photo:800-400:anime` fades from one to the other.

    Raises:
      UserError: a weight or a timestep is not a number, or a name is there twice.
    """
    first, *rest = _START.split(text)  # A name may hold a colon: only a timestep between two colons makes a schedule.
    if not rest:
        return _parse_mix(text)
    later = [(_parse_start(start, text), _parse_mix(mix)) for start, mix in zip(rest[0::2], rest[1::2], strict=True)]
    return [(float(num_train_timesteps), _parse_mix(first)), *later]


def _parse_start(part, text) -> float | tuple[float, float]:
    high, dash, low = part.partition("-")
    try:
        return (float(high), float(low)) if dash else float(high)
    except ValueError:
        raise UserError(
            f"style {text!r}: {part!r} is not a timestep. Write for example 'photo:600:anime', or "
            "'photo:800-400:anime' to fade."
        ) from None


def _parse_mix(text: str) -> Mix:
    if "=" not in text:
        return text.strip()
    mix = {}
    for part in text.split(","):
        name, _, weight = part.partition("=")
        if name.strip() in mix:
            raise UserError(f"style {text!r} names {name.strip()!r} twice: give each style one weight.")
        try:
            mix[name.strip()] = float(weight)
        except ValueError:
            raise UserError(
                f"style {text!r}: {part!r} is not NAME=WEIGHT. Write for example 'anime=0.7,photo=0.3'."
            ) from None
    return mix


def style_text(style: Style) -> str | None:
    """Returns a style as the command line writes it; `parse_style` reads it back."""
    if isinstance(style, Mapping):
        return ",".join(f"{name}={weight:g}" for name, weight in style.items())
    if not is_schedule(style):
        return style
    parts = [style_text(style[0][1])]
    for start, mix in style[1:]:
        parts += ["-".join(f"{at:g}" for at in np.atleast_1d(start)), style_text(mix)]
    return ":".join(parts)


def image_names(prompts: Sequence[str], styles: Style | Sequence[Style]) -> list[str]:
    """Returns the name of each image in errors: its prompt, and its style if it has one."""
    shared = styles is None or isinstance(styles, (str, Mapping)) or is_schedule(styles)
    each = [styles] if shared else list(styles)
    repeats = len(prompts) // max(len(each), 1)
    pairs = zip(prompts, [style for style in each for _ in range(repeats)], strict=False)
    return [f"{text!r}" + (f" in style {style_text(style)}" if style else "") for text, style in pairs]
