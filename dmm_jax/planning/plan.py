"""Plans a run before a machine is rented: memory, work, collectives and time per device, and changes that make it fit.

The step is that of `train`, traced on shapes. With libtpu it is compiled for the requested TPU slice, without a TPU.
Without libtpu, and for GPUs, the memory of activations is an estimate.
"""

import functools
import math
from collections.abc import Callable

import jax
import ml_collections

from dmm_jax.config.options import num_rows
from dmm_jax.distill import incremental
from dmm_jax.kernels.attention import choose_implementation
from dmm_jax.planning import changes, collectives, compiler, devices, disk, lifetimes, memory, requirements
from dmm_jax.planning.program import Program
from dmm_jax.planning.requirements import COMPILED, ESTIMATED, GIB, Plan, StepCost

# The margin as a share of the estimated temporaries: a TPU's padding and the code of its program, gaps in a GPU's
# allocator. With it, the estimate of every row in docs/plan.md is at least what was compiled.
MARGIN = {"tpu": 0.17, "gpu": 0.02}
ESTIMATED_NOTE = (
    "temporaries and memory traffic are estimated from the traced program; docs/plan.md compares such estimates with "
    "compiled and measured figures. For the compiler's own figures on TPUs: pip install 'dmm-jax[plan]', and no "
    "--no-compile"
)
FULL_EFFORT_NOTE = "compiled as `train` compiles"
LEAST_EFFORT_NOTE = (
    "compiled with the least effort for its speed; `train` takes the full one (--full-effort), and memory is close"
)


def plan(
    config: ml_collections.ConfigDict,
    topology: str,
    *,
    architecture: str = "sd15",
    compiled: bool | None = None,
    full_effort: bool = False,
) -> Plan:
    """Returns the plan of one config on one topology.

    Args:
      topology: "v5e:4x4", "gpu:8x80GB"; see `planning.devices`.
      architecture: a name in `checkpoints.published`, for a base that does not exist.
      compiled: whether to compile for the TPU; None: if libtpu is installed.
      full_effort: whether to compile as `train` does, in three times the time.

    Raises:
      UserError: the config cannot be run, or the topology is unknown; says what to do.
    """
    program = Program.on_topology(config, topology, architecture, compiled)
    target = devices.topology(topology)
    if not program.is_compiled:
        return _plan(program, target, estimate(program, target), ESTIMATED_NOTE)
    note = FULL_EFFORT_NOTE if full_effort else LEAST_EFFORT_NOTE
    try:
        return _plan(program, target, measure(program, target, full_effort), note)
    except jax.errors.JaxRuntimeError as error:
        needed, available = compiler.out_of_memory(error)
    cost, array_bytes = estimate(program, target), program.array_bytes()
    memory_needed = array_bytes | {"temporaries": max(needed - sum(array_bytes.values()), 0.0)}
    return _plan(program, target, cost._replace(memory=memory_needed), note, available=available, fits=False)


def _plan(
    program: Program,
    target: devices.Topology,
    cost: StepCost,
    note: str,
    available: float | None = None,
    fits: bool | None = None,
) -> Plan:
    available = available or target.device.memory
    return Plan(
        topology=target,
        mesh_shape=dict(program.mesh.shape),
        available=available,
        fits=sum(cost.memory.values()) <= available if fits is None else fits,
        flops=program.flops(),
        flops_of_teachers=program.flops_of_teachers(),
        method=COMPILED if program.is_compiled else ESTIMATED,
        batch_size=program.config.batch_size,
        num_steps=program.config.num_steps,
        disk=disk.needed(program.config, program.arguments.state, program.arguments.batch),
        assumptions=(*program.assumptions, note, *requirements.roofline_assumptions(target, program.is_streamed)),
        **cost._asdict(),
    )


def measure(program: Program, target: devices.Topology, full_effort: bool) -> StepCost:
    """Compiles the step for the mesh's TPU and returns its cost.

    Raises:
      jax.errors.JaxRuntimeError: the program needs more memory than the device has.
    """
    options = None if full_effort else compiler.LEAST_EFFORT
    compiled = program.lower().compile(compiler_options=options)
    cost_of = requirements.cost_of_streamed if program.is_streamed else requirements.cost_of_compiled
    return cost_of(compiled, program.arguments, program.mesh.shape, target)


