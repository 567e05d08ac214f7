"""What a run takes, before a machine is rented: memory per device, work, collectives, time; and what to change.

The step is `train`'s own, traced on shapes alone. With libtpu it is compiled for the TPU slice that is asked for, which
no TPU is needed for; without, or for GPUs, the memory of activations is an estimate.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import AbstractMesh, Mesh

from dmm_jax.checkpoints import published
from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.config import checks
from dmm_jax.config import options as config_lib
from dmm_jax.distill import incremental
from dmm_jax.distill import teachers as teachers_lib
from dmm_jax.distill.layout import Packing
from dmm_jax.distillation import Definition
from dmm_jax.kernels.attention import choose_implementation
from dmm_jax.planning import changes, compiler, devices, disk, flops, lifetimes, memory, requirements
from dmm_jax.planning import collectives as collectives_lib
from dmm_jax.planning.requirements import COMPILED, ESTIMATED, GIB, Plan
from dmm_jax.runtime import sharding

# Beyond what is counted, estimated temporaries take this much more: what a TPU pads and its program's code, what a
# GPU's allocator leaves between arrays. So no program of docs/plan.md that was compiled or run took more.
MARGIN = {"tpu": 0.17, "gpu": 0.02}


def plan(
    config: ml_collections.ConfigDict,
    topology: str,
    *,
    architecture: str = "sd15",
    compiled: bool | None = None,
    full_effort: bool = False,
) -> Plan:
    """Plans one config on one topology.

    Args:
      topology: "v5e:4x4", "gpu:8x80GB"; see `planning.devices`.
      architecture: of a base that is not there: a name in `checkpoints.published`.
      compiled: whether to compile for the TPU; None where libtpu is installed.
      full_effort: whether to compile as `train` does, in three times the time.

    Raises:
      ValueError: the config cannot be run, or the topology is unknown; says what to do.
    """
    program = Program.planned(config, topology, architecture, compiled)
    where, held = devices.topology(topology), program.held()
    if program.is_compiled:
        return _plan(program, where, measure(program, held, where, full_effort), compiler.told(full_effort))
    return _plan(program, where, estimate(program, held, where), ESTIMATED_HOW)


def _plan(program: "Program", where: devices.Topology, found: dict, told: str) -> Plan:
    found = {"available": where.device.memory} | found
    return Plan(
        topology=where,
        mesh_shape=dict(program.mesh.shape),
        fits=found.pop("fits", sum(found["memory"].values()) <= found["available"]),
        flops=program.flops(),
        method=COMPILED if program.is_compiled else ESTIMATED,
        batch_size=program.config.batch_size,
        num_steps=program.config.num_steps,
        disk=disk.needed(program.config, program.arguments[0], program.arguments[3]),
        assumptions=(*program.assumptions, told, *requirements.roofline_assumptions(where)),
        **found,
    )


ESTIMATED_HOW = (
    "temporaries and memory traffic are read off the program before any compiler: docs/plan.md compares them with "
    "compiled and measured ones. For the compiler's own figures on TPUs: pip install 'dmm-jax[plan]', no --no-compile"
)


@dataclasses.dataclass(frozen=True)
class Program:
    """The step of a config, with shapes in place of arrays."""

    definition: Definition
    platform: str
    arguments: tuple  # (state, teachers, frozen, batch)
    assumptions: tuple[str, ...]

    @classmethod
    def planned(cls, config, topology: str, architecture: str, compiled: bool | None) -> "Program":
        """Checks a config as `train` does, and describes its step on a topology: on TPUs that a compiler knows, or not.

        Args:
          compiled: as in `plan`.
        """
        config = incremental.resolved(config)
        checks.check(config)
        where = devices.topology(topology)
        changes.check_layout(config, where)
        compiled = where.platform == "tpu" and compiler.is_here() if compiled is None else compiled
        make = compiler.tpu_mesh if compiled else sharding.abstract_mesh
        which = {"topology": topology} if compiled else {"num_devices": where.count}
        return cls.describe(config, architecture, where.platform, make(**which, **config.mesh))

    @classmethod
    def describe(cls, config, architecture: str, platform: str, mesh) -> "Program":
        """Opens what checkpoints there are, takes the others for the architecture's, and places every array."""
        base, assumptions = base_checkpoint(config, architecture)
        num_encoders, more = rows_of_encoders(config, base, mesh.shape["teacher"])
        definition = Definition(config, base, mesh, platform=platform)
        teachers, frozen = definition.abstract_frozen(num_encoders)
        arguments = definition.abstract_state(), teachers, frozen, definition.abstract_batch()
        return cls(definition, platform, arguments, (*assumptions, *more))

    @property
    def config(self) -> ml_collections.ConfigDict:
        """The config of the run."""
        return self.definition.config

    @property
    def mesh(self) -> Mesh | AbstractMesh:
        """The mesh of the topology."""
        return self.definition.mesh

    @property
    def is_compiled(self) -> bool:
        """Tells whether a compiler knows the mesh's devices."""
        return isinstance(self.mesh, Mesh)

    def held(self) -> dict[str, float]:
        """Returns the bytes per device of what lives from step to step, and of the gradients, by kind."""
        return {kind: float(size) for kind, size in memory.held(*self.arguments).items()}

    def lower(self) -> jax.stages.Lowered:
        """Lowers the step that `train` runs, its state packed as there."""
        state, teachers, *others = self.arguments
        packing = Packing(state, self.mesh)
        step = self.definition.jitted_step(state, teachers, packing)
        return step.lower(jax.eval_shape(packing.pack, state), teachers, *others)

    def gradients(self, attention: str) -> tuple[Callable, tuple]:
        """Returns the function of losses and gradients, with an implementation of attention, and its arguments."""
        state, *others = self.arguments
        function = self.definition.with_attention(attention).gradients(state.trained)
        return function, (state.trained, *others, jax.ShapeDtypeStruct((), jnp.int32))

    def flops(self) -> float:
        """Returns the operations of a step's products and convolutions on one device, recomputation included."""
        return flops.of_step(self.definition, *self.arguments)


