"""A plan as a person reads it: a table on a terminal."""

from collections.abc import Iterator

from dmm_jax.plan import Plan
from dmm_jax.planning.devices import GIB


def render(plan: Plan) -> str:
    """Returns the plan as text."""
    return "\n".join(_lines(plan)) + "\n"


def _lines(plan: Plan) -> Iterator[str]:
    report = plan.to_json()
    layout = " x ".join(f"{axis} {size}" for axis, size in plan.mesh_shape.items())
    yield f"{plan.topology.name}: {plan.topology.count} x {plan.topology.device.name}, mesh {layout}"
    images = plan.batch_size / plan.topology.count
    yield f"{plan.batch_size} images a step, {images:g} a device; {plan.num_steps:,} steps"
    yield ""
    how = "by the TPU's compiler" if plan.compiled else "temporaries estimated, the rest exact"
    yield f"Memory per device, GiB ({how})"
    for kind, size in report["memory_gb"].items():
        yield f"  {kind:<16}{size:8.2f}"
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    yield f"  {'total':<16}{report['memory_total_gb']:8.2f}  of {plan.available / GIB:.2f}: {verdict}"
    yield ""
    yield "Work per device and step"
    yield f"  {'products':<16}{report['tflop_per_device']:8.2f}  TFLOP"
    if report["gb_accessed_per_device"] is not None:
        yield f"  {'memory traffic':<16}{report['gb_accessed_per_device']:8.2f}  GiB"
    whose = "of the compiled program" if plan.compiled else "as the step asks for them"
    yield f"  collectives, {whose}" + ("" if plan.collectives else ": none")
    for row in report["collectives"]:
        yield f"    {row['kind']:<20}{row['axes']:<18}{row['count']:5}  {row['gb']:8.3f} GiB"
    yield ""
    parts = ", ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in plan.parts_s.items() if seconds)
    yield f"Roofline: {plan.step_s:.3f} s a step ({parts})"
    yield f"  {report['images_per_s']:.0f} images/s, {report['hours']:.1f} hours, {report['chip_hours']:.0f} chip-hours"
    on_disk = ", ".join(f"{name.replace('_', ' ')} {size:.1f} GiB" for name, size in report["disk_gb"].items())
    yield f"Disk: {on_disk}"
    yield "Assumed: " + "; ".join(plan.assumptions) + "."
    if plan.topology.platform == "tpu" and not plan.compiled:
        yield "For the compiler's own figures: pip install 'dmm-jax[plan]', and leave --no-compile out."
