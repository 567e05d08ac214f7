"""`dmm-jax bench train`: the training step as `train` compiles it."""

import time

import jax
import jax.numpy as jnp

from dmm_jax import distillation as definitions
from dmm_jax.bench import networks as bench_networks
from dmm_jax.bench import profile as bench_profile
from dmm_jax.bench import timing, work
from dmm_jax.bench.host import StepLoop
from dmm_jax.config import checks
from dmm_jax.distill import step as distill_step
from dmm_jax.distill import student as student_lib
from dmm_jax.distill.packing import Packing
from dmm_jax.models.unet_2d_condition import merged_config
from dmm_jax.planning import collectives, memory
from dmm_jax.planning.devices import GIB
from dmm_jax.runtime import sharding
from dmm_jax.runtime.metrics import peak_memory


def measure(config, size: str, num_steps: int, profile: str = "", num_devices: int = 0) -> list[dict]:
    """Times the training step and the transfer of its batch; arguments as in `jobs.bench`."""
    checks.check(config)
    base, mesh = bench_networks.abstract_checkpoint(size), bench_networks.make_mesh(config, num_devices)
    on_host = bench_networks.random_batch(config, base)
    compiled, arguments, compile_s = _compile(config, base, mesh, sharding.put(on_host, mesh, sharding.BATCH))
    loop = StepLoop(compiled, *arguments, on_host, mesh)
    del arguments  # The loop donates the state.

    def call():
        return loop()["grad_norm"]

    step_s = timing.median_s(call, num_steps)
    host_ms = loop.host_ms()
    with timing.watched_power(len(mesh.local_devices)) as power:
        queued_s = timing.queued_s(call, num_steps)
    program = compiled.as_text()
    tflop = config.batch_size * work.train_tflop(base, merged_config(base.unet_config, len(config.teachers)))
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
        "teacher_gb": memory.per_device(loop.teachers["unet"]) / GIB,
        "sent_gb": sent / GIB,
        "batch": config.batch_size,
        "teachers": len(config.teachers),
        "mesh": dict(mesh.shape),
    }
    row |= power | peak_memory()
    return [row | bench_profile.collective_shares(bench_profile.report(call, profile, program))]


def _compile(config, base, mesh, batch):
    """Returns the compiled step, its (state, teachers, encoders) of random numbers, and the seconds of compilation."""
    networks, _ = definitions.define_networks(config, base)
    objective = bench_networks.define_objective(config, base)
    trained, teachers, encoders = bench_networks.random_networks(config, base, mesh, jnp.dtype(config.dtype))
    optimizers = student_lib.make_optimizers(config)
    state = student_lib.make_state(trained, optimizers, mesh, config.ema_decay)
    del trained
    packing = Packing(state, mesh)
    step = definitions.define_step(config, networks, objective, optimizers, mesh, state, teachers, packing)
    state = packing.pack(state)
    started = time.perf_counter()
    compiled, teachers = distill_step.compile_step(step, state, teachers, encoders, batch)
    return compiled, (state, teachers, encoders), time.perf_counter() - started


def _planned_memory_gb(compiled: jax.stages.Compiled) -> float:
    """Returns the memory of the compiled program on a device: arguments, results without aliases, temporaries."""
    plan = compiled.memory_analysis()
    sizes = (plan.argument_size_in_bytes, plan.output_size_in_bytes, plan.temp_size_in_bytes)
    return (sum(sizes) - plan.alias_size_in_bytes) / 2**30
