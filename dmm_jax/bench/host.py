"""`dmm-jax bench host`: what a step costs the host alone, and the loop that `bench train` times as well."""

from functools import partial

import jax
import jax.numpy as jnp

from dmm_jax.bench import networks as bench_networks
from dmm_jax.bench import timing
from dmm_jax.checkpoints.abstract import abstract_params
from dmm_jax.config.options import keeps_average
from dmm_jax.distill.layout import Packing
from dmm_jax.distill.optimizer import make_optimizers
from dmm_jax.distill.state import init_state
from dmm_jax.models.unet_config import merged_config
from dmm_jax.runtime import sharding
from dmm_jax.runtime.metrics import HostClock


class StepLoop:
    """Runs a step and puts the next batch on the devices, each time it is called, and clocks both on the host."""

    def __init__(self, step, state, teachers, encoders, on_host, mesh):
        self.state, self.teachers, self.encoders = state, teachers, encoders
        self._step, self._on_host, self._mesh = step, on_host, mesh
        self._clocks = {part: HostClock() for part in ("dispatch", "batch")}
        self.batch = sharding.put(on_host, mesh, sharding.BATCH)

    def __call__(self):
        """Runs one step and returns its metrics."""
        self._clocks["dispatch"].restart()
        self.state, metrics = self._step(self.state, self.teachers, self.encoders, self.batch)
        self._clocks["dispatch"].step_done()
        self._clocks["batch"].restart()
        self.batch = sharding.put(self._on_host, self._mesh, sharding.BATCH)
        self._clocks["batch"].step_done()
        return metrics

    def host_ms(self) -> dict[str, float]:
        """Returns the median milliseconds of each part since the last call of this method."""
        return {part: clock.median_ms() for part, clock in self._clocks.items()}


def measure(config, size: str, num_steps: int) -> list[dict]:
    """Times a program with a step's arguments and results that computes nothing; arguments as in `jobs.bench`.

    The first row has the state as a checkpoint holds it, the second has it packed, as in `train`. An array costs the
    same at any size: the size `narrow` has as many arrays as Stable Diffusion 1.5.
    """
    base, names = bench_networks.abstract_checkpoint(size), [name for name, _ in config.teachers]
    mesh = bench_networks.make_mesh(config)
    student_config = merged_config(base.unet_config, len(names))
    trained = {"student": bench_networks.random_params(abstract_params("unet", student_config), mesh, fsdp=True)}
    state = init_state(trained, make_optimizers(config), mesh, keeps_average(config))
    make_params = partial(bench_networks.random_params, mesh=mesh, dtype=jnp.dtype(config.dtype))
    teachers = make_params(base.abstract("unet"), copies=len(names))
    encoders = {name: make_params(base.abstract(name)) for name in base.text_encoders}
    on_host = bench_networks.random_batch(config, base)
    packed = Packing(state, mesh).pack(jax.tree.map(jnp.copy, state))
    rows = []
    for job, arrays in (("host, whole state", state), ("host", packed)):
        row = _measure_without_work(arrays, teachers, encoders, on_host, mesh, num_steps)
        rows.append({"job": job} | row | {"batch": config.batch_size})
    return rows


def _measure_without_work(state, teachers, encoders, on_host, mesh, num_steps) -> dict:
    step = jax.jit(
        lambda state, teachers, encoders, batch: (jax.lax.optimization_barrier(state), ()),
        donate_argnums=0,
        keep_unused=True,
        out_shardings=(jax.tree.map(lambda leaf: leaf.format, state), ()),
    )
    batch = sharding.put(on_host, mesh, sharding.BATCH)
    num_arrays = {"in": len(jax.tree.leaves((state, teachers, encoders, batch))), "out": len(jax.tree.leaves(state))}
    compiled = step.lower(state, teachers, encoders, batch).compile()
    loop = StepLoop(compiled, state, teachers, encoders, on_host, mesh)
    for number in range(timing.WARMUP + num_steps):
        if number == timing.WARMUP:
            loop.host_ms()  # Drops the times of the warm-up.
        loop()
        jax.block_until_ready((loop.state, loop.batch))
    parts = loop.host_ms()
    return {"host_ms": sum(parts.values()), "host_parts_ms": parts, "arrays": num_arrays}