def base_checkpoint(config, architecture: str) -> tuple[Checkpoint, tuple[str, ...]]:
    """Returns the base, or where there is none the networks that the architecture was published with."""
    if pathlib.Path(config.base).exists():
        return open_checkpoint(config.base), ()
    return published.checkpoint(architecture), (
        f"{config.base} is not there: its networks are taken for {architecture}'s",
    )


def rows_of_encoders(config, base: Checkpoint, shards: int) -> tuple[int, tuple[str, ...]]:
    """Returns how many text encoders of the teachers' own are held, over all shards of `teacher`."""
    paths = [pathlib.Path(path) for _, path in config.teachers]
    replayed = config_lib.num_rows(config) - len(paths)
    if all(path.exists() for path in paths) and pathlib.Path(config.base).exists():
        asked = [*map(open_checkpoint, paths), *[base] * replayed]
        return len(teachers_lib.encoder_rows(base, asked, shards)[1]), ()
    most = min(len(paths), (len(paths) + replayed) // shards)
    return most * shards, ("every teacher brings a text encoder of its own; equal ones would be held once",)


def measure(program: Program, held: dict[str, float], where: devices.Topology, full_effort: bool) -> dict:
    """Compiles the step for the mesh's TPU and reads memory, traffic and collectives from the result."""
    lowered = program.lower()
    try:
        compiled = lowered.compile(compiler_options=None if full_effort else compiler.EFFORT)
    except jax.errors.JaxRuntimeError as error:
        needed, available = compiler.out_of_memory(error)
        more = {"temporaries": max(needed - sum(held.values()), 0.0)}
        refused = {"memory": held | more, "available": available, "fits": False}
        return estimate(program, held, where) | refused
    return requirements.of_program(compiled, held, program.mesh.shape, where)


def estimate(program: Program, held: dict[str, float], where: devices.Topology) -> dict:
    """Estimates what lives within a step from the order in which its values are computed and read."""
    implementation = choose_implementation(program.config.attention, program.config.dtype, program.platform)
    # Scores inside a fused kernel never exist.
    function, arguments = program.gradients("flash" if implementation == "cudnn" else implementation)
    (equation,) = jax.make_jaxpr(function)(*arguments).jaxpr.eqns  # The shard_map: inside, shapes are one device's.
    inside = equation.params["jaxpr"]
    largest = lifetimes.temporaries(inside)
    more = {"temporaries": max(largest - held["gradients"], 0.0), "margin": MARGIN[where.platform] * largest}
    moved = lifetimes.traffic(inside) + memory.OPTIMIZER_PASSES * held["gradients"]
    return {"memory": held | more, "bytes_accessed": moved, "collectives": foretold(program)}


def foretold(program: Program) -> list[collectives_lib.Collective]:
    """Returns the collectives that the step asks for; a compiler may join or rewrite them."""
    config, params = program.config, program.arguments[0].trained
    shape = dict(program.mesh.shape)
    return collectives_lib.foretell(params, shape, config.dtype, config.gradient_accumulation)


def smallest_change(
    config: ml_collections.ConfigDict,
    topology: str,
    say: Callable[[str], None] = lambda line: None,
    *,
    architecture: str = "sd15",
    compiled: bool | None = None,
    full_effort: bool = False,
) -> tuple[str, Plan] | None:
    """Returns the first of `changes.candidates` under which the run fits, with its plan; None where there is none.

    They are ranked by the estimate, and those whose arrays alone do not fit are passed over; only what the estimate
    finds to fit is compiled.
    """
    held: dict[tuple, dict[str, float]] = {}  # By layout.
    known: dict[tuple, tuple[float, float]] = {}  # By layout and recomputation: images at once, bytes within the step.
    config = incremental.resolved(config)
    for change in changes.candidates(config, topology):
        where, key, program = devices.topology(change.topology), (change.layout, change.config.remat), None
        described = functools.partial(Program.planned, change.config, change.topology, architecture)
        if change.layout not in held:
            program = described(compiled=False)
            held[change.layout] = program.held()
        rests, (images, within) = sum(held[change.layout].values()), known.get(key, (math.inf, 0.0))
        # Of what a step needs for its images, half as many need half; of the rest no less.
        if rests + within * min(change.images / images, 1.0) > where.device.memory:
            continue
        program = program or described(compiled=False)
        found = estimate(program, program.held(), where)
        total = sum(found["memory"].values())
        known[key] = change.images, total - rests
        say(f"{change.what}: {total / GIB:.2f} of {where.device.memory / GIB:.2f} GiB, estimated")
        if total > where.device.memory:
            continue
        if compiled is False or where.platform != "tpu" or not compiler.is_here():
            return change.what, _plan(program, where, found, ESTIMATED_HOW)
        options = {"architecture": architecture, "compiled": True, "full_effort": full_effort}
        planned = plan(change.config, change.topology, **options)
        say(f"{change.what}: {sum(planned.memory.values()) / GIB:.2f} GiB, compiled")
        if planned.fits:
            return change.what, planned
    return None
