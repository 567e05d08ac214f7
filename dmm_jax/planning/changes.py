"""Changes to a config that does not fit its devices: every combination that can run, the smallest change first."""

import dataclasses
import itertools
import math
from collections.abc import Iterator

import ml_collections

from dmm_jax.config import checks
from dmm_jax.config.options import num_rows
from dmm_jax.planning import devices
from dmm_jax.runtime import sharding
from dmm_jax.runtime.errors import UserError

REMAT_LEVELS = ("none", "finest", "all")


@dataclasses.dataclass(frozen=True)
class Change:
    """A config and topology that differ from the requested ones."""

    flags: str  # The flags that make the change, as a user types them.
    config: ml_collections.ConfigDict
    topology: str

    @property
    def layout(self) -> tuple:
        """Returns the key of all changes with equal arrays on each device between steps."""
        return self.topology, self.config.teachers_in_host_memory, tuple(self.config.mesh.to_dict().items())

    @property
    def images(self) -> float:
        """Returns the images that a device computes at once."""
        return self.config.batch_size / self.config.gradient_accumulation / devices.topology(self.topology).count


def check_layout(config: ml_collections.ConfigDict, topology: devices.Topology) -> None:
    """Raises the error of `train` if a config does not divide among the devices, with flags that do divide."""
    try:
        _check(config, topology)
    except ValueError as error:
        suggestions = "; or ".join(dividing_flags(config, topology))
        raise UserError(f"{error}\nOn {topology.name} this divides: {suggestions}.") from error


def _check(config, topology):
    shape = sharding.mesh_shape(**config.mesh, num_devices=topology.count)
    if topology.platform == "tpu" and topology.domain_size % shape["fsdp"]:
        raise UserError(
            f"mesh.fsdp={shape['fsdp']} would span several TPU slices of {topology.domain_size} devices each: "
            f"use a divisor of {topology.domain_size}."
        )
    checks.check_mesh(config, shape)


def dividing_flags(config: ml_collections.ConfigDict, topology: devices.Topology) -> list[str]:
    """Returns flags under which a config divides among the devices: another mesh, and another batch on its own mesh."""
    suggestions = []
    rows = num_rows(config)
    for teacher in sorted(_divisors(math.gcd(rows, topology.count)), reverse=True):
        mesh = {"mesh.teacher": teacher, "mesh.data": 0, "mesh.fsdp": 1}
        if _can_run(_changed(config, mesh), topology):
            suggestions.append(_flags(mesh))
            break
    try:
        shape = sharding.mesh_shape(**config.mesh, num_devices=topology.count)
    except ValueError:
        return suggestions
    columns = shape["data"] * shape["fsdp"]
    units = {"batch_size": rows * config.gradient_accumulation * columns, "validation_size": columns}
    sizes = {name: max(round(config[name] / unit), 1) * unit for name, unit in units.items() if config[name] % unit}
    if _can_run(_changed(config, sizes), topology):
        suggestions.append(_flags(sizes))
    return suggestions


def _can_run(config, topology):
    try:
        checks.check(config)
        _check(config, topology)
    except ValueError:
        return False
    return True


def _changed(config, options):
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(options)
    return config


def _flags(options):
    return " ".join(f"--config.{name}={value}" for name, value in options.items())


def candidates(config: ml_collections.ConfigDict, topology: str) -> Iterator[Change]:
    """Yields the changes that can run, the smallest first: all on the requested machine, then all on the next larger.

    The size of a change is a sum. Recomputation adds 1 for the finest level and 2 for all. Each doubling of the
    micro-batches, of the teachers' groups or of `fsdp` adds 1. Each halving of the batch, which is another run, adds 2.
    Teachers in the host's memory, which may take the step twice its time, add 5.
    """
    machine: devices.Topology | None = devices.topology(topology)
    while machine is not None:
        machine_flags = [f"--topology={machine.name}"] if machine.name != topology else []
        for _, _, options in sorted(_combinations(config, machine), key=lambda combination: combination[:2]):
            changed = _changed(config, options)
            if (options or machine_flags) and _can_run(changed, machine):
                flags = " ".join([*machine_flags, *filter(None, [_flags(options)])])
                yield Change(flags, changed, machine.name)
        machine = machine.larger


def _combinations(config, machine) -> Iterator[tuple[int, list[int], dict]]:
    """Yields (size of the change, order among changes of equal size, {option: value})."""
    mesh, level = config.mesh, REMAT_LEVELS.index(config.remat) if config.remat in REMAT_LEVELS else 1
    remats = [(0, {}), *((k - level, {"remat": REMAT_LEVELS[k]}) for k in range(level + 1, len(REMAT_LEVELS)))]
    halvings = _doublings(config.batch_size // (num_rows(config) * config.gradient_accumulation))
    groups = [size for size in _divisors(num_rows(config)) if not size % mesh.teacher]
    teachers = [(k, {"mesh.teacher": size}) for k, size in enumerate(groups) if machine.count % size == 0]
    memories = [(0, {}), *([] if config.teachers_in_host_memory else [(5, {"teachers_in_host_memory": True})])]
    shards = [(k, {"mesh.fsdp": mesh.fsdp * 2**k}) for k in range(_doublings(machine.count // mesh.fsdp) + 1)]
    for micro in range(halvings + 1):
        batches = [(2 * k, {"batch_size": config.batch_size // 2**k}) for k in range(halvings - micro + 1)]
        micros = [(micro, {"gradient_accumulation": config.gradient_accumulation * 2**micro})]
        for parts in itertools.product(remats, micros, teachers, shards, batches, memories):
            weights = [weight for weight, _ in parts]
            options = {name: value for weight, part in parts if weight for name, value in part.items()}
            if mesh.data and (weights[2] or weights[3] or machine.count != mesh.teacher * mesh.data * mesh.fsdp):
                options["mesh.data"] = 0
            yield sum(weights), [-weight for weight in weights], options


def _doublings(number):
    return max(number, 1).bit_length() - 1


def _divisors(number):
    return [size for size in range(1, number + 1) if number % size == 0]
