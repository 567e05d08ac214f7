"""The training step of a config as a program of shapes: networks, state and batch without any array."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from dmm_jax import distillation as definitions
from dmm_jax.checkpoints import published
from dmm_jax.checkpoints.abstract import abstract_params
from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.checkpoints.open import CELL, open_checkpoint
from dmm_jax.config import checks
from dmm_jax.config import options as config_lib
from dmm_jax.distill import incremental
from dmm_jax.distill import step as distill_step
from dmm_jax.distill import student as student_lib
from dmm_jax.distill import teachers as teachers_lib
from dmm_jax.distill.packing import Packing
from dmm_jax.models.text_encoders import NUM_TIME_IDS
from dmm_jax.models.unet_2d_condition import merged_config
from dmm_jax.planning import changes, compiler, devices, flops, memory
from dmm_jax.runtime import sharding


class Arguments(NamedTuple):
    """The step's arguments: trees of shapes with shardings."""

    state: dict
    teachers: dict
    encoders: dict
    batch: dict


@dataclasses.dataclass(frozen=True)
class Program:
    """The step of a config on a mesh, with shapes instead of arrays."""

    config: ml_collections.ConfigDict
    base: Checkpoint
    mesh: Mesh | AbstractMesh
    platform: str
    arguments: Arguments
    assumptions: tuple[str, ...]

    @classmethod
    def on_topology(cls, config, topology: str, architecture: str, compiled: bool | None) -> "Program":
        """Checks a config as `train` does, and returns its step on a topology.

        Args:
          architecture: the published architecture that replaces a missing base.
          compiled: whether a compiler must know the mesh's devices; None: if it is a TPU's and libtpu is installed.
        """
        config = incremental.resolved(config)
        checks.check(config)
        target = devices.topology(topology)
        changes.check_layout(config, target)
        if compiled is None:
            compiled = target.platform == "tpu" and compiler.is_installed()
        if compiled:
            mesh = compiler.tpu_mesh(topology, **config.mesh)
        else:
            mesh = sharding.abstract_mesh(**config.mesh, num_devices=target.count)
        return cls.on_mesh(config, architecture, target.platform, mesh)

    @classmethod
    def on_mesh(cls, config, architecture: str, platform: str, mesh) -> "Program":
        """Returns the step on a mesh; a published architecture replaces checkpoints that do not exist."""
        base, assumptions = base_checkpoint(config, architecture)
        num_encoders, encoder_assumptions = num_own_encoders(config, base, mesh.shape["teacher"])
        trained, fixed = abstract_trained(config, base)
        state = student_lib.abstract_state(trained, student_lib.make_optimizers(config), config.ema_decay)
        state = sharding.abstract_arrays(state, sharding.state_specs(state, mesh), mesh)
        dtype, rows = jnp.dtype(config.dtype), config_lib.num_rows(config)
        teacher_config = definitions.teacher_config(config, base)
        teachers, encoders = teachers_lib.abstract_teachers(base, teacher_config, rows, num_encoders, mesh, dtype)
        encoders |= teachers_lib.described(fixed, mesh, dtype)
        arguments = Arguments(state, teachers, encoders, abstract_batch(config, base, mesh))
        return cls(config, base, mesh, platform, arguments, (*assumptions, *encoder_assumptions))

    @property
    def is_compiled(self) -> bool:
        """Returns whether a compiler knows the mesh's devices."""
        return isinstance(self.mesh, Mesh)

    def array_bytes(self) -> dict[str, float]:
        """Returns the bytes per device of the step's arguments and of its gradients, by kind."""
        return {kind: float(size) for kind, size in memory.array_bytes(*self.arguments).items()}

    def objective(self) -> distill_step.Objective:
        """Returns what the step minimises; the ids of an empty prompt are zeros."""
        num_tokens = self.arguments.batch["input_ids"].shape[-1]
        return definitions.define_objective(
            self.config, self.base, lambda texts: np.zeros((len(texts), num_tokens), int)
        )

    def lower(self) -> jax.stages.Lowered:
        """Lowers the step that `train` runs, with its packed state."""
        networks, _ = definitions.define_networks(self.config, self.base, self.platform)
        optimizers = student_lib.make_optimizers(self.config)
        state, teachers, *others = self.arguments
        packing = Packing(state, self.mesh)
        step = definitions.define_step(
            self.config, networks, self.objective(), optimizers, self.mesh, state, teachers, packing
        )
        return step.lower(jax.eval_shape(packing.pack, state), teachers, *others)

    def gradients(self, attention: str) -> tuple[Callable, tuple]:
        """Returns the function of losses and gradients, with an implementation of attention, and its arguments."""
        networks, _ = definitions.define_networks(self.config, self.base, attention=attention)
        state, *others = self.arguments
        trained = distill_step.trained(state)
        function = definitions.define_gradients(self.config, networks, self.objective(), self.mesh, trained)
        return function, (trained, *others, jax.ShapeDtypeStruct((), jnp.int32))

    def flops(self) -> float:
        """Returns the operations of a step's products and convolutions on one device, recomputation included."""
        return flops.of_step(self.config, self.base, self.objective(), self.mesh, *self.arguments)


def base_checkpoint(config, architecture: str) -> tuple[Checkpoint, tuple[str, ...]]:
    """Returns the base and assumptions; the architecture's published networks replace a base that does not exist."""
    if pathlib.Path(config.base).exists():
        return open_checkpoint(config.base), ()
    return published.checkpoint(architecture), (
        f"{config.base} is not there: its networks are taken for {architecture}'s",
    )


def num_own_encoders(config, base: Checkpoint, shards: int) -> tuple[int, tuple[str, ...]]:
    """Returns the number of text encoders that are teachers' own, over all shards of `teacher`, and assumptions."""
    paths = [pathlib.Path(path) for _, path in config.teachers]
    replayed = config_lib.num_rows(config) - len(paths)
    if all(path.exists() for path in paths) and pathlib.Path(config.base).exists():
        checkpoints = [*map(open_checkpoint, paths), *[base] * replayed]
        return len(teachers_lib.encoder_rows(base, checkpoints, shards)[1]), ()
    most = min(len(paths), (len(paths) + replayed) // shards)
    return most * shards, ("every teacher brings a text encoder of its own; equal ones would be held once",)


def abstract_trained(config, base: Checkpoint) -> tuple[dict, dict]:
    """Returns the shapes of the trained parameters, by network, and of the discriminator's fixed parameters."""
    student = abstract_params("unet", merged_config(base.unet_config, len(config_lib.style_names(config))))
    if not config.adversarial.weight:
        return {"student": student}, {}
    discriminator, fixed = definitions.abstract_discriminator(config, base)
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
    return sharding.abstract_arrays(shapes, jax.tree.map(lambda _: sharding.BATCH, shapes), mesh)
