"""What a run takes, before a machine is rented: memory per device, work, collectives, time; and what to change.

The step is `train`'s own, traced on shapes alone. With libtpu it is compiled for the TPU slice that is asked for, which
no TPU is needed for; without, or for GPUs, the memory of activations is an estimate.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from dmm_jax import config as config_lib
from dmm_jax import flops, sharding, train
from dmm_jax.checkpoints import published
from dmm_jax.checkpoints.abstract import abstract_params
from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.checkpoints.open import CELL, open_checkpoint
from dmm_jax.data.cache import CacheHeader
from dmm_jax.distill import incremental
from dmm_jax.distill import step as distill_step
from dmm_jax.distill import student as student_lib
from dmm_jax.distill import teachers as teachers_lib
from dmm_jax.models.text_encoders import NUM_TIME_IDS
from dmm_jax.models.unet_2d_condition import merged_config
from dmm_jax.planning import collectives as collectives_lib
from dmm_jax.planning import compiler, devices, lifetimes, memory

GIB = devices.GIB


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one config takes on one topology; bytes and FLOPs are per device and step."""

    topology: devices.Topology
    mesh_shape: dict[str, int]
    memory: dict[str, float]  # Bytes by kind.
    available: float
    fits: bool
    flops: float
    bytes_accessed: float | None  # Only a compiler knows.
    collectives: list[collectives_lib.Collective]
    compiled: bool
    batch_size: int
    num_steps: int
    disk: dict[str, int]
    assumptions: tuple[str, ...]

    @property
    def parts_s(self) -> dict[str, float]:
        """Returns the seconds that products, memory traffic and collectives would take by themselves."""
        device = self.topology.device
        traffic = (self.bytes_accessed or 0.0) / (devices.BANDWIDTH_SHARE * device.memory_bandwidth)
        return {
            "products": self.flops / (devices.COMPUTE_SHARE * device.bf16_flops),
            "memory": traffic,
            "collectives": sum(one.sent for one in self.collectives) / device.link_bandwidth,
        }

    @property
    def step_s(self) -> float:
        """Returns the roofline's step time: products and memory traffic overlap, collectives do not."""
        parts = self.parts_s
        return max(parts["products"], parts["memory"]) + parts["collectives"]

    def to_json(self) -> dict:
        """Returns the plan as one JSON object; GB are 2^30 bytes."""
        hours = self.num_steps * self.step_s / 3600
        return {
            "fits": self.fits,
            "topology": self.topology.name,
            "device": self.topology.device.name,
            "num_devices": self.topology.count,
            "mesh": self.mesh_shape,
            "memory_gb": {kind: size / GIB for kind, size in self.memory.items()},
            "memory_total_gb": sum(self.memory.values()) / GIB,
            "memory_available_gb": self.available / GIB,
            "method": "compiled" if self.compiled else "estimated",
            "batch_size": self.batch_size,
            "tflop_per_device": self.flops / 1e12,
            "gb_accessed_per_device": None if self.bytes_accessed is None else self.bytes_accessed / GIB,
            "collectives": collectives_lib.summary(self.collectives),
            "step_s": self.step_s,
            "step_parts_s": self.parts_s,
            "images_per_s": self.batch_size / self.step_s,
            "hours": hours,
            "chip_hours": hours * self.topology.count,
            "disk_gb": {name: size / GIB for name, size in self.disk.items()},
            "assumptions": list(self.assumptions),
        }


def plan(
    config: ml_collections.ConfigDict, topology: str, *, architecture: str = "sd15", compiled: bool | None = None
) -> Plan:
    """Plans one config on one topology.

    Args:
      topology: "v5e:4x4", "gpu:8x80GB"; see `planning.devices`.
      architecture: of a base that is not there: a name in `checkpoints.published`.
      compiled: whether to compile for the TPU; None where libtpu is installed.

    Raises:
      ValueError: the config cannot be run, or the topology is unknown; says what to do.
    """
    config = incremental.resolved(config)
    config_lib.check(config)
    where = devices.topology(topology)
    compiled = where.platform == "tpu" and compiler.is_here() if compiled is None else compiled
    check_layout(config, where.count)
    if compiled:
        mesh = compiler.tpu_mesh(topology, **config.mesh)
    else:
        mesh = sharding.abstract_mesh(**config.mesh, num_devices=where.count)
    program = Program.describe(config, architecture, where.platform, mesh)
    kinds = {kind: float(size) for kind, size in memory.held(*program.arguments).items()}
    if compiled:
        measured = measure(program, kinds, where.device.memory)
    else:
        measured = estimate(program, kinds, where.device.memory)
    return Plan(
        topology=where,
        mesh_shape=dict(mesh.shape),
        flops=program.flops(),
        compiled=compiled,
        batch_size=config.batch_size,
        num_steps=config.num_steps,
        disk=disk(config, program),
        assumptions=program.assumptions + ASSUMPTIONS,
        **measured,
    )


