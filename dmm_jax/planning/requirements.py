"""What a run requires of its devices: the figures that `plan` and `train` print, and the roofline of a step."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax

from dmm_jax.data.batches import Batch
from dmm_jax.distill.streaming import StreamedStep
from dmm_jax.distillation import Distillation
from dmm_jax.planning import collectives as collectives_lib
from dmm_jax.planning import devices, disk, flops, memory

GIB = devices.GIB
COMPILED, ESTIMATED = "compiled", "estimated"


class StepCost(NamedTuple):
    """What one step costs each device."""

    memory: dict[str, float]  # Bytes by kind.
    bytes_accessed: float
    collectives: list[collectives_lib.Collective]
    from_host: float = 0.0  # Bytes of teachers that travel from the host's memory.


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run of one config requires on one topology; bytes and FLOPs are per device and step."""

    topology: devices.Topology
    mesh_shape: dict[str, int]
    memory: dict[str, float]  # Bytes by kind.
    available: float | None  # None: the device does not report its memory.
    fits: bool
    flops: float
    bytes_accessed: float
    collectives: list[collectives_lib.Collective]
    method: str
    batch_size: int
    num_steps: int
    disk: dict[str, int]
    assumptions: tuple[str, ...] = ()
    from_host: float = 0.0  # Bytes of teachers that travel from the host's memory; 0: all are on the device.
    flops_of_teachers: float = 0.0  # The part of `flops` during which none travels.

    @property
    def parts_s(self) -> dict[str, float]:
        """Returns the seconds that each part of a step would take alone; {} for a device without known rates."""
        device = self.topology.device
        if device is None:
            return {}
        parts = {
            "products": self.flops / (devices.COMPUTE_SHARE * device.bf16_flops),
            "memory": self.bytes_accessed / (devices.BANDWIDTH_SHARE * device.memory_bandwidth),
            "collectives": 0.0,
            "network": 0.0,
            "from host": self.from_host / device.host_bandwidth,
        }
        for collective in self.collectives:
            group = self._group(collective)
            part = "network" if self.topology.carrier(group) == "network" else "collectives"
            parts[part] += collective.sent / self.topology.bandwidth(group)
        return parts

    def _group(self, collective: collectives_lib.Collective) -> tuple[int, ...]:
        sizes = tuple(self.mesh_shape.items())
        return collectives_lib.widest_group(collective.axes, sizes, self.topology.domain_size)

    @property
    def step_s(self) -> float | None:
        """Returns the roofline's step time: products and memory traffic overlap, collectives do not.

        A teacher travels from the host while the student learns, not while another teacher predicts.
        """
        parts = self.parts_s
        if not parts:
            return None
        computing = max(parts["products"], parts["memory"])
        travelling = computing * self.flops_of_teachers / self.flops + parts["from host"]
        return max(computing, travelling) + parts["collectives"] + parts["network"]

    @property
    def host_memory(self) -> float:
        """Returns the bytes of teachers in the memory of one host: a copy for each of its devices."""
        return self.from_host * min(self.topology.count, self.topology.domain_size)

    @property
    def exchanged(self) -> list[dict]:
        """Returns `collectives.summary` with "over": rows over links first, then rows over the network."""
        rows = []
        for carrier in ("links", "network"):
            carried = [each for each in self.collectives if self.topology.carrier(self._group(each)) == carrier]
            rows += [row | {"over": carrier} for row in collectives_lib.summary(carried)]
        return rows

    def to_json(self) -> dict:
        """Returns the plan as one JSON object; GB are 2^30 bytes. Times are None for a device without known rates."""
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
            "host_memory_gb": self.host_memory / GIB,
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


def roofline_assumptions(topology: devices.Topology, is_streamed: bool = False) -> tuple[str, ...]:
    """Returns the assumptions of the step time, one phrase each.

    Args:
      is_streamed: whether teachers travel from the host's memory.
    """
    if topology.device is None:
        return ()
    network = f"{topology.device.network_bandwidth / 1e9:g} GB/s a device between {topology.domains}"
    return (
        f"products at {devices.COMPUTE_SHARE:.0%} of the bf16 peak, memory at {devices.BANDWIDTH_SHARE:.0%} of its "
        f"bandwidth, collectives in a ring along their axis at {topology.device.link_bandwidth / 1e9:g} GB/s"
        + (f", {network}" if topology.count > topology.domain_size else "")
        + ", and not overlapped",
        *(f"teachers travel at {topology.device.host_bandwidth / 1e9:g} GB/s while the student learns",) * is_streamed,
        "the input pipeline keeps up; validation, samples and checkpoints take no time",
    )


