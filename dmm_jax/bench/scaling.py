"""`dmm-jax bench scaling`: the training step on 1, 2, 4, ... devices of one host, in each way to divide the work.

Every row is a `bench train` in a process of its own, so that no row inherits memory from another, and a failure becomes
a row with its error. This process never touches a device: it would take GPU memory from its children.
"""

import hashlib
import json
import math
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence

import ml_collections

from dmm_jax.config import checks
from dmm_jax.config.options import num_rows
from dmm_jax.config.serialization import to_json
from dmm_jax.runtime import metrics
from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.sharding import AXES

ONE = "one device"
LIMIT_S = 1800  # A child that takes longer has hung.
PROBE = "import jax; print(jax.device_count())"
COLUMNS = (
    "mesh", "devices", "batch", "images_per_s", "times_one_device", "step_s", "peak_memory_gb", "planned_memory_gb",
    "teacher_gb", "sent_gb", "collective_share", "exposed_collective_share", "compile_s", "failed",
)  # fmt: skip


def layouts(num_devices: int, num_rows: int) -> dict[str, dict[str, int]]:
    """Returns the different ways to divide the work among devices: {name: {axis: devices along it}}.

    Args:
      num_rows: rows of the batch, one per teacher: the size of the axis `teacher` must divide them.
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
    meshes: dict[str, dict[str, int]] = {}
    for name, shape in shapes.items():
        mesh = dict(zip(AXES, shape, strict=True))
        if math.prod(shape) == num_devices and num_rows % mesh["teacher"] == 0 and mesh not in meshes.values():
            meshes[name] = mesh
    return meshes


def device_counts(available: int) -> list[int]:
    """Returns the numbers of devices to measure: 1, then all, then the powers of two, the largest first.

    So an interrupted sweep has measured the two numbers that matter most.
    """
    counts = {2**power for power in range(available.bit_length())} | {available}
    return [1, *sorted(counts - {1}, reverse=True)]


def scaling(
    config: ml_collections.ConfigDict,
    size: str = "sd15",
    num_steps: int = 10,
    devices: Sequence[int] = (),
    profile: str = "",
    results: str = "",
    say: Callable[[dict], None] = lambda row: None,
) -> list[dict]:
    """Measures the step on each number of devices in each layout, with the same number of images on each device.

    Args:
      config: has the batch of one device; its mesh is not used.
      devices: the numbers of devices; default: `device_counts` of this machine.
      profile: a folder for the traces that give the shares of collectives; "": a temporary one.
      results: a file of rows as JSON lines: its rows are not measured again, new rows are added.
      say: receives each row once it is measured.

    Returns:
      One row per number of devices and layout: that of `bench train --json` with "times_one_device", or "failed" with
      the error.

    Raises:
      UserError: the config cannot be run, or the machine has fewer devices.
    """
    checks.check(_with_layout(config, 1, dict.fromkeys(AXES, 1)))
    available = _device_count()
    devices = list(devices) or device_counts(available)
    if not all(0 < count <= available for count in devices):
        raise UserError(f"devices must be between 1 and the {available} of this machine; got {devices}.")
    earlier, rows = _read(results), []
    settings = {"size": size, "config": hashlib.sha256(to_json(config).encode()).hexdigest()[:12]}
    with tempfile.TemporaryDirectory(prefix="dmm_jax_scaling_") as folder:
        sweep = [(count, *item) for count in devices for item in layouts(count, num_rows(config)).items()]
        for count, layout, mesh in sweep:
            key = settings | {"layout": layout, "devices": count, "batch": count * config.batch_size}
            row = next((old for old in earlier if key.items() <= old.items()), None)
            if row is None:
                trace = str(pathlib.Path(profile or folder) / f"{layout} {count}".replace(" ", "_"))
                child_config = _with_layout(config, count, mesh)
                row = key | {"mesh": mesh} | _measure_in_child(child_config, size, num_steps, count, trace)
                if results:
                    with open(results, "a") as file:
                        file.write(json.dumps(row) + "\n")
            rows.append(_with_ratio(row, [*rows, row]))
            say(rows[-1])
    return rows


def _with_layout(config, num_devices, mesh):
    changed = config.copy_and_resolve_references()
    changed.mesh.update(mesh)
    changed.batch_size = config.batch_size * num_devices
    return changed


def _with_ratio(row, rows):
    speeds_of_one = [each["images_per_s"] for each in rows if each["devices"] == 1 and "images_per_s" in each]
    if not speeds_of_one or "images_per_s" not in row:
        return row
    return row | {"times_one_device": row["images_per_s"] / speeds_of_one[0]}


def _device_count() -> int:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"JAX finds no device: {_error_line(done.stderr)}")
    return int(done.stdout.split()[-1])


def _measure_in_child(config, size, num_steps, num_devices, trace) -> dict:
    """Runs `bench train` in a process of its own; returns its row, or {"failed": error}."""
    with tempfile.TemporaryDirectory(prefix="dmm_jax_scaling_") as folder:
        path = pathlib.Path(folder) / "experiment.py"
        path.write_text(
            "from dmm_jax.config.serialization import from_json\n\n\n"
            f"def get_config():\n    return from_json({to_json(config)!r})\n"
        )
        command = [sys.executable, "-m", "dmm_jax", "bench", "train", "--json", f"--config={path}"]
        command += [f"--size={size}", f"--num-steps={num_steps}", f"--devices={num_devices}", f"--profile={trace}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            return {"failed": f"took longer than {LIMIT_S} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"failed": _error_line(done.stderr) or f"ended with code {done.returncode}"}
    return json.loads(lines[-1])


def _error_line(output: str) -> str:
    """Returns the last line of an output that names an error, or else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"Error\b|error: |RESOURCE_EXHAUSTED", line)]
    return (errors or lines or [""])[-1][:300]


def _read(path: str) -> list[dict]:
    """Reads the rows of an earlier sweep, except failed ones, which are measured again."""
    rows = metrics.read(path, strict=True) if path else []
    return [row for row in rows if "failed" not in row]


def write_figure(rows: Sequence[Mapping], path: pathlib.Path) -> list[pathlib.Path]:
    """Draws images/s over devices, one line per layout: PATH for light pages, NAME_dark.png for dark ones."""
    from dmm_jax.evaluation import figures

    points: dict[str, list] = {}
    for row in sorted(rows, key=lambda row: row["devices"]):
        if "images_per_s" in row:
            points.setdefault(row["layout"], []).append((row["devices"], row["images_per_s"]))
    if not points:
        raise UserError(f"{path} is not drawn: no row was measured.")
    first = points.pop(ONE, [])
    lines = {layout: first + others for layout, others in points.items()} or {ONE: first}
    pictures = figures.render(lambda theme: figures.scaling(lines, theme))
    paths = {"light": path, "dark": path.with_name(f"{path.stem}_dark{path.suffix}")}
    for name, written in paths.items():
        written.write_bytes(pictures[name])
    return list(paths.values())
