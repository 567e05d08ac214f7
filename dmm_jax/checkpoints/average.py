"""`dmm-jax average`: a weight average of checkpoints, without training, as one stock checkpoint."""

import math
import pathlib
import sys
from collections.abc import Sequence

from dmm_jax.checkpoints import licenses, provenance
from dmm_jax.checkpoints.compare import check_mergeable
from dmm_jax.checkpoints.merge import METHODS, Method, merged
from dmm_jax.checkpoints.open import Checkpoint, open_checkpoint, open_teacher
from dmm_jax.checkpoints.write import DTYPES, Recipe, write_folder, write_single_file
from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.storage import check_output

SINGLE_FILE = ".safetensors"
COMPONENTS = ("unet", "text_encoder")  # What can be merged. A VAE is kept whole: the latents are the base's.


def average(
    out: pathlib.Path,
    base: pathlib.Path,
    teachers: Sequence[pathlib.Path],
    method: str,
    weights: Sequence[float] | None = None,
    scale: float | None = None,
    density: float | None = None,
    seed: int | None = None,
    dtype: str = "float16",
    components: str = ",".join(COMPONENTS),
    prediction_type: str = "",
) -> pathlib.Path:
    """Writes the merged checkpoint and returns its path: a single file where it ends in .safetensors, else a folder.

    On stderr it says which network is merged and which is the base's.

    Args:
      out: a new file, or a new or empty diffusers folder.
      base: the checkpoint that the teachers come from; what is not merged is the base's.
      teachers: checkpoints that are merged.
      method: one of METHODS; what it does not take must be None, and None means its own default.
      components: what is merged, of COMPONENTS with commas between them; "text_encoder" is all that there are.
      prediction_type: of single files that do not say it; see `open_checkpoint`.

    Raises:
      ValueError: the output is taken, a number is out of range or the method takes no such option.
      CheckpointError: a checkpoint is damaged or does not fit the base; all obstacles are named. Nothing is written.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}.")
    how = parse_method(method, len(teachers), weights, scale=scale, density=density, seed=seed)
    out = _check_output(pathlib.Path(out))
    opened = [open_teacher(path, base, prediction_type=prediction_type) for path in teachers]
    ancestor = open_checkpoint(base, prediction_type=prediction_type)
    check_mergeable(ancestor, {str(number): one for number, one in enumerate(opened, start=1)})
    names = [one.name for one in opened]
    networks = networks_of(ancestor, components.split(","))
    for line in sources(ancestor, opened, networks, method):
        print(line, file=sys.stderr)
    license = licenses.together(one.license for one in (ancestor, *opened))
    recipe = Recipe(f"{method} of {', '.join(names)}", names, describe(ancestor, opened, how, networks), license)
    write = write_single_file if out.suffix == SINGLE_FILE else write_folder
    return write(out, merged(ancestor, opened, how, networks), dtype, recipe)


def networks_of(base: Checkpoint, components: Sequence[str] = COMPONENTS) -> tuple[str, ...]:
    """Returns the base's networks that `components` names; by default those of which a report's baselines are merged.

    Raises:
      ValueError: there is no such component.
    """
    unknown = [name for name in components if name not in COMPONENTS]
    if unknown or not components:
        raise UserError(f"--components takes {', '.join(COMPONENTS)}; got {', '.join(unknown) or 'nothing'}.")
    unet = ("unet",) if "unet" in components else ()
    texts = base.text_encoders if "text_encoder" in components else ()
    return unet + tuple(name for name in texts if base.has(name))


def sources(base: Checkpoint, teachers: Sequence[Checkpoint], networks: Sequence[str], method: str) -> list[str]:
    """Returns a line on each network of the result: whose it is."""
    lines = []
    for network in networks:
        lacking = [one.name for one in teachers if not one.has(network)]
        of = ", ".join(f"{one.name} (the base's: it has none)" if one.name in lacking else one.name for one in teachers)
        lines.append(f"{network}: {method} of {of}")
    kept = [name for name in base.components if name not in networks]
    return [*lines, f"{', '.join([*kept, 'tokenizer'])}: the base's, {base.name}"]


def parse_method(name: str, num_teachers: int, weights: Sequence[float] | None = None, **options) -> Method:
    """Returns a method with its weights and options, defaults filled in.

    Args:
      weights: of the teachers; None for equal ones.
      options: scale, density and seed; None where they are not given.

    Raises:
      ValueError: there is no such method, it does not take an option, or a number is out of range.
    """
    if name not in METHODS:
        raise UserError(f"there is no method {name!r}; there are: {', '.join(METHODS)}.")
    given = {option: value for option, value in options.items() if value is not None}
    unused = sorted(set(given) - set(METHODS[name]))
    if unused:
        takes = ", ".join(METHODS[name]) or "weights alone"
        raise UserError(f"{name} does not take {', '.join(unused)}; it takes {takes}. Leave it out.")
    method = Method(name, _weights(name, num_teachers, weights), **{**METHODS[name], **given})
    if not math.isfinite(method.scale):
        raise UserError(f"scale must be finite; got {method.scale}.")
    if not 0 < method.density <= 1:
        raise UserError(
            f"density must be above 0 and at most 1, the share of each difference that stays; got {method.density}."
        )
    return method


def _weights(name, num_teachers, weights) -> tuple[float, ...]:
    weights = (1.0,) * num_teachers if weights is None else tuple(map(float, weights))
    if not num_teachers or len(weights) != num_teachers:
        raise UserError(f"one weight a teacher, please: {num_teachers} teachers, {len(weights)} weights.")
    if not all(map(math.isfinite, weights)):
        raise UserError(f"weights must be finite; got {weights}.")
    if name in ("average", "ties") and (min(weights) < 0 or not sum(weights)):
        raise UserError(f"{name} takes a mean: weights must not be negative, nor all 0; got {weights}.")
    return weights


def _check_output(out: pathlib.Path) -> pathlib.Path:
    if out.suffix != SINGLE_FILE:
        return check_output(out)
    if out.exists():
        raise UserError(f"{out} is there; nothing is overwritten. Give another name.")
    if not out.absolute().parent.is_dir():
        raise UserError(f"there is no folder {out.parent} to write {out.name} in. Make it first.")
    return out


def describe(base: Checkpoint, teachers: Sequence[Checkpoint], method: Method, networks: Sequence[str]) -> dict:
    """Returns the recipe: the method, what was merged, and of each parent its name, its files' hashes, its weight."""
    options = {option: getattr(method, option) for option in METHODS[method.name]}
    weighted = [
        provenance.record(one) | {"weight": weight} for one, weight in zip(teachers, method.weights, strict=True)
    ]
    said = {"method": method.name, **options, "networks": list(networks)}
    return said | {"base": provenance.record(base), "teachers": weighted}
