"""Lays a plan out as a table for a terminal."""

from collections.abc import Iterator

from dmm_jax.planning.requirements import COMPILED, ESTIMATED, GIB, Plan
from dmm_jax.planning.serving import ServingPlan


def render(plan: Plan) -> str:
    """Returns the plan as text."""
    return "\n".join(_lines(plan)) + "\n"


def render_server(plan: ServingPlan) -> str:
    """Returns the plan of a server as text."""
    report = plan.to_json()
    sizes = ", ".join(report["sizes"])
    lines = [
        f"{plan.topology.name}: {plan.topology.count} x {report['device']}, a server",
        f"{plan.num_slots} slots for each size: {sizes}",
        "",
        *_memory_lines(plan, report),
        "",
        *(f"{size}: {speed:.2f} images/s of {plan.num_steps} steps" for size, speed in plan.images_per_s.items()),
        f"  {plan.topology.speed_source}",
        "Assumed: " + "; ".join(plan.assumptions) + ".",
    ]
    return "\n".join(lines) + "\n"


def _lines(plan: Plan) -> Iterator[str]:
    report = plan.to_json()
    layout = " x ".join(f"{axis} {size}" for axis, size in plan.mesh_shape.items())
    yield f"{plan.topology.name}: {plan.topology.count} x {report['device']}, mesh {layout}"
    images = plan.batch_size / plan.topology.count
    yield f"{plan.batch_size} images per step, {images:g} per device; {plan.num_steps:,} steps"
    yield ""
    yield from _memory_lines(plan, report)
    if plan.from_host:
        yield f"Host memory: {_gib(report['host_memory_gb'])} of teachers, page-locked"
    yield ""
    yield "Work per device and step"
    estimated = " (estimated)" if plan.method == ESTIMATED else ""
    yield f"  {'products':<16}{report['tflop_per_device']:8.2f}  TFLOP"
    yield f"  {'memory traffic':<16}{report['gb_accessed_per_device']:8.2f}  GiB{estimated}"
    if plan.from_host:
        yield f"  {'from host':<16}{plan.from_host / GIB:8.2f}  GiB"
    source = "of the compiled program" if plan.method == COMPILED else "as the step requests them"
    yield f"  collectives, {source}" + ("" if plan.collectives else ": none")
    for row in report["collectives"]:
        across = f" between {plan.topology.domains}" if row["over"] == "network" else ""
        yield f"    {row['kind']:<20}{row['axes']:<18}{row['count']:5}  {row['gb']:8.3f} GiB{across}"
    yield ""
    if report["step_s"]:
        parts = ", ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in plan.parts_s.items() if seconds)
        yield f"Roofline: {report['step_s']:.3f} s per step ({parts})"
        hours = f"{report['hours']:.1f} hours, {report['chip_hours']:.0f} chip-hours"
        yield f"  {report['images_per_s']:.0f} images/s, {hours}"
        yield f"  {plan.topology.speed_source}"
    on_disk = ", ".join(f"{name.replace('_', ' ')} {_gib(size)}" for name, size in report["disk_gb"].items())
    yield f"Disk: {on_disk}"
    if plan.assumptions:
        yield "Assumed: " + "; ".join(plan.assumptions) + "."


def _memory_lines(plan, report):
    source = "temporaries and their margin estimated, the rest exact" if plan.method == ESTIMATED else "the compiler's"
    total, fits = report["memory_total_gb"], ""
    unit, name = (1, "GiB") if total >= 1 else (1024, "MiB")
    yield f"Memory per device, {name} ({source})"
    for kind, size in report["memory_gb"].items():
        yield f"  {kind:<16}{size * unit:8.2f}"
    if (available := report["memory_available_gb"]) is not None:
        verdict = "fits" if plan.fits else "DOES NOT FIT"
        fits = f"  of {available * unit:.2f}: {verdict}"
    yield f"  {'total':<16}{total * unit:8.2f}{fits}"


def _gib(size):
    return f"{size:.1f} GiB" if size >= 0.1 else f"{1024 * size:.1f} MiB"
