"""`dmm-jax bench`: medians of timed steps on random data, beside this device's own matrix peak and, if asked, PyTorch.

The networks have the published sizes and random weights, made on the device: speed does not depend on what they say.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from dmm_jax.bench import (
    networks as bench_networks,
)
from dmm_jax.bench import (
    numerics as numerics,
)
from dmm_jax.bench import (
    profile as bench_profile,
)
from dmm_jax.bench import (
    timing as timing,
)
from dmm_jax.bench import (
    traffic as traffic,
)
from dmm_jax.checkpoints.abstract import abstract_model, abstract_params
from dmm_jax.config import checks
from dmm_jax.config import options as config_lib
from dmm_jax.distill.layout import Packing, compile_step
from dmm_jax.distill.optimizer import make_optimizers
from dmm_jax.distill.state import init_state
from dmm_jax.distillation import Definition
from dmm_jax.evaluation import feature_networks
from dmm_jax.evaluation.published_weights import Weights
from dmm_jax.evaluation.samples import measure
from dmm_jax.models.inception_v3 import InceptionV3
from dmm_jax.models.unet_config import merged_config
from dmm_jax.planning import collectives, memory
from dmm_jax.planning.devices import GIB
from dmm_jax.runtime import sharding
from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.metrics import HostClock, peak_memory

NUM_PICTURES, PICTURE_SIZE, PICTURES_AT_ONCE = 5000, 512, 500  # Of each of the two sets whose FID is timed.


def get_config() -> ml_collections.ConfigDict:
    """Returns the config that `bench` runs unless another is given: the paper's batch, eight teachers."""
    config = config_lib.get_config()
    config.base = "random"
    config.teachers = tuple((f"style_{k}", "random") for k in range(8))
    return config


def bench(
    job: str,
    config,
    size: str = "sd15",
    num_steps: int = 10,
    batch_size: int = 16,
    profile: str = "",
    num_devices: int = 0,
) -> Iterable[dict]:
    """Runs one job and returns what was measured, an entry a line; of `numerics` each as soon as it is.

    Args:
      size: of the networks: a name in `SIZES`.
      num_steps: that are timed.
      profile: a folder for a trace of two more calls; their kernels, summed by name, are printed on stderr.
      batch_size: images at once, for sampling; training has the config's.
      num_devices: that training takes, the first of them; 0: all.
    """
    if num_devices and job != "train":
        raise UserError(f"a number of devices is for `bench train` and `bench scaling`; `{job}` takes all there are.")
    if job == "host":
        return bench_host(config, size, num_steps)
    if job == "fid":
        return [bench_fid()]
    device = jax.devices()[0]
    num_devices = num_devices or jax.device_count()
    about = {"device": device.device_kind, "num_devices": num_devices, "jax": jax.__version__, "size": size}
    if job == "numerics":
        return (line | about for line in numerics.bench_numerics(config, size))
    peak = timing.matmul_peak()
    lines = (
        bench_train(config, size, num_steps, profile, num_devices)
        if job == "train"
        else bench_sample(config, size, num_steps, batch_size, profile)
    )
    per_device = {"matmul_peak_tflop_per_s": peak}
    return [line | per_device | {"share_of_peak": line["tflop_per_s"] / peak / num_devices} | about for line in lines]


def bench_train(config, size: str, num_steps: int, profile: str = "", num_devices: int = 0) -> list[dict]:
    """Times the training step as `train` compiles it, and the handing over of a batch."""
    checks.check(config)
    base, mesh = bench_networks.described(size), _mesh(config, num_devices)
    definition = Definition(config, base, mesh)
    trained, teachers, frozen = bench_networks.random_networks(definition)
    state = init_state(trained, definition.optimizers, mesh, config.ema_decay)
    del trained
    on_host = bench_networks.random_batch(config, base)
    batch = sharding.put(on_host, mesh, sharding.BATCH)

    packing = Packing(state, mesh)
    step = definition.jitted_step(state, teachers, packing)
    state = packing.pack(state)
    started = time.perf_counter()
    compiled, teachers = compile_step(step, state, teachers, frozen, batch)
    compile_s = time.perf_counter() - started
    clocks = {part: HostClock() for part in ("dispatch", "batch")}

    def once():
        nonlocal state, batch
        clocks["dispatch"].restart()
        state, metrics = compiled(state, teachers, frozen, batch)
        clocks["dispatch"].step_done()
        clocks["batch"].restart()
        batch = sharding.put(on_host, mesh, sharding.BATCH)
        clocks["batch"].step_done()
        return metrics["grad_norm"]

    step_s = timing.median_s(once, num_steps)
    host_ms = {part: clock.median_ms() for part, clock in clocks.items()}
    with timing.watched_power(len(mesh.local_devices)) as power:
        queued_s = timing.queued_s(once, num_steps)
    program = compiled.as_text()
    exchanged = collectives.parse(program, mesh.shape)
    tflop = config.batch_size * bench_networks.train_tflop(base, definition.student_config)
    return [
        {
            "job": "train",
            "images_per_s": config.batch_size / step_s,
            "tflop_per_s": tflop / step_s,
            "step_s": step_s,
            "queued_step_s": queued_s,
            "host_ms": sum(host_ms.values()),
            "host_parts_ms": host_ms,
            "compile_s": compile_s,
            "planned_memory_gb": planned_memory_gb(compiled),
            "teacher_gb": memory.per_device(teachers.unet) / GIB,
            "sent_gb": sum(one.sent for one in exchanged) / GIB,
            "batch": config.batch_size,
            "teachers": len(config.teachers),
            "mesh": dict(mesh.shape),
        }
        | power
        | peak_memory()
        | bench_profile.collective_shares(_profiled(once, profile, program))
    ]


