"""The teachers on the mesh: frozen networks, stacked along a first axis that `teacher` divides.

A convolution runs network by network, so each device's T teachers keep their convolution kernels apart, in a tuple of T
arrays (shards of `teacher`, h, w, I, O): one array would be cut up at every step. All other parameters are one array
(N, ...) each. Checkpoints are memory-mapped and read shard by shard: the host never holds a second copy of a network.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dmm_jax.checkpoints.abstract import abstract_params
from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.models import layers
from dmm_jax.runtime import sharding


class Teachers(NamedTuple):
    """What the step needs of the frozen teachers; every leaf is divided along `teacher`."""

    unet: Any  # Parameters (N, ...), or a tuple of arrays for a convolution's kernel.
    text: Any  # Parameters of the teachers' own text encoders (shards of `teacher` x rows, ...), or None.
    encoder: jax.Array  # int32 (N,), the row of its shard in `text`; -1 for the base's encoders.
    styles: jax.Array  # int32 (N, 2), the first style of the student that it teaches, and how many.
    batch_row: jax.Array  # int32 (N,), the row of the batch that it is asked about.
    is_converted: Any = None  # bool (N,), whether it predicts the other type than the student; None if no teacher does.


class Frozen(NamedTuple):
    """What every device holds whole and nothing trains."""

    text_encoders: dict  # Parameters of the base's text encoders, by name.
    backbone: Any = None  # Parameters of the discriminator's backbone, if only its head is trained.
    student: Any = None  # Parameters of the student's UNet under its factors, if it trains as a LoRA.


@dataclasses.dataclass(frozen=True)
class BatchRow:
    """One row of the batch: its teacher, and the styles of the student that it teaches."""

    name: str
    teacher: Checkpoint  # A stock checkpoint; or a merged student, whose styles are the student's first ones.
    first_style: int
    num_styles: int = 1


def missing_text_encoders(base: Checkpoint, teachers: Mapping[str, Checkpoint]) -> list[str]:
    """Returns a sentence for each teacher that lacks text encoders and uses the base's."""
    lines = []
    for name, teacher in teachers.items():
        missing = [it for it in base.text_encoders if not teacher.has(it) or it in teacher.from_base]
        if missing:
            lines.append(f"Teacher {name!r} has no {' and no '.join(missing)}: it uses the base's.")
    return lines


def put_teachers(
    base: Checkpoint,
    rows: Sequence[BatchRow],
    unet_config: Mapping,
    mesh: Mesh,
    dtype,
    prediction_type: str = "",
    first_row: int = 0,
    memory_kind: str | None = None,
) -> Teachers:
    """Loads the teachers of rows of the batch onto the mesh.

    Args:
      unet_config: the config of the UNet that runs all teachers: the base's, with a style table if a teacher is a
        merged student. A teacher without that table gets zeros, which add nothing to the time embedding.
      prediction_type: what the student predicts; "": nothing is converted, since all teachers predict the same.
      first_row: the number of the first of these rows in the batch.
      memory_kind: JAX's name of the memory for the networks; None: the devices' own.
    """
    shapes = abstract_params("unet", unet_config)

    def zeros(name):
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes[name])

    unets = [row.teacher.params("unet") for row in rows]
    unets = [{name: unet[name] if name in unet else zeros(name) for name in shapes} for unet in unets]

    def put(path, leaf, *leaves):
        stack = partial(_put_stack, path, mesh=mesh, dtype=dtype, memory_kind=memory_kind)
        return for_each_stack(lambda part: stack(leaves[part]), path, leaf, len(leaves), mesh)

    encoder, owners = encoder_rows(base, [row.teacher for row in rows], mesh.shape["teacher"])
    text = None
    if owners:
        params = [owner.text_params(base) for owner in owners]
        text = jax.tree.map_with_path(lambda path, *leaves: _put_stack(path, leaves, mesh, dtype, memory_kind), *params)
    numbers = {
        "encoder": np.array(encoder, np.int32),
        "styles": np.array([(row.first_style, row.num_styles) for row in rows], np.int32),
        "batch_row": np.arange(first_row, first_row + len(rows), dtype=np.int32),
    }
    if prediction_type:
        types = [row.teacher.prediction_beside(base) for row in rows]
        numbers["is_converted"] = np.array([kind != prediction_type for kind in types])
    numbers = sharding.put_global(numbers, mesh, sharding.TEACHERS)
    return Teachers(jax.tree.map_with_path(put, shapes, *unets), text, **numbers)


def put_text_encoders(base: Checkpoint, mesh: Mesh, dtype) -> Frozen:
    """Copies the base's text encoders to every device."""
    return Frozen(put_params(base.text_params(), mesh, dtype))


