"""`python -m tests.mesh_program CASES OUT`: two steps of four different teachers on each of several meshes.

`test_sharding` runs it in a process with eight fake devices. CASES is a JSON list of [mesh, changes of the config]. For
each case, OUT/NUMBER.npz has the logged metrics and the changes of the state; OUT/places.json has, for the last case,
the axes along which arrays are divided.
"""

import json
import pathlib
import sys

import jax
import numpy as np
import optax

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.abstract import abstract_params
from dmm_jax.checkpoints.checkpoint import Checkpoint, Component
from dmm_jax.config.options import get_config
from dmm_jax.data.batches import Batch
from dmm_jax.distill import discriminator
from dmm_jax.distill.teachers import put_params
from dmm_jax.distillation import Distillation
from dmm_jax.models.text_encoders import NUM_TIME_IDS
from dmm_jax.runtime import sharding
from dmm_jax.world.architecture import SCHEDULER_CONFIG, TEXT_CONFIG, VAE_CONFIG
from dmm_jax.world.random_checkpoints import random_tensors
from dmm_jax.world.tokenizer import tokenizer_fields, write_tokenizer

NUM_TEACHERS, NUM_STEPS, PER_TEACHER = 4, 2, 8
WITH_ENCODERS = (1, 3)  # Teachers with their own text encoder.
UNET = {
    "_class_name": "UNet2DConditionModel", "sample_size": 8, "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"], "block_out_channels": [64], "layers_per_block": 1,
    "cross_attention_dim": 64, "attention_head_dim": 8, "transformer_layers_per_block": 2,
}  # fmt: skip


def random_checkpoint(seed: int, tokenizer: pathlib.Path, *networks: str) -> Checkpoint:
    """Returns a checkpoint with random parameters of the networks."""
    text_encoder = TEXT_CONFIG | tokenizer_fields(tokenizer) | {"num_hidden_layers": 1}
    configs = {"unet": UNET, "vae": VAE_CONFIG, "text_encoder": text_encoder}

    def component(name):
        shapes = naming.torch_shapes(abstract_params(name, configs[name]))
        return Component(configs[name], lambda: random_tensors(shapes, seed))

    parts = {name: component(name) for name in networks}
    return Checkpoint(pathlib.Path(f"random_{seed}"), "diffusers", parts, dict(SCHEDULER_CONFIG), tokenizer, None)


def make_config(changes: dict):
    """Returns a config that uses every part of the step; a large epsilon keeps Adam from amplifying rounding."""
    config = get_config()
    config.base, config.teachers = "random", tuple((f"style_{k}", "random") for k in range(NUM_TEACHERS))
    config.batch_size, config.data.resolution, config.dtype = NUM_TEACHERS * PER_TEACHER, 32, "float32"
    config.warmup_steps, config.learning_rate, config.adam_eps = 0, 1e-3, 1e-3
    config.max_grad_norm, config.ema_decay, config.style_init = 0.5, 0.5, "paper"
    config.student_init, config.loop_blocks = "base", 2
    config.update_from_flattened_dict(changes)
    return config


def random_batch() -> Batch:
    """Returns a batch in the form of the latent cache's."""
    rng, lead = np.random.default_rng(0), (NUM_TEACHERS, PER_TEACHER)
    return Batch(
        latents=rng.standard_normal((*lead, 4, 4, 4), np.float32),
        input_ids=rng.integers(0, 64, (*lead, 77), dtype=np.int32),
        time_ids=np.zeros((*lead, NUM_TIME_IDS), np.int32),
    )


def divided_axes(tree, mesh) -> list[list[str]]:
    """Returns, for each array, the axes along which devices hold different parts of it."""

    def axes(leaf):
        parts = {shard.device: str(shard.index) for shard in leaf.addressable_shards}
        grid = np.vectorize(parts.get)(mesh.devices)
        return [axis for k, axis in enumerate(sharding.AXES) if (grid != grid.take([0], k)).any()]

    return [axes(leaf) for leaf in jax.tree.leaves(tree)]


def run_case(mesh_shape, changes: dict, base: Checkpoint, teachers) -> tuple[dict, dict]:
    """Takes NUM_STEPS steps; returns {name: array} of metrics and changes, and the divided axes of arrays."""
    config, (teacher, data, fsdp) = make_config(changes), mesh_shape
    mesh = sharding.make_mesh(teacher, data, fsdp, devices=jax.devices()[: teacher * data * fsdp])
    distillation = Distillation(config, base=base, teachers=teachers, mesh=mesh)
    state = distillation.init()
    before = jax.tree.map(np.asarray, distillation.unpack(state).trained)
    batch = sharding.put(random_batch(), mesh, sharding.BATCH)
    logged = []
    for _ in range(NUM_STEPS):
        state, metrics = distillation.step(state, batch)
        logged.append(jax.tree.map(np.asarray, metrics))
    after = distillation.unpack(state)
    networks = {name: getattr(after, name) for name in after.trained}
    moved = jax.tree.map(lambda new, old: np.asarray(new) - old, after.trained, before)
    trees = {
        name: {"moved": moved[name]} | {moment: optax.tree.get(network.opt_state, moment) for moment in ("mu", "nu")}
        for name, network in networks.items()
    }
    trees["student"]["average"] = jax.tree.map(lambda new, old: new - old, after.ema, before["student"])
    results = {f"{network} {kind}": tree for network, kinds in trees.items() for kind, tree in kinds.items()}
    results |= {f"logged {name}": [line[name] for line in logged] for name in logged[0]}
    network = discriminator.define(base.unet_config, NUM_TEACHERS, 8)
    backbone = jax.tree.map(lambda leaf: np.zeros(leaf.shape), discriminator.abstract_params(network)["backbone"])
    leaves = jax.tree.leaves(after)
    divided = {
        "batch": batch, "teachers": distillation.teachers, "text": distillation.frozen,
        "backbone": put_params(backbone, mesh, distillation.dtype),
        "counters": [leaf for leaf in leaves if leaf.ndim == 0], "small": state.arrays["small"], "logged": metrics,
        "trained": [leaf for leaf in leaves if leaf.ndim],
    }  # fmt: skip
    arrays = {f"{name}.{k}": leaf for name, tree in results.items() for k, leaf in enumerate(jax.tree.leaves(tree))}
    if config.teachers_in_host_memory:
        del divided["teachers"]  # They are in the host's memory.
    return arrays, {name: divided_axes(tree, mesh) for name, tree in divided.items()}


def main(cases: str, out: str) -> None:
    """Runs every case and writes the results."""
    tokenizer = pathlib.Path(out, "tokenizer")
    write_tokenizer(tokenizer)
    base = random_checkpoint(0, tokenizer, "unet", "vae", "text_encoder")
    networks = [("unet", "text_encoder") if k in WITH_ENCODERS else ("unet",) for k in range(NUM_TEACHERS)]
    teachers = {f"style_{k}": random_checkpoint(1 + k, tokenizer, *names) for k, names in enumerate(networks)}
    for number, (mesh_shape, changes) in enumerate(json.loads(cases)):
        arrays, places = run_case(mesh_shape, changes, base, teachers)
        np.savez(f"{out}/{number}.npz", **arrays)
        jax.clear_caches()  # Each case has a program of its own.
    pathlib.Path(out, "places.json").write_text(json.dumps(places))


if __name__ == "__main__":
    main(*sys.argv[1:])
