"""`dmm-jax bench train`: the training step as `train` compiles it."""

import time

import jax

from dmm_jax.bench import networks as bench_networks
from dmm_jax.bench import profile as bench_profile
from dmm_jax.bench import timing, work
from dmm_jax.bench.host import StepLoop
from dmm_jax.config import checks
from dmm_jax.config.options import keeps_average
from dmm_jax.data.batches import Batch
from dmm_jax.distill.definition import Definition
from dmm_jax.distill.layout import Packing, compile_step
from dmm_jax.distill.state import init_state
from dmm_jax.planning import collectives, memory
from dmm_jax.planning.devices import GIB
from dmm_jax.runtime import sharding
from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.metrics import peak_memory


def measure(config, size: str, num_steps: int, profile: str = "", num_devices: int = 0) -> list[dict]:
    """Times the training step and the transfer of its batch; arguments as in `jobs.bench`."""
    checks.check(config)
    if config.teachers_in_host_memory:
        raise UserError("bench train times teachers on the device: set teachers_in_host_memory=False.")
    base, mesh = bench_networks.abstract_checkpoint(size), bench_networks.make_mesh(config, num_devices)
    on_host = bench_networks.random_batch(config, base)
    definition = Definition(config, base, mesh)
    compiled, arguments, compile_s = _compile(definition, sharding.put(on_host, mesh, sharding.BATCH))
    loop = StepLoop(compiled, *arguments, on_host, mesh)
    del arguments  # The loop donates the state.

    def call():
        return loop()["grad_norm"]

    step_s = timing.median_s(call, num_steps)
    host_ms = loop.host_ms()
    with timing.watched_power(len(mesh.local_devices)) as power:
        queued_s = timing.queued_s(call, num_steps)
    program = compiled.as_text()
    tflop = config.batch_size * work.train_tflop(base, definition.student_config)
    sent = sum(collective.sent for collective in collectives.read(program, mesh.shape))
    row = {
        "job": "train",
        "images_per_s": config.batch_size / step_s,
        "tflop_per_s": tflop / step_s,
        "step_s": step_s,
        "queued_step_s": queued_s,
        "host_ms": sum(host_ms.values()),
        "host_parts_ms": host_ms,
        "compile_s": compile_s,
        "planned_memory_gb": _planned_memory_gb(compiled),
        "teacher_gb": memory.per_device(loop.teachers.unet) / GIB,
        "sent_gb": sent / GIB,
        "batch": config.batch_size,
        "teachers": len(config.teachers),
        "mesh": dict(mesh.shape),
    }
    row |= power | peak_memory()
    return [row | bench_profile.collective_shares(bench_profile.report(call, profile, program))]


def _compile(definition: Definition, batch: Batch):
    """Returns the compiled step, its (state, teachers, frozen) of random numbers, and the seconds of compilation."""
    trained, teachers, frozen = bench_networks.random_networks(definition)
    state = init_state(trained, definition.optimizers, definition.mesh, keeps_average(definition.config))
    del trained
    packing = Packing(state, definition.mesh)
    step = definition.jitted_step(state, teachers, packing)
    state = packing.pack(state)
    started = time.perf_counter()
    compiled, teachers = compile_step(step, state, teachers, frozen, batch)
    return compiled, (state, teachers, frozen), time.perf_counter() - started


def _planned_memory_gb(compiled: jax.stages.Compiled) -> float:
    """Returns the memory of the compiled program on a device: arguments, results without aliases, temporaries."""
    plan = compiled.memory_analysis()
    sizes = (plan.argument_size_in_bytes, plan.output_size_in_bytes, plan.temp_size_in_bytes)
    return (sum(sizes) - plan.alias_size_in_bytes) / 2**30