def _mesh(config, num_devices: int = 0):
    """Returns the config's mesh on the first devices, or on all; refuses a batch that does not divide among them."""
    devices = jax.devices()
    if num_devices > len(devices):
        raise UserError(f"{num_devices} devices were asked for; there are {len(devices)}.")
    mesh = sharding.make_mesh(**config.mesh, devices=devices[: num_devices or None])
    without = config.copy_and_resolve_references()
    without.validation_size = 0  # Nothing is validated here.
    checks.check_mesh(without, mesh.shape)
    return mesh


def bench_host(config, size: str, num_steps: int) -> list[dict]:
    """Times what the host alone pays for a step: a program with a step's arguments and results, and no work.

    First with the state as a checkpoint holds it, then packed as `train` runs it. An array costs the same at any size:
    `narrow` has the arrays of Stable Diffusion 1.5.
    """
    base, names = bench_networks.described(size), [name for name, _ in config.teachers]
    mesh = _mesh(config)
    student_config = merged_config(base.unet_config, len(names))
    trained = {"student": bench_networks.random_params(abstract_params("unet", student_config), mesh, fsdp=True)}
    state = init_state(trained, make_optimizers(config), mesh, config.ema_decay)
    frozen = partial(bench_networks.random_params, mesh=mesh, dtype=jnp.dtype(config.dtype))
    teachers = frozen(base.abstract("unet"), copies=len(names))
    encoders = {name: frozen(base.abstract(name)) for name in base.text_encoders}
    on_host = bench_networks.random_batch(config, base)
    packing = Packing(state, mesh)
    lines = []
    for job, held in (("host, whole state", state), ("host", packing.pack(jax.tree.map(jnp.copy, state)))):
        lines.append(_host_line(job, held, teachers, encoders, on_host, mesh, num_steps) | {"batch": config.batch_size})
    return lines


def _host_line(job, state, teachers, encoders, on_host, mesh, num_steps):
    places = jax.tree.map(lambda leaf: leaf.format, state)
    step = jax.jit(
        lambda state, teachers, encoders, batch: jax.lax.optimization_barrier(state),
        donate_argnums=0,
        keep_unused=True,
        out_shardings=places,
    )
    batch = sharding.put(on_host, mesh, sharding.BATCH)
    compiled = step.lower(state, teachers, encoders, batch).compile()
    parts = {part: HostClock() for part in ("dispatch", "batch")}
    for number in range(timing.WARMUP + num_steps):
        if number == timing.WARMUP:
            jax.tree.map(HostClock.median_ms, parts)
        parts["dispatch"].restart()
        state = compiled(state, teachers, encoders, batch)
        parts["dispatch"].step_done()
        parts["batch"].restart()
        batch = sharding.put(on_host, mesh, sharding.BATCH)
        parts["batch"].step_done()
        jax.block_until_ready((state, batch))
    host_parts_ms = {part: clock.median_ms() for part, clock in parts.items()}
    arrays = {"in": len(jax.tree.leaves((state, teachers, encoders, batch))), "out": len(jax.tree.leaves(state))}
    return {"job": job, "host_ms": sum(host_parts_ms.values()), "host_parts_ms": host_parts_ms, "arrays": arrays}