def abstract_teachers(
    base: Checkpoint, unet_config: Mapping, num_teachers: int, num_encoders: int, mesh, dtype
) -> tuple[Teachers, Frozen]:
    """Returns the shapes and shardings of what `put_teachers` loads; nothing is allocated.

    Args:
      num_encoders: rows of the teachers' own text encoders, over all shards.
    """

    def describe(path, leaf):
        def stack(part):
            return _described(path, leaf, mesh, dtype, sharding.TEACHERS, (len(range(num_teachers)[part]),))

        return for_each_stack(stack, path, leaf, num_teachers, mesh)

    def numbers(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, sharding.TEACHERS))

    texts = {name: base.abstract(name) for name in base.text_encoders}
    return Teachers(
        unet=jax.tree.map_with_path(describe, abstract_params("unet", unet_config)),
        text=described(texts, mesh, dtype, sharding.TEACHERS, (num_encoders,)) if num_encoders else None,
        encoder=numbers(num_teachers),
        styles=numbers(num_teachers, 2),
        batch_row=numbers(num_teachers),
    ), Frozen(described(texts, mesh, dtype))


def for_each_stack(make: Callable[[slice], Any], path, leaf, num_teachers: int, mesh: Mesh | AbstractMesh):
    """Returns `make(rows)` for each array that holds one parameter of the teachers: one array, or a tuple of them.

    Args:
      make: gets the rows, of all teachers in their order, that the array holds.
      path, leaf: the parameter in one network; only the leaf's shape is read.
    """
    if path[-1].key != "kernel" or len(leaf.shape) != 4 or leaf.shape[:2] == (1, 1):
        return make(slice(None))
    per_device = num_teachers // mesh.shape["teacher"]
    return tuple(make(slice(row, None, per_device)) for row in range(per_device))


def stacked(unets):
    """Returns one device's part of the teachers' parameters, each as one array (T, ...); inside shard_map."""
    return jax.tree.map(
        lambda leaf: jnp.concatenate(leaf) if isinstance(leaf, tuple) else leaf,
        unets,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )


def described(params: Mapping, mesh, dtype, spec: P = sharding.COPY, leading: tuple[int, ...] = ()):
    """Returns the shapes and shardings of frozen parameters on the mesh; nothing is allocated."""
    return jax.tree.map_with_path(lambda path, leaf: _described(path, leaf, mesh, dtype, spec, leading), params)


def _described(path, leaf, mesh, dtype, spec, leading):
    placed = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct((*leading, *leaf.shape), layers.stored_dtype(path, dtype), sharding=placed)


def encoder_rows(base: Checkpoint, teachers: Sequence[Checkpoint], shards: int) -> tuple[list[int], list[Checkpoint]]:
    """Finds equal text encoders, by content, among the teachers of each shard of the mesh axis `teacher`.

    A teacher's encoders are the one or two of its family; it uses the base's for those that it lacks.

    Returns:
      For each teacher the row of its shard that holds its encoders, -1 for the base's. For each row of each shard the
      checkpoint that owns the encoders: all shards have as many rows as the one that needs most, and unused rows hold
      any.
    """
    rows, owners_by_shard = [], []
    for shard in np.split(np.arange(len(teachers)), shards):
        row_of_digest, owners = {base.text_digest(): -1}, []
        for teacher in (teachers[number] for number in shard):
            digest = teacher.text_digest(base)
            if digest not in row_of_digest:
                row_of_digest[digest] = len(owners)
                owners.append(teacher)
            rows.append(row_of_digest[digest])
        owners_by_shard.append(owners)
    num_rows = max(map(len, owners_by_shard))
    filler = [owner for owners in owners_by_shard for owner in owners][:1]
    return rows, [owner for owners in owners_by_shard for owner in (owners + filler * num_rows)[:num_rows]]


def put_params(params: Mapping, mesh: Mesh, dtype):
    """Copies one network's host parameters to every device, kernels in `dtype`, the rest in float32."""

    def put(path, leaf):
        return sharding.make_array(leaf.shape, layers.stored_dtype(path, dtype), mesh, sharding.COPY, leaf.__getitem__)

    return jax.tree.map_with_path(put, params)


def _put_stack(path, leaves, mesh, dtype, memory_kind):
    """Stacks equal parameters along a first axis that `teacher` divides; reads only what each device needs."""
    dtype = layers.stored_dtype(path, dtype)

    def read(index):
        rows = range(len(leaves))[index[0]]
        return np.stack([np.asarray(leaves[row][index[1:]], dtype) for row in rows])

    shape = len(leaves), *leaves[0].shape
    return sharding.make_array(shape, dtype, mesh, sharding.TEACHERS, read, memory_kind)
