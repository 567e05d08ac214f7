"""What one config takes on some devices: the figures that `plan` and `train` print, and the roofline made of them."""

import dataclasses
import math
from collections.abc import Mapping

import jax

from dmm_jax.data.batches import Batch
from dmm_jax.distillation import Distillation
from dmm_jax.planning import collectives as collectives_lib
from dmm_jax.planning import devices, disk, flops, memory

GIB = devices.GIB
COMPILED, ESTIMATED = "compiled", "estimated"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one config takes on one topology; bytes and FLOPs are per device and step."""

    topology: devices.Topology
    mesh_shape: dict[str, int]
    memory: dict[str, float]  # Bytes by kind.
    available: float | None  # None: not told by these devices.
    fits: bool
    flops: float
    bytes_accessed: float
    collectives: list[collectives_lib.Collective]
    method: str
    batch_size: int
    num_steps: int
    disk: dict[str, int]
    assumptions: tuple[str, ...] = ()

    @property
    def parts_s(self) -> dict[str, float]:
        """Returns the seconds that products, memory traffic and collectives would take by themselves."""
        device = self.topology.device
        if device is None:
            return {}
        parts = {
            "products": self.flops / (devices.COMPUTE_SHARE * device.bf16_flops),
            "memory": self.bytes_accessed / (devices.BANDWIDTH_SHARE * device.memory_bandwidth),
            "collectives": 0.0,
            "network": 0.0,
        }
        for one in self.collectives:
            group = self._group(one)
            part = "network" if self.topology.carrier(group) == "network" else "collectives"
            parts[part] += one.sent / self.topology.bandwidth(group)
        return parts

    def _group(self, one: collectives_lib.Collective) -> tuple[int, ...]:
        return collectives_lib.widest_group(one.axes, tuple(self.mesh_shape.items()), self.topology.linked)

    @property
    def step_s(self) -> float | None:
        """Returns the roofline's step time: products and memory traffic overlap, collectives do not."""
        parts = self.parts_s
        return parts and max(parts["products"], parts["memory"]) + parts["collectives"] + parts["network"] or None

    @property
    def exchanged(self) -> list[dict]:
        """Returns one row per kind and axes of the collectives, the most bytes first, and what carries it."""
        rows = []
        for over in ("links", "network"):
            some = [one for one in self.collectives if self.topology.carrier(self._group(one)) == over]
            rows += [row | {"over": over} for row in collectives_lib.summary(some)]
        return rows

    def to_json(self) -> dict:
        """Returns the plan as one JSON object; GB are 2^30 bytes. Times are None where the device is not known."""
        step_s = self.step_s
        hours = self.num_steps * step_s / 3600 if step_s else None
        return {
            "fits": self.fits,
            "topology": self.topology.name,
            "device": self.topology.device.name if self.topology.device else self.topology.name,
            "num_devices": self.topology.count,
            "mesh": self.mesh_shape,
            "memory_gb": {kind: size / GIB for kind, size in self.memory.items()},
            "memory_total_gb": sum(self.memory.values()) / GIB,
            "memory_available_gb": None if self.available is None else self.available / GIB,
            "method": self.method,
            "batch_size": self.batch_size,
            "tflop_per_device": self.flops / 1e12,
            "gb_accessed_per_device": self.bytes_accessed / GIB,
            "collectives": self.exchanged,
            "step_s": step_s,
            "step_parts_s": self.parts_s,
            "roofline_share": self.parts_s["products"] / step_s if step_s else None,
            "images_per_s": self.batch_size / step_s if step_s else None,
            "hours": hours,
            "chip_hours": hours * self.topology.count if step_s else None,
            "disk_gb": {name: size / GIB for name, size in self.disk.items()},
            "assumptions": list(self.assumptions),
        }


def roofline_assumptions(topology: devices.Topology) -> tuple[str, ...]:
    """Returns what the step time takes for granted."""
    if topology.device is None:
        return ()
    network = f"{topology.device.network_bandwidth / 1e9:g} GB/s a device between {topology.beyond}"
    return (
        f"products at {devices.COMPUTE_SHARE:.0%} of the bf16 peak, memory at {devices.BANDWIDTH_SHARE:.0%} of its "
        f"bandwidth, collectives in a ring along their axis at {topology.device.link_bandwidth / 1e9:g} GB/s"
        + (f", {network}" if topology.count > topology.linked else "")
        + ", and not overlapped",
        "the input pipeline keeps up; validation, samples and checkpoints take no time",
    )


def of_program(
    compiled: jax.stages.Compiled,
    held: Mapping[str, float | int],
    mesh_shape: Mapping[str, int],
    topology: devices.Topology,
) -> dict:
    """Reads a compiled step: {"memory": bytes by kind, "bytes_accessed", "collectives"}.

    Args:
      held: what lives from step to step, and the gradients, as `memory.held` counts it.
    """
    found, cost = compiled.memory_analysis(), compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    given = sum(held.values()) - held["gradients"]
    within = found.temp_size_in_bytes + max(found.output_size_in_bytes - found.alias_size_in_bytes, 0)
    if topology.platform == "tpu":  # The others' compilers do not tell the peak.
        within = found.peak_memory_in_bytes - found.argument_size_in_bytes
    more = {
        "gradients": min(held["gradients"], within),
        "padding": max(found.argument_size_in_bytes - given, 0),
        "temporaries": max(within - held["gradients"], 0),
        "generated code": found.generated_code_size_in_bytes,
    }
    alone = math.prod(mesh_shape.values()) == 1
    return {
        "memory": {kind: float(size) for kind, size in {**held, **more}.items()},
        "bytes_accessed": float(cost.get("bytes accessed", 0.0)),
        "collectives": [] if alone else collectives_lib.parse(compiled.as_text(), mesh_shape, topology.linked),
    }


def of_distillation(run: Distillation, compiled: jax.stages.Compiled, batch: Batch) -> Plan:
    """Returns the plan of a run on this machine's devices, read off its compiled step."""
    config, mesh = run.config, run.mesh
    topology = devices.here(mesh.devices.flatten().tolist())
    arguments = run.abstract_state(), run.teachers, run.frozen, batch
    found = of_program(compiled, memory.held(*arguments), mesh.shape, topology)
    available = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return Plan(
        topology=topology,
        mesh_shape=dict(mesh.shape),
        available=available,
        fits=not available or sum(found["memory"].values()) <= available,
        flops=flops.of_step(run, *arguments),
        method=COMPILED,
        batch_size=config.batch_size,
        num_steps=config.num_steps,
        disk=disk.needed(config, arguments[0], batch),
        assumptions=roofline_assumptions(topology),
        **found,
    )