def cost_of_compiled(
    compiled: jax.stages.Compiled, arguments: Sequence, mesh_shape: Mapping[str, int], topology: devices.Topology
) -> StepCost:
    """Reads memory, memory traffic and collectives from a compiled step.

    Args:
      arguments: state, teachers, frozen networks and batch, as arrays or shapes.
    """
    array_bytes, analysis = memory.array_bytes(*arguments), compiled.memory_analysis()
    within_step, gradients = _within(compiled, topology), array_bytes["gradients"]
    sizes = {
        **array_bytes,
        "gradients": min(gradients, within_step),
        "padding": max(analysis.argument_size_in_bytes - (sum(array_bytes.values()) - gradients), 0),
        "temporaries": max(within_step - gradients, 0),
        "generated code": analysis.generated_code_size_in_bytes,
    }
    sizes = {kind: float(size) for kind, size in sizes.items()}
    return StepCost(sizes, _accessed(compiled), _collectives(compiled, mesh_shape, topology))


def cost_of_streamed(
    programs: StreamedStep, arguments: Sequence, mesh_shape: Mapping[str, int], topology: devices.Topology
) -> StepCost:
    """As `cost_of_compiled`, for a step that takes the rows of its batch one after another.

    Args:
      arguments: as of `cost_of_compiled`, with one teacher.
    """
    _, teachers, _, batch = arguments
    array_bytes, rows = memory.array_bytes(*arguments), len(batch.latents)
    of_a_row, of_a_step = (programs.predict, programs.accumulate), (programs.update,)
    sizes = {
        **array_bytes,
        # The teacher's predictions are results of one program and arguments of the next.
        "temporaries": max(_within(program, topology) for program in (*of_a_row, *of_a_step))
        + programs.predict.memory_analysis().output_size_in_bytes,
        "generated code": sum(
            program.memory_analysis().generated_code_size_in_bytes for program in (*of_a_row, *of_a_step)
        ),
    }
    exchanged = [it for program in of_a_row for it in _collectives(program, mesh_shape, topology)]
    return StepCost(
        {kind: float(size) for kind, size in sizes.items()},
        rows * sum(map(_accessed, of_a_row)) + sum(map(_accessed, of_a_step)),
        collectives_lib.repeated(exchanged, rows) + _collectives(programs.update, mesh_shape, topology),
        float(memory.streamed_bytes(teachers, rows)),
    )


def _within(compiled, topology) -> int:
    """Returns the bytes that a program needs besides its arguments."""
    analysis = compiled.memory_analysis()
    if topology.platform == "tpu":  # Compilers for other platforms do not report the peak.
        return analysis.peak_memory_in_bytes - analysis.argument_size_in_bytes
    return analysis.temp_size_in_bytes + max(analysis.output_size_in_bytes - analysis.alias_size_in_bytes, 0)


def _accessed(compiled) -> float:
    cost = compiled.cost_analysis()
    return float((cost[0] if isinstance(cost, list) else cost).get("bytes accessed", 0.0))


def _collectives(compiled, mesh_shape, topology) -> list[collectives_lib.Collective]:
    if math.prod(mesh_shape.values()) == 1:
        return []
    return collectives_lib.read(compiled.as_text(), mesh_shape, topology.domain_size)


def of_distillation(distillation: Distillation, compiled: jax.stages.Compiled | StreamedStep, batch: Batch) -> Plan:
    """Returns the plan of a run on the devices of this process, read from its compiled step."""
    config, mesh = distillation.config, distillation.mesh
    topology = devices.of_process(mesh.devices.flatten().tolist())
    is_streamed = config.teachers_in_host_memory
    teachers = distillation.teachers.on_device(0) if is_streamed else distillation.teachers
    arguments = distillation.abstract_state(), teachers, distillation.frozen, batch
    cost_of = cost_of_streamed if is_streamed else cost_of_compiled
    cost = cost_of(compiled, arguments, mesh.shape, topology)
    available = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return Plan(
        topology=topology,
        mesh_shape=dict(mesh.shape),
        available=available,
        fits=not available or sum(cost.memory.values()) <= available,
        flops=flops.of_step(distillation, *arguments),
        method=COMPILED,
        batch_size=config.batch_size,
        num_steps=config.num_steps,
        disk=disk.needed(config, arguments[0], batch),
        assumptions=roofline_assumptions(topology, is_streamed),
        flops_of_teachers=flops.of_streamed_teachers(distillation, *arguments[1:]) if is_streamed else 0.0,
        **cost._asdict(),
    )