ASSUMPTIONS = (
    f"products at {devices.COMPUTE_SHARE:.0%} of the bf16 peak, memory at {devices.BANDWIDTH_SHARE:.0%} of its "
    "bandwidth, collectives in a ring along their axis and not overlapped",
    "the input pipeline keeps up; validation, samples and checkpoints take no time",
)


def check_layout(config, num_devices: int) -> None:
    """Raises ValueError when the images of a teacher do not divide among its devices."""
    shape = sharding.mesh_shape(**config.mesh, num_devices=num_devices)
    columns = shape["data"] * shape["fsdp"] * config.gradient_accumulation
    parts = columns * config_lib.num_rows(config)
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size {config.batch_size} must be a multiple of {parts}: {config_lib.rows_told(config)} x "
            f"mesh.data {shape['data']} x mesh.fsdp {shape['fsdp']} x gradient_accumulation "
            f"{config.gradient_accumulation}. Use {max(round(config.batch_size / parts), 1) * parts}."
        )


@dataclasses.dataclass(frozen=True)
class Program:
    """The step of a config, with shapes in place of arrays."""

    config: ml_collections.ConfigDict
    base: Checkpoint
    mesh: Mesh | AbstractMesh
    platform: str
    arguments: tuple  # (state, teachers, encoders, batch)
    assumptions: tuple[str, ...]

    @classmethod
    def describe(cls, config, architecture: str, platform: str, mesh) -> "Program":
        """Opens what checkpoints there are, takes the others for the architecture's, and places every array."""
        base, assumptions = base_checkpoint(config, architecture)
        others, more = distinct_encoders(config, base)
        trained, fixed = abstract_trained(config, base)
        state = student_lib.abstract_state(trained, student_lib.make_optimizers(config), config.ema_decay)
        state = sharding.described(state, sharding.state_specs(state, mesh), mesh)
        dtype, rows = jnp.dtype(config.dtype), config_lib.num_rows(config)
        described = train.teacher_config(config, base)
        teachers, encoders = teachers_lib.abstract_teachers(base, described, rows, others, mesh, dtype)
        encoders |= teachers_lib.described(fixed, mesh, dtype)
        batch = abstract_batch(config, base, mesh)
        return cls(config, base, mesh, platform, (state, teachers, encoders, batch), (*assumptions, *more))

    def _defined(self, **changes):
        config = self.config.copy_and_resolve_references()
        config.update(changes)
        networks, _ = train.define_networks(config, self.base, self.platform)
        tokens = self.arguments[3]["input_ids"].shape[-1]
        return (
            config,
            networks,
            train.define_objective(config, self.base, lambda texts: np.zeros((len(texts), tokens), int)),
        )

    def step(self) -> Callable:
        """Returns the jitted step that `train` runs."""
        config, networks, objective = self._defined()
        optimizers = student_lib.make_optimizers(config)
        return train.define_step(config, networks, objective, optimizers, self.mesh, *self.arguments[:2])

    def gradients(self, attention: str) -> tuple[Callable, tuple]:
        """Returns the function of losses and gradients, with an implementation of attention, and its arguments."""
        config, networks, objective = self._defined(attention=attention)
        state, *others = self.arguments
        trained = distill_step.trained(state)
        function = train.define_gradients(config, networks, objective, self.mesh, trained)
        return function, (trained, *others, jax.ShapeDtypeStruct((), jnp.int32))

    def flops(self) -> float:
        """Returns the operations of a step's products and convolutions on one device, recomputation included."""
        function, arguments = self.gradients("xla")  # Inside the fused kernels nothing can be counted.
        return flops.count(function, *arguments)


def base_checkpoint(config, architecture: str) -> tuple[Checkpoint, tuple[str, ...]]:
    """Returns the base, or where there is none the networks that the architecture was published with."""
    if pathlib.Path(config.base).exists():
        return open_checkpoint(config.base), ()
    return published.checkpoint(architecture), (
        f"{config.base} is not there: its networks are taken for {architecture}'s",
    )