def estimate(program: Program, target: devices.Topology) -> StepCost:
    """Estimates the step's cost: temporaries and traffic by `lifetimes`, collectives by `collectives.predict`."""
    array_bytes = program.array_bytes()
    params, fsdp = program.arguments.state.student.params, program.mesh.shape["fsdp"]
    casts = memory.looped_kernels(params, program.config.dtype, fsdp)
    array_bytes |= {"looped kernels": casts} if casts else {}
    attention = choose_implementation(program.config.attention, program.config.dtype, program.platform)
    # Neither kernel writes its scores to memory, so cuDNN's is traced as "flash".
    attention = "flash" if attention == "cudnn" else attention
    function, arguments = program.gradients(attention)
    gradients = _on_one_device(function, *arguments)
    optimizer_traffic = memory.OPTIMIZER_PASSES * array_bytes["gradients"]
    if program.is_streamed:
        return _estimate_streamed(program, array_bytes, target, gradients, arguments[-1], attention, optimizer_traffic)
    largest = lifetimes.temporaries(gradients)
    temporaries = max(largest - array_bytes["gradients"], 0.0)
    return StepCost(
        memory=array_bytes | {"temporaries": temporaries, "margin": MARGIN[target.platform] * largest},
        bytes_accessed=lifetimes.traffic(gradients) + optimizer_traffic,
        collectives=predicted_collectives(program),
    )


def _on_one_device(function, *arguments):
    (shard_map,) = jax.make_jaxpr(function)(*arguments).jaxpr.eqns
    return shard_map.params["jaxpr"]


def _estimate_streamed(program, array_bytes, target, gradients, predictions, attention, optimizer_traffic):
    """Estimates a step that takes the rows of its batch one after another; `gradients` is one row's program."""
    rows = num_rows(program.config)
    function, arguments = program.predictions(attention)
    asking = _on_one_device(function, *arguments)
    waiting = memory.total(predictions) / (program.mesh.size // program.mesh.shape["teacher"])
    # The sum of the gradients stays while a row's own are computed.
    largest = max(lifetimes.temporaries(asking), lifetimes.temporaries(gradients) + waiting)
    traffic = lifetimes.traffic(asking) + lifetimes.traffic(gradients) + 2 * array_bytes["gradients"]
    return StepCost(
        memory=array_bytes | {"temporaries": largest, "margin": MARGIN[target.platform] * largest},
        bytes_accessed=rows * traffic + optimizer_traffic,
        collectives=predicted_collectives(program),
        from_host=float(memory.streamed_bytes(program.arguments.teachers, rows)),
    )


def predicted_collectives(program: Program) -> list[collectives.Collective]:
    """Returns the collectives that the step requests; a compiler may join or rewrite them."""
    config, trained = program.config, program.arguments.state.trained
    predicted = collectives.predict(trained, dict(program.mesh.shape), config.dtype, config.gradient_accumulation)
    return collectives.repeated(predicted, num_rows(config)) if program.is_streamed else predicted


def smallest_change(
    config: ml_collections.ConfigDict,
    topology: str,
    say: Callable[[str], None] = lambda line: None,
    *,
    architecture: str = "sd15",
    compiled: bool | None = None,
    full_effort: bool = False,
) -> tuple[str, Plan] | None:
    """Returns the flags of the first of `changes.candidates` that fits, and its plan; None if none fits.

    A candidate is skipped if its arrays and the least possible temporaries do not fit. All other candidates are
    estimated, and compiled only if the estimate fits.

    Args:
      say: receives a line for each estimate and each compilation.
    """
    array_totals: dict[tuple, float] = {}  # {layout: bytes}.
    estimates: dict[tuple, tuple[float, float]] = {}  # {(layout, remat): (images at once, bytes of temporaries)}.
    config = incremental.resolved(config)
    for change in changes.candidates(config, topology):
        target, key = devices.topology(change.topology), (change.layout, change.config.remat)
        where = (change.config, change.topology, architecture)
        program = functools.cache(functools.partial(Program.on_topology, *where, compiled=False))
        if change.layout not in array_totals:
            array_totals[change.layout] = sum(program().array_bytes().values())
        arrays, (images, temporaries) = array_totals[change.layout], estimates.get(key, (math.inf, 0.0))
        # With half the images at once, at least half the temporaries remain.
        if arrays + temporaries * min(change.images / images, 1.0) > target.device.memory:
            continue
        cost = estimate(program(), target)
        total = sum(cost.memory.values())
        estimates[key] = change.images, total - arrays
        say(f"{change.flags}: {total / GIB:.2f} of {target.device.memory / GIB:.2f} GiB, estimated")
        if total > target.device.memory:
            continue
        if compiled is False or target.platform != "tpu" or not compiler.is_installed():
            return change.flags, _plan(program(), target, cost, ESTIMATED_NOTE)
        options = {"architecture": architecture, "compiled": True, "full_effort": full_effort}
        planned = plan(change.config, change.topology, **options)
        say(f"{change.flags}: {sum(planned.memory.values()) / GIB:.2f} GiB, compiled")
        if planned.fits:
            return change.flags, planned
    return None
