"""`python -m tests.mesh_program CASES OUT`: a few whole steps of eight different teachers on each of several meshes.

Run by `test_sharding` in a process with eight fake devices. CASES is a JSON list of [mesh, changes of the config]; of
each, OUT/NUMBER.npz holds what the steps logged and where they led. OUT/places.json tells along which axes arrays are
divided.
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
from dmm_jax.config import options as config_lib
from dmm_jax.data.batches import Batch
from dmm_jax.distill import discriminator
from dmm_jax.distill.teachers import put_params
from dmm_jax.distillation import Distillation
from dmm_jax.models.text_encoders import NUM_TIME_IDS
from dmm_jax.runtime import sharding
from dmm_jax.world.architecture import SCHEDULER_CONFIG, TEXT_CONFIG
from dmm_jax.world.random_checkpoints import random_tensors

NUM_TEACHERS, NUM_STEPS, PER_TEACHER = 8, 2, 8
WITH_ENCODERS = (2, 5)  # Teachers whose text encoder is their own.
TEXT = TEXT_CONFIG | {
    "num_hidden_layers": 1, "vocab_size": 64, "bos_token_id": 62, "eos_token_id": 63, "pad_token_id": 63,
}  # fmt: skip
UNET = {
    "_class_name": "UNet2DConditionModel", "sample_size": 8, "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"], "block_out_channels": [64], "layers_per_block": 1,
    "cross_attention_dim": 64, "attention_head_dim": 8,
}  # fmt: skip


def checkpoint(seed: int, *names: str) -> Checkpoint:
    """Returns networks of random numbers under the names given."""

    def component(name, config):
        return Component(config, lambda: random_tensors(naming.torch_shapes(abstract_params(name, config)), seed))

    parts = {name: component(name, {"unet": UNET, "text_encoder": TEXT}[name]) for name in names}
    return Checkpoint(pathlib.Path(f"random_{seed}"), "diffusers", parts, dict(SCHEDULER_CONFIG), None, None)


def settings(changes: dict):
    """Returns the config: every part of the step at work, and Adam kept from making noise large."""
    config = config_lib.get_config()
    config.base, config.teachers = "random", tuple((f"style_{k}", "random") for k in range(NUM_TEACHERS))
    config.batch_size, config.data.resolution, config.dtype = NUM_TEACHERS * PER_TEACHER, 64, "float32"
    config.warmup_steps, config.learning_rate, config.adam_eps = 0, 1e-3, 1e-3
    config.max_grad_norm, config.ema_decay, config.style_init = 0.5, 0.5, "paper"
    config.student_init = "base"
    config.update_from_flattened_dict(changes)
    return config


def random_batch() -> Batch:
    """Returns one batch as the latent cache gives it."""
    rng, lead = np.random.default_rng(0), (NUM_TEACHERS, PER_TEACHER)
    return Batch(
        latents=rng.standard_normal((*lead, 8, 8, 4), np.float32),
        input_ids=rng.integers(0, 64, (*lead, 77), dtype=np.int32),
        time_ids=np.zeros((*lead, NUM_TIME_IDS), np.int32),
    )


def divided(tree, mesh) -> list[list[str]]:
    """Returns for each array the axes along which devices hold different parts of it, read off the devices."""

    def one(leaf):
        parts = {shard.device: str(shard.index) for shard in leaf.addressable_shards}
        grid = np.vectorize(parts.get)(mesh.devices)
        return [axis for k, axis in enumerate(sharding.AXES) if (grid != grid.take([0], k)).any()]

    return [one(leaf) for leaf in jax.tree.leaves(tree)]


def run(mesh_shape, changes: dict, base: Checkpoint, teachers) -> tuple[dict, dict]:
    """Returns what NUM_STEPS steps log and where they lead, by name, and where the arrays live."""
    config, (teacher, data, fsdp) = settings(changes), mesh_shape
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
    judge = discriminator.define(base.unet_config, NUM_TEACHERS, 8)
    backbone = jax.tree.map(lambda leaf: np.zeros(leaf.shape), discriminator.abstract_params(judge)["backbone"])
    leaves = jax.tree.leaves(after)
    places = {
        "batch": batch, "teachers": distillation.teachers, "text": distillation.frozen,
        "backbone": put_params(backbone, mesh, distillation.dtype),
        "counters": [leaf for leaf in leaves if leaf.ndim == 0], "small": state.arrays["small"], "logged": metrics,
        "trained": [leaf for leaf in leaves if leaf.ndim],
    }  # fmt: skip
    arrays = {f"{name}.{k}": leaf for name, tree in results.items() for k, leaf in enumerate(jax.tree.leaves(tree))}
    return arrays, {name: divided(tree, mesh) for name, tree in places.items()}


def main(cases: str, out: str) -> None:
    """Runs every case and writes what it found."""
    base = checkpoint(0, "unet", "text_encoder")
    own = [("unet", "text_encoder") if k in WITH_ENCODERS else ("unet",) for k in range(NUM_TEACHERS)]
    others = {f"style_{k}": checkpoint(1 + k, *names) for k, names in enumerate(own)}
    for number, (mesh_shape, changes) in enumerate(json.loads(cases)):
        found, places = run(mesh_shape, changes, base, others)
        np.savez(f"{out}/{number}.npz", **found)
        jax.clear_caches()  # Each case has a program of its own.
    pathlib.Path(out, "places.json").write_text(json.dumps(places))  # Of the last.


if __name__ == "__main__":
    main(*sys.argv[1:])