def distinct_encoders(config, base: Checkpoint) -> tuple[int, tuple[str, ...]]:
    """Returns how many text encoders the teachers bring besides the base's."""
    paths = [pathlib.Path(path) for _, path in config.teachers]
    if all(path.exists() for path in paths) and pathlib.Path(config.base).exists():
        return len(teachers_lib.encoder_rows(base, [open_checkpoint(path) for path in paths])[1]), ()
    return len(paths), ("every teacher brings a text encoder of its own; equal ones would be held once",)


def abstract_trained(config, base: Checkpoint) -> tuple[dict, dict]:
    """Returns the shapes of what is trained, by network, and of the discriminator's parameters that are not."""
    student = abstract_params("unet", merged_config(base.unet_config, len(config_lib.style_names(config))))
    if not config.adversarial.weight:
        return {"student": student}, {}
    discriminator, fixed = train.abstract_discriminator(config, base)
    return {"student": student, "discriminator": discriminator}, fixed


def abstract_batch(config, base: Checkpoint, mesh) -> dict:
    """Returns the shapes of a batch (N, B/N, ...): latents, token ids of every text encoder, sizes and crops."""
    tokens = sum(config["max_position_embeddings"] for config in base.text_configs.values())
    rows, cells = config_lib.num_rows(config), config.data.resolution // CELL
    leading = (rows, config.batch_size // rows)
    shapes = {
        "latents": jax.ShapeDtypeStruct((*leading, cells, cells, base.unet_config.get("in_channels", 4)), jnp.float32),
        "input_ids": jax.ShapeDtypeStruct((*leading, tokens), jnp.int32),
        "time_ids": jax.ShapeDtypeStruct((*leading, NUM_TIME_IDS), jnp.int32),
    }
    return sharding.described(shapes, jax.tree.map(lambda _: sharding.BATCH, shapes), mesh)


def measure(program: Program, kinds: dict[str, float], available: float) -> dict:
    """Compiles the step for the mesh's TPU and reads memory, traffic and collectives from the result."""
    lowered = program.step().lower(*program.arguments)
    try:
        compiled = lowered.compile(compiler_options=compiler.EFFORT)
    except jax.errors.JaxRuntimeError as error:
        needed, available = compiler.out_of_memory(error)
        more = {"temporaries": needed - sum(kinds.values())}
        return _report(kinds | more, available, foretold(program)) | {"fits": False}
    found, cost = compiled.memory_analysis(), compiled.cost_analysis()
    arguments = sum(kinds.values()) - kinds["gradients"]
    more = {
        "padding": found.argument_size_in_bytes - arguments,
        "temporaries": found.peak_memory_in_bytes - found.argument_size_in_bytes - kinds["gradients"],
        "generated code": float(found.generated_code_size_in_bytes),
    }
    cost = cost[0] if isinstance(cost, list) else cost
    exchanged = collectives_lib.parse(compiled.as_text(), program.mesh.shape)
    return _report(kinds | more, available, exchanged, cost.get("bytes accessed"))


def estimate(program: Program, kinds: dict[str, float], available: float) -> dict:
    """Estimates what lives within a step from the order in which its values are computed and read."""
    implementation = train.attention_implementation(program.config, program.platform)
    # A fused kernel's own scores never exist, whichever kernel it is.
    function, arguments = program.gradients("xla" if implementation == "xla" else "flash")
    (equation,) = jax.make_jaxpr(function)(*arguments).jaxpr.eqns  # The shard_map: inside, shapes are one device's.
    largest = lifetimes.temporaries(equation.params["jaxpr"])
    kinds = kinds | {"temporaries": max(largest - kinds["gradients"], 0.0)}
    return _report(kinds, available, foretold(program))


def _report(kinds, available, exchanged, bytes_accessed=None):
    return {
        "memory": kinds,
        "available": available,
        "fits": sum(kinds.values()) <= available,
        "bytes_accessed": bytes_accessed,
        "collectives": exchanged,
    }


def foretold(program: Program) -> list[collectives_lib.Collective]:
    """Returns the collectives that the step asks for; a compiler may join or rewrite them."""
    config, params = program.config, distill_step.trained(program.arguments[0])
    shape = dict(program.mesh.shape)
    return collectives_lib.foretell(params, shape, config.dtype, config.gradient_accumulation)


def disk(config, program: Program) -> dict[str, int]:
    """Returns the bytes on disk of the kept checkpoints and of the latent cache."""
    state, _, _, batch = program.arguments
    header = CacheHeader(
        vae="", tokenizer="", resolution=config.data.resolution, scaling_factor=1.0,
        latent_shape=batch["latents"].shape[2:], num_tokens=batch["input_ids"].shape[-1],
    )  # fmt: skip
    # One more than are kept lies there while the next is written.
    sizes = {"checkpoints": memory.whole(state) * (config.checkpoints_kept + 1)}
    if config.data.num_examples:
        return sizes | {"latent_cache": header.record_bytes * config.data.num_examples}
    return sizes | {"latent_cache_per_million_images": header.record_bytes * 1_000_000}


def changes(config: ml_collections.ConfigDict, topology: str) -> Iterator[tuple[str, ml_collections.ConfigDict, str]]:
    """Yields (what to type, config, topology), the smallest change first: recompute, less at once, shards, machine."""
    one_by_one = [(_recompute_finest,), (_recompute,), (_accumulate,), (_halve,), (_shard,), (_spread,)]
    together = [(_recompute, step) for step in (_accumulate, _halve, _shard, _spread)]
    layouts = [(_recompute, _spread, _shard), (_recompute, _spread, _shard, _shard), (_recompute, _accumulate, _shard)]
    machines = [
        (_enlarge,),
        (_recompute, _enlarge),
        (_recompute, _spread, _enlarge),
        (_recompute, _accumulate, _enlarge),
    ]
    for steps in one_by_one + together + layouts + machines:
        try:
            change = _changed(config, topology, steps)
        except ValueError:  # A mesh or batch that does not divide.
            continue
        if change:
            yield change


def _changed(config, topology, steps: Sequence[Callable]):
    config, said = config.copy_and_resolve_references(), {}
    for step in steps:
        what, topology = step(config, topology)
        if not what:
            return None
        said |= {option.partition("=")[0]: option for option in what.split()}  # Of two values the later counts.
    config_lib.check(config)
    check_layout(config, devices.topology(topology).count)
    return " ".join(said.values()), config, topology


def _recompute_finest(config, topology):
    changed, config.remat = config.remat == "none", "finest"
    return "--config.remat=finest" if changed else "", topology


def _recompute(config, topology):
    changed, config.remat = config.remat != "all", "all"
    return "--config.remat=all" if changed else "", topology


def _accumulate(config, topology):
    config.gradient_accumulation *= 2
    return f"--config.gradient_accumulation={config.gradient_accumulation}", topology


def _halve(config, topology):
    config.batch_size //= 2
    return f"--config.batch_size={config.batch_size}", topology


def _shard(config, topology):
    shape = sharding.mesh_shape(**config.mesh, num_devices=devices.topology(topology).count)
    config.mesh.data, config.mesh.fsdp = 0, 2 * shape["fsdp"]
    possible = shape["data"] % 2 == 0
    return f"--config.mesh.fsdp={config.mesh.fsdp} --config.mesh.data=0" if possible else "", topology


def _spread(config, topology):
    shape = sharding.mesh_shape(**config.mesh, num_devices=devices.topology(topology).count)
    spare, rows = shape["teacher"] * shape["data"], config_lib.num_rows(config)
    most = max(size for size in range(1, spare + 1) if spare % size == 0 and rows % size == 0)
    changed, config.mesh.data, config.mesh.teacher = most > shape["teacher"], 0, most
    return f"--config.mesh.teacher={most} --config.mesh.data=0" if changed else "", topology


def _enlarge(config, topology):
    larger = devices.topology(topology).larger
    if larger is None:
        return "", topology
    spare = larger.count // devices.topology(topology).count
    config.mesh.fsdp *= max(spare, 1)
    return f"--topology={larger.name} --config.mesh.fsdp={config.mesh.fsdp}", larger.name


def smallest_change(
    config: ml_collections.ConfigDict, topology: str, say: Callable[[str], None] = lambda line: None, **options
) -> tuple[str, Plan] | None:
    """Returns the first of `changes` under which the run fits, with its plan; each is planned, none is guessed."""
    for what, changed, where in changes(config, topology):
        planned = plan(changed, where, **options)
        total, available = sum(planned.memory.values()) / GIB, planned.available / GIB
        say(f"{what}: {total:.2f} of {available:.2f} GiB")
        if planned.fits:
            return what, planned
    return None
