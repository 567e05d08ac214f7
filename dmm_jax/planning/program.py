"""The training step of a config as a program of shapes, on a mesh whose devices need not exist."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import AbstractMesh, Mesh

from dmm_jax.checkpoints import published
from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.config import checks
from dmm_jax.config.options import num_rows
from dmm_jax.data.batches import Batch
from dmm_jax.data.buckets import LEAST_AREA
from dmm_jax.distill import incremental, streaming
from dmm_jax.distill import teachers as teachers_lib
from dmm_jax.distill.definition import Definition
from dmm_jax.distill.layout import Packing
from dmm_jax.distill.state import TrainState
from dmm_jax.distill.streaming import StreamedStep
from dmm_jax.distill.teachers import Frozen, Teachers
from dmm_jax.planning import changes, compiler, devices, flops, memory
from dmm_jax.runtime import sharding


class Arguments(NamedTuple):
    """The step's arguments: trees of shapes with shardings."""

    state: TrainState
    teachers: Teachers
    frozen: Frozen
    batch: Batch


@dataclasses.dataclass(frozen=True)
class Program:
    """The step of a definition, with shapes instead of arrays."""

    definition: Definition
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
        if config.teachers_in_host_memory:
            num_encoders = min(num_encoders, 1)
        definition = Definition(config, base, mesh, platform=platform)
        frozen = definition.abstract_frozen(num_encoders)
        arguments = Arguments(definition.abstract_state(), *frozen, definition.abstract_batch())
        if config.data.max_aspect_ratio > 1.0:
            assumptions += (f"all images are square; other buckets have {LEAST_AREA:.0%} to 100 % of the pixels",)
        return cls(definition, platform, arguments, (*assumptions, *encoder_assumptions))

    @property
    def config(self) -> ml_collections.ConfigDict:
        """Returns the config of the run."""
        return self.definition.config

    @property
    def mesh(self) -> Mesh | AbstractMesh:
        """Returns the mesh of the topology."""
        return self.definition.mesh

    @property
    def is_compiled(self) -> bool:
        """Returns whether a compiler knows the mesh's devices."""
        return isinstance(self.mesh, Mesh)

    def array_bytes(self) -> dict[str, float]:
        """Returns the bytes per device of the step's arguments and of its gradients, by kind."""
        return {kind: float(size) for kind, size in memory.array_bytes(*self.arguments).items()}

    @property
    def is_streamed(self) -> bool:
        """Returns whether teachers are brought to the device one after another; `arguments` has one of them."""
        return self.config.teachers_in_host_memory

    def lower(self) -> jax.stages.Lowered | StreamedStep:
        """Lowers the step that `train` runs, with its packed state."""
        state, teachers, *others = self.arguments
        packing = Packing(state, self.mesh)
        packed = jax.eval_shape(packing.pack, state)
        if self.is_streamed:
            return self.definition.streamed_step(packing).lower(packed, teachers, *others, num_rows(self.config))
        return self.definition.jitted_step(state, teachers, packing).lower(packed, teachers, *others)

    def gradients(self, attention: str) -> tuple[Callable, tuple]:
        """Returns the function of losses and gradients, with an implementation of attention, and its arguments.

        With streamed teachers it computes one row of the batch, given the teacher's predictions.
        """
        state, teachers, frozen, batch = self.arguments
        function = self.definition.with_attention(attention).gradients(state.trained)
        step = jax.ShapeDtypeStruct((), jnp.int32)
        if not self.is_streamed:
            return function, (state.trained, teachers, frozen, batch, step)
        row = teachers._replace(unet=None, text=None)
        predict, arguments = self.predictions(attention)
        asked = jax.eval_shape(predict, *arguments)
        return function, (state.trained, row, frozen, streaming.row_shapes(batch), step, asked)

    def predictions(self, attention: str) -> tuple[Callable, tuple]:
        """Returns the function of a streamed teacher's predictions of its row, and its arguments."""
        _, teachers, frozen, batch = self.arguments
        arguments = teachers, frozen, streaming.row_shapes(batch), jax.ShapeDtypeStruct((), jnp.int32)
        return self.definition.with_attention(attention).predictions(), arguments

    def flops(self) -> float:
        """Returns the operations of a step's products and convolutions on one device, recomputation included."""
        return flops.of_step(self.definition, *self.arguments)

    def flops_of_teachers(self) -> float:
        """Returns the part of `flops` during which no streamed teacher travels; 0 without streaming."""
        return flops.of_streamed_teachers(self.definition, *self.arguments[1:]) if self.is_streamed else 0.0


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
    replayed = num_rows(config) - len(paths)
    if all(path.exists() for path in paths) and pathlib.Path(config.base).exists():
        checkpoints = [*map(open_checkpoint, paths), *[base] * replayed]
        return len(teachers_lib.encoder_rows(base, checkpoints, shards)[1]), ()
    most = min(len(paths), (len(paths) + replayed) // shards)
    return most * shards, ("every teacher brings a text encoder of its own; equal ones would be held once",)
