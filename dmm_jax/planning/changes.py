"""What to change of a config that does not fit its devices: every combination that can run, the smallest first."""

import dataclasses
import itertools
import math
from collections.abc import Iterator

import ml_collections

from dmm_jax.config import checks
from dmm_jax.config import options as config_lib
from dmm_jax.planning import devices
from dmm_jax.runtime import sharding
from dmm_jax.runtime.errors import UserError

REMAT = ("none", "finest", "all")


@dataclasses.dataclass(frozen=True)
class Change:
    """A config and topology that differ from those asked for."""

    what: str  # To type.
    config: ml_collections.ConfigDict
    topology: str

    @property
    def layout(self) -> tuple:
        """Returns what decides which arrays lie on a device from step to step."""
        return self.topology, tuple(self.config.mesh.to_dict().items())

    @property
    def images(self) -> float:
        """Returns the images that a device computes at once."""
        return self.config.batch_size / self.config.gradient_accumulation / devices.topology(self.topology).count


def check_layout(config: ml_collections.ConfigDict, topology: devices.Topology) -> None:
    """Raises what `train` raises where a config does not divide among the devices; and says what would."""
    try:
        _check(config, topology)
    except ValueError as error:
        fitting = "; or ".join(divisible(config, topology))
        raise UserError(f"{error}\nOn {topology.name} this divides: {fitting}.") from error


def _check(config, topology):
    shape = sharding.mesh_shape(**config.mesh, num_devices=topology.count)
    if topology.platform == "tpu" and topology.linked % shape["fsdp"]:
        raise UserError(
            f"mesh.fsdp={shape['fsdp']} would lie across TPU slices, of {topology.linked} devices each: "
            f"use a divisor of {topology.linked}."
        )
    checks.check_mesh(config, shape)


def divisible(config: ml_collections.ConfigDict, topology: devices.Topology) -> list[str]:
    """Returns flags under which a config divides among the devices: another mesh, and another batch on its own mesh."""
    found = []
    rows = config_lib.num_rows(config)
    for teacher in sorted(_divisors(math.gcd(rows, topology.count)), reverse=True):
        mesh = {"mesh.teacher": teacher, "mesh.data": 0, "mesh.fsdp": 1}
        if _runs(_with(config, mesh), topology):
            found.append(_typed(mesh, topology.name, topology.name))
            break
    try:
        shape = sharding.mesh_shape(**config.mesh, num_devices=topology.count)
    except ValueError:
        return found
    columns = shape["data"] * shape["fsdp"]
    units = {"batch_size": rows * config.gradient_accumulation * columns, "validation_size": columns}
    sizes = {name: max(round(config[name] / unit), 1) * unit for name, unit in units.items() if config[name] % unit}
    if _runs(_with(config, sizes), topology):
        found.append(" ".join(f"--config.{name}={size}" for name, size in sizes.items()))
    return found


def _runs(config, topology):
    try:
        checks.check(config)
        _check(config, topology)
    except ValueError:
        return False
    return True


def _with(config, changed):
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(changed)
    return config


def candidates(config: ml_collections.ConfigDict, topology: str) -> Iterator[Change]:
    """Yields what can run, in the order of how much it changes, as far as sizes divide.

    On the machine asked for come first: recomputation counts 1 for the finest level and 2 for all, each doubling of the
    micro-batches, of the teachers' groups and of `fsdp` 1, each halving of the batch, which is another run, 2. Then the
    same on the next larger machine.
    """
    where: devices.Topology | None = devices.topology(topology)
    while where is not None:
        for _, _, changed in sorted(_steps(config, where), key=lambda step: step[:2]):
            if changed or where.name != topology:
                options = _with(config, changed)
                if _runs(options, where):
                    yield Change(_typed(changed, where.name, topology), options, where.name)
        where = where.larger


def _steps(config, where) -> Iterator[tuple[int, list[int], dict]]:
    """Yields (how much is changed, which of equals comes first, {option: value})."""
    mesh, level = config.mesh, REMAT.index(config.remat) if config.remat in REMAT else 1
    remats = [(0, {}), *((more - level, {"remat": REMAT[more]}) for more in range(level + 1, len(REMAT)))]
    halvings = _doublings(config.batch_size // (config_lib.num_rows(config) * config.gradient_accumulation))
    groups = [size for size in _divisors(config_lib.num_rows(config)) if not size % mesh.teacher]
    spread = [(k, {"mesh.teacher": size}) for k, size in enumerate(groups) if where.count % size == 0]
    shards = [(k, {"mesh.fsdp": mesh.fsdp * 2**k}) for k in range(_doublings(where.count // mesh.fsdp) + 1)]
    for micro in range(halvings + 1):
        batches = [(2 * k, {"batch_size": config.batch_size // 2**k}) for k in range(halvings - micro + 1)]
        micros = [(micro, {"gradient_accumulation": config.gradient_accumulation * 2**micro})]
        for parts in itertools.product(remats, micros, spread, shards, batches):
            weights = [weight for weight, _ in parts]
            changed = {name: value for weight, part in parts if weight for name, value in part.items()}
            if mesh.data and (weights[2] or weights[3] or where.count != mesh.teacher * mesh.data * mesh.fsdp):
                changed["mesh.data"] = 0
            yield sum(weights), [-weight for weight in weights], changed


def _doublings(number):
    return max(number, 1).bit_length() - 1


def _typed(changed, name, topology):
    machine = [f"--topology={name}"] if name != topology else []
    return " ".join(machine + [f"--config.{option}={value}" for option, value in changed.items()])


def _divisors(number):
    return [size for size in range(1, number + 1) if number % size == 0]