def bench_sample(config, size: str, num_steps: int, batch_size: int, profile: str = "") -> list[dict]:
    """Times whole samples, prompt to pixels: all images in one style, then every image in a mix of its own."""
    names = [name for name, _ in config.teachers]
    pipeline = bench_networks.random_pipeline(size, config)
    prompts = ["a large red circle"] * batch_size
    rng = np.random.default_rng(0)
    mixes = [dict(zip(names, rng.dirichlet(np.ones(len(names))).tolist(), strict=True)) for _ in prompts]
    tflop = batch_size * bench_networks.sample_tflop(bench_networks.described(size))
    lines = []
    for job, styles in (("sample", names[0]), ("sample, a mix per image", mixes)):
        draw = partial(pipeline, prompts, styles=styles, **bench_networks.SAMPLING)
        started = time.perf_counter()
        draw()
        first_s = time.perf_counter() - started
        sample_s = timing.median_s(draw, max(num_steps // 2, 1))
        lines.append(
            {
                "job": job,
                "images_per_s": batch_size / sample_s,
                "tflop_per_s": tflop / sample_s,
                "step_s": sample_s,
                "compile_s": max(first_s - sample_s, 0.0),
                "batch": batch_size,
            }
            | peak_memory()
        )
    _profiled(draw, profile)
    return lines


def bench_fid(num_pictures: int = NUM_PICTURES, side: int = PICTURE_SIZE) -> dict:
    """Times the FID of two sets of pictures, from pixels in memory to the distance, compilation included."""
    graph, state = nnx.split(abstract_model(lambda rngs: InceptionV3(rngs=rngs)), nnx.Param)
    params = bench_networks.random_params(nnx.to_pure_dict(state), sharding.make_mesh(data=jax.device_count()))
    network = feature_networks.from_inception(Weights(graph, params, "random", published=False), "inception")
    noise = np.random.default_rng(0).integers(0, 256, (PICTURES_AT_ONCE, side, side, 3), np.uint8)

    def pictures(first):
        return ((noise ^ np.uint8(first + k), noise[:, :1]) for k in range(-(-num_pictures // PICTURES_AT_ONCE)))

    started = time.perf_counter()
    samples = [measure(network, pictures(first), num_pictures) for first in (0, 128)]
    measured = time.perf_counter()
    network.distance(*(sample.summary for sample in samples))
    parts = {"features_s": measured - started, "distance_s": time.perf_counter() - measured}
    seconds = sum(parts.values())
    about = {"job": f"FID of 2 x {num_pictures} pictures of {side} px", "device": jax.devices()[0].device_kind}
    return about | {"step_s": seconds, "images_per_s": 2 * num_pictures / seconds, "batch": num_pictures} | parts


def _profiled(call, folder, program: str = "") -> list[bench_profile.Ran]:
    """Prints the kernels of a traced call on stderr and returns them; nothing without a folder for the trace.

    Args:
      program: the compiled program's text, where one is all that runs: what its fusions move is told, too.
    """
    ran = bench_profile.profile(call, folder) if folder else []
    if ran:
        print(bench_profile.table(bench_profile.summed(ran)), file=sys.stderr)
        if program:
            print(traffic.table(bench_profile.summed(ran, str), program), file=sys.stderr)
    elif folder:
        print(f"{folder} holds the trace, and no kernels of a device: a CPU tells none.", file=sys.stderr)
    return ran


def planned_memory_gb(compiled) -> float:
    """Returns what the compiled program needs on a device: arguments, results that are not aliased, temporaries."""
    plan = compiled.memory_analysis()
    kinds = (plan.argument_size_in_bytes, plan.output_size_in_bytes, plan.temp_size_in_bytes)
    return (sum(kinds) - plan.alias_size_in_bytes) / 2**30


def peer(job: str, size: str, batch_size: int, num_steps: int, num_teachers: int = 1) -> list[dict]:
    """Runs PyTorch's side of the same job on this machine, in a process of its own, and returns its lines.

    Raises:
      ValueError: torch or diffusers is not installed, or the peer failed; quotes the end of what it said.
    """
    command = [sys.executable, "-m", "dmm_jax.bench.peer", job, size, *map(str, (batch_size, num_steps, num_teachers))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"the PyTorch peer failed (it needs the [torch] extra): {done.stderr.strip()[-500:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def with_ratios(lines: list[dict], others: list[dict]) -> list[dict]:
    """Adds to each of our lines how many times the peer's images/s it reaches, for each of the peer's lines."""
    return [
        line | {"ratio": {other["job"]: line["images_per_s"] / other["images_per_s"] for other in others}}
        for line in lines
    ]


COLUMNS = (
    "job",
    "arithmetic",
    "batch",
    "images_per_s",
    "tflop_per_s",
    "share_of_peak",
    "step_s",
    "queued_step_s",
    "host_ms",
    "peak_memory_gb",
    "compile_s",
    "loss_error",
    "grad_norm_error",
    "gradient_error",
    "latents_error",
)


def table(lines: list[dict], columns: Sequence[str] = COLUMNS) -> str:
    """Lays measured lines out for people."""
    columns = [column for column in columns if any(column in line for line in lines)]
    rows = [columns] + [tuple(_cell(line.get(column)) for column in columns) for line in lines]
    widths = [max(len(row[k]) for row in rows) for k in range(len(columns))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for line in lines:
        text += [f"{line['job']}: {ratio:.2f} x {name}" for name, ratio in line.get("ratio", {}).items()]
    return "\n".join(text)


def _cell(value) -> str:
    if isinstance(value, Mapping):  # A mesh.
        return " x ".join(f"{axis} {size}" for axis, size in value.items() if size > 1) or "1"
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
