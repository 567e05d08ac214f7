"""Lays measured rows out as a table for a terminal."""

from collections.abc import Mapping, Sequence

COLUMNS = (
    "job", "arithmetic", "teachers", "batch", "images_per_s", "tflop_per_s", "share_of_peak", "step_s", "queued_step_s",
    "host_ms", "cpus", "share_of_encode", "fewest_examples", "most_examples", "read_too_often", "peak_memory_gb",
    "compile_s", "loss_error", "grad_norm_error", "gradient_error", "latents_error",
)  # fmt: skip


def render(rows: Sequence[Mapping], columns: Sequence[str] = COLUMNS) -> str:
    """Returns the table of those columns that any row has, then one line per ratio to a peer."""
    columns = [column for column in columns if any(column in row for row in rows)]
    cells = [columns] + [tuple(_cell(row.get(column)) for column in columns) for row in rows]
    widths = [max(len(line[k]) for line in cells) for k in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    for row in rows:
        lines += [f"{row['job']}: {ratio:.2f} x {name}" for name, ratio in row.get("ratio", {}).items()]
    return "\n".join(lines)


def _cell(value) -> str:
    if isinstance(value, Mapping):  # A mesh.
        return " x ".join(f"{axis} {size}" for axis, size in value.items() if size > 1) or "1"
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
