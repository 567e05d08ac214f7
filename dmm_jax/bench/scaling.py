"""`dmm-jax bench scaling`: the training step on more and more devices of one host, in each way to divide the work.

Every row is a `bench train` in a process of its own, so that none inherits another's memory and one that fails is a row
that says so. This process never touches a device: a GPU that it held would lack its memory in the children.
"""

import hashlib
import json
import math
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence

import ml_collections

from dmm_jax.config import checks
from dmm_jax.config import options as config_lib
from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.sharding import AXES

ONE = "one device"
LIMIT_S = 1800  # A child that takes longer hangs.
PROBE = "import jax; print(jax.device_count())"
COLUMNS = (
    "mesh",
    "devices",
    "batch",
    "images_per_s",
    "times_one_device",
    "step_s",
    "peak_memory_gb",
    "planned_memory_gb",
    "teacher_gb",
    "sent_gb",
    "collective_share",
    "exposed_collective_share",
    "compile_s",
    "failed",
)


def layouts(num_devices: int, num_rows: int) -> dict[str, dict[str, int]]:
    """Returns the ways to divide the work among devices, {name: devices along each axis}; on one device they are one.

    Args:
      num_rows: of the batch, one a teacher: `teacher` must divide them.
    """
    if num_devices == 1:
        return {ONE: dict.fromkeys(AXES, 1)}
    half = num_devices // 2
    shapes = {
        "teacher": (num_devices, 1, 1),
        "data": (1, num_devices, 1),
        "teacher x data 2": (half, 2, 1),
        "fsdp": (1, 1, num_devices),
    }
    found: dict[str, dict[str, int]] = {}
    for name, shape in shapes.items():
        mesh = dict(zip(AXES, shape, strict=True))
        if math.prod(shape) == num_devices and num_rows % mesh["teacher"] == 0 and mesh not in found.values():
            found[name] = mesh
    return found


def counts(there: int) -> list[int]:
    """Returns the numbers of devices to measure: powers of two, and all; one first, then from the most down.

    A sweep that is cut short has then measured what the result rests on.
    """
    found = {2**power for power in range(there.bit_length())} | {there}
    return [1, *sorted(found - {1}, reverse=True)]


def scaling(
    config: ml_collections.ConfigDict,
    size: str = "sd15",
    num_steps: int = 10,
    devices: Sequence[int] = (),
    profile: str = "",
    results: str = "",
    say: Callable[[dict], None] = lambda row: None,
) -> list[dict]:
    """Measures the step on each number of devices in each layout, the same images on each device everywhere.

    Args:
      config: its batch is one device's; its mesh is not used.
      devices: how many; default: `counts` of those there are.
      profile: a folder for a trace of every row, which the shares of collectives are read from; "": a temporary one.
      results: a file of rows as JSON lines. Those in it are not measured again, new ones are added.
      say: is told each row once it is there.

    Returns:
      A row per number of devices and layout: what `bench train --json` says, "times_one_device", or "failed" and why.

    Raises:
      ValueError: the config cannot be run, or there are fewer devices.
    """
    checks.check(_laid_out(config, 1, dict.fromkeys(AXES, 1)))
    there = _device_count()
    devices = list(devices) or counts(there)
    if not all(0 < count <= there for count in devices):
        raise UserError(f"devices must lie between 1 and the {there} of this machine; got {devices}.")
    before, rows = _read(results), []
    told = {"size": size, "config": hashlib.sha256(config_lib.to_json(config).encode()).hexdigest()[:12]}
    with tempfile.TemporaryDirectory(prefix="dmm_jax_scaling_") as folder:
        for count, layout, mesh in _each(devices, config_lib.num_rows(config)):
            key = told | {"layout": layout, "devices": count, "batch": count * config.batch_size}
            row = next((old for old in before if key.items() <= old.items()), None)
            if row is None:
                trace = str(pathlib.Path(profile or folder) / f"{layout} {count}".replace(" ", "_"))
                row = key | {"mesh": mesh} | _measured(_laid_out(config, count, mesh), size, num_steps, count, trace)
                _append(results, row)
            rows.append(_with_ratio(row, [*rows, row]))
            say(rows[-1])
    return rows


def _each(devices, num_rows) -> Iterator[tuple[int, str, dict]]:
    for count in devices:
        for layout, mesh in layouts(count, num_rows).items():
            yield count, layout, mesh


def _laid_out(config, num_devices, mesh):
    changed = config.copy_and_resolve_references()
    changed.mesh.update(mesh)
    changed.batch_size = config.batch_size * num_devices
    return changed


def _with_ratio(row, rows):
    alone = [one["images_per_s"] for one in rows if one["devices"] == 1 and "images_per_s" in one]
    return row | ({"times_one_device": row["images_per_s"] / alone[0]} if alone and "images_per_s" in row else {})


def _device_count() -> int:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"JAX finds no device: {_last_words(done.stderr)}")
    return int(done.stdout.split()[-1])


def _measured(config, size, num_steps, num_devices, trace) -> dict:
    """Runs `bench train` in a process of its own; returns its line, or {"failed": its last words}."""
    with tempfile.TemporaryDirectory(prefix="dmm_jax_scaling_") as folder:
        path = pathlib.Path(folder) / "experiment.py"
        path.write_text(
            "from dmm_jax import config\n\n\n"
            f"def get_config():\n    return config.from_json({config_lib.to_json(config)!r})\n"
        )
        command = [sys.executable, "-m", "dmm_jax", "bench", "train", "--json", f"--config={path}"]
        command += [f"--size={size}", f"--num-steps={num_steps}", f"--devices={num_devices}", f"--profile={trace}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            return {"failed": f"took longer than {LIMIT_S} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"failed": _last_words(done.stderr) or f"ended with code {done.returncode}"}
    return json.loads(lines[-1])


def _last_words(said: str) -> str:
    """Returns the line that says what went wrong: the last that names an error, else the last."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"Error\b|error: |RESOURCE_EXHAUSTED", line)]
    return (errors or lines or [""])[-1][:300]


def _read(path: str) -> list[dict]:
    """Reads the rows of an earlier sweep; those that failed are left out, so that they are tried again."""
    there = path and pathlib.Path(path).is_file()
    rows = [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()] if there else []
    return [row for row in rows if "failed" not in row]


def _append(path: str, row: Mapping) -> None:
    if path:
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")


def write_figure(rows: Sequence[Mapping], path: pathlib.Path) -> list[pathlib.Path]:
    """Draws images/s over devices, a line a layout: PATH for light pages, and NAME_dark.png beside it."""
    from dmm_jax.evaluation import figures

    points: dict[str, list] = {}
    for row in sorted(rows, key=lambda row: row["devices"]):
        if "images_per_s" in row:
            points.setdefault(row["layout"], []).append((row["devices"], row["images_per_s"]))
    if not points:
        raise UserError(f"{path} is not drawn: no row was measured.")
    alone = points.pop(ONE, [])
    lines = {layout: alone + more for layout, more in points.items()} or {ONE: alone}
    pictures = figures.render(lambda theme: figures.scaling(lines, theme))
    paths = {"light": path, "dark": path.with_name(f"{path.stem}_dark{path.suffix}")}
    for name, written in paths.items():
        written.write_bytes(pictures[name])
    return list(paths.values())
