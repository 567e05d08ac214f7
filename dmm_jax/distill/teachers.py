"""Teachers on the mesh: their UNets stacked along `teacher`, and beside them text encoders that differ from the base's.

Dense layers of several teachers are batched products, which read a stack as it lies. A convolution reads one teacher's
kernel, and would have it copied out of a stack at every step: so each of a device's T teachers has its own, in a tuple
of T arrays (shards of `teacher`, h, w, I, O).

Checkpoints are memory-mapped and read shard by shard, so the host never holds a second copy of a network.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dmm_jax.checkpoints.abstract import abstract_params
from dmm_jax.checkpoints.open import Checkpoint
from dmm_jax.models import layers
from dmm_jax.runtime import sharding


def lent_by_base(base: Checkpoint, teachers: Mapping[str, Checkpoint]) -> list[str]:
    """Returns a sentence for each teacher that lacks text encoders and is asked behind the base's."""
    lines = []
    for name, teacher in teachers.items():
        lacks = [encoder for encoder in base.text_encoders if not teacher.has(encoder) or encoder in teacher.borrowed]
        if lacks:
            lines.append(f"Teacher {name!r} has no {' and no '.join(lacks)}: the base's is used.")
    return lines


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What one row of the batch is taught: by whom, and which styles of the student's."""

    name: str
    teacher: Checkpoint  # Stock; or a merged student, whose first rows are the student's own.
    first_style: int
    num_styles: int = 1


def put_teachers(
    base: Checkpoint, lessons: Sequence[Lesson], unet_config: Mapping, mesh: Mesh, dtype
) -> tuple[dict, dict]:
    """Loads what the step needs of the frozen networks.

    Args:
      unet_config: of the UNet that runs the teachers': the base's; with a style table where one is a merged student.

    Returns:
      teachers: {"unet": parameters (T, ...), a tuple for a convolution's kernel; "text": of the teachers' own text
        encoders (shards of `teacher` x rows, ...), or None; "encoder": (T,) int32, which row of its shard, -1 for the
        base's; "styles": (T, 2) int32, the first style and how many}. A style table that a teacher lacks adds nothing.
      encoders: {"base": parameters of the base's text encoders}.
    """
    teachers = [lesson.teacher for lesson in lessons]
    shapes = abstract_params("unet", unet_config)
    unets = [_with_table(teacher.params("unet"), shapes) for teacher in teachers]

    def put(path, leaf, *leaves):
        return for_each_stack(lambda rows: _put_stack(path, leaves[rows], mesh, dtype), path, leaf, len(leaves), mesh)

    unets = jax.tree.map_with_path(put, shapes, *unets)
    rows, own = encoder_rows(base, teachers, mesh.shape["teacher"])
    text = [teacher.text_params(base) for teacher in own]
    text = jax.tree.map_with_path(lambda path, *leaves: _put_stack(path, leaves, mesh, dtype), *text) if text else None
    numbers = {"encoder": rows, "styles": [(lesson.first_style, lesson.num_styles) for lesson in lessons]}
    numbers = {name: np.asarray(value, np.int32) for name, value in numbers.items()}
    numbers = sharding.put_global(numbers, mesh, sharding.TEACHERS)
    return {"unet": unets, "text": text} | numbers, {"base": put_params(base.text_params(), mesh, dtype)}


def _with_table(params, shapes):
    """Adds the style table and its MLP that a stock UNet lacks, all zeros: it adds nothing to the time embedding."""
    return {name: params[name] if name in params else _zeros(shapes[name]) for name in shapes}


def _zeros(shapes):
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)


def abstract_teachers(
    base: Checkpoint, unet_config: Mapping, num_teachers: int, num_encoders: int, mesh, dtype
) -> tuple[dict, dict]:
    """Returns the shapes and shardings of what `put_teachers` loads; nothing is allocated.

    Args:
      unet_config: of the UNet that runs the teachers'.
      num_encoders: rows of their own text encoders, of all shards.
    """

    numbers = {
        name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, sharding.TEACHERS))
        for name, shape in (("encoder", (num_teachers,)), ("styles", (num_teachers, 2)))
    }

    def describe(path, leaf):
        def one(rows):
            number = len(range(num_teachers)[rows])
            return _described(path, leaf, mesh, dtype, sharding.TEACHERS, (number,))

        return for_each_stack(one, path, leaf, num_teachers, mesh)

    unets = jax.tree.map_with_path(describe, abstract_params("unet", unet_config))
    texts = {name: base.abstract(name) for name in base.text_encoders}
    text = described(texts, mesh, dtype, sharding.TEACHERS, (num_encoders,)) if num_encoders else None
    return {"unet": unets, "text": text} | numbers, {"base": described(texts, mesh, dtype)}


def for_each_stack(make: Callable[[slice], Any], path, leaf, num_teachers: int, mesh: Mesh | AbstractMesh):
    """Returns `make(rows)` of the teachers' parameters that lie in one array: of all, or a tuple for a convolution's.

    Args:
      path, leaf: of the parameter in one network; the leaf's shape is asked for.
      make: given which rows of all teachers, in their order, the array is to hold.
    """
    if path[-1].key != "kernel" or len(leaf.shape) != 4 or leaf.shape[:2] == (1, 1):
        return make(slice(None))
    on_device = num_teachers // mesh.shape["teacher"]
    return tuple(make(slice(row, None, on_device)) for row in range(on_device))


def stacked(unets):
    """Returns one device's part of the teachers' parameters, all as stacks (T, ...); inside shard_map."""
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
    """Finds equal text encoders, by content, among the teachers of each shard.

    A teacher's are the one or two of its family; those that it lacks are the base's.

    Returns:
      For each teacher the row of its shard that holds its encoders, -1 where they are the base's; and for each row of
      each shard a checkpoint. All shards have the rows of the one that needs most; those left over hold any.
    """
    rows, found = [], []
    for shard in np.split(np.arange(len(teachers)), shards):
        seen, own = {base.text_digest(): -1}, []
        for teacher in (teachers[number] for number in shard):
            digest = teacher.text_digest(base)
            if digest not in seen:
                seen[digest] = len(own)
                own.append(teacher)
            rows.append(seen[digest])
        found.append(own)
    most = max(map(len, found))
    any_one = [teacher for own in found for teacher in own][:1]
    return rows, [teacher for own in found for teacher in (own + any_one * most)[:most]]


def put_params(params: Mapping, mesh: Mesh, dtype):
    """Hands one network's host parameters to every device, kernels in `dtype`, the rest in float32."""

    def one(path, leaf):
        kept = layers.stored_dtype(path, dtype)
        return sharding.make_array(leaf.shape, kept, mesh, sharding.COPY, lambda index: leaf[index])

    return jax.tree.map_with_path(one, params)


def _put_stack(path, leaves, mesh, dtype):
    """Stacks equal parameters along a new first axis, divided along `teacher`; reads only what each device needs."""

    def read(index):
        rows = range(len(leaves))[index[0]]
        return np.stack([np.asarray(leaves[row][index[1:]], layers.stored_dtype(path, dtype)) for row in rows])

    return sharding.make_array(
        (len(leaves), *leaves[0].shape), layers.stored_dtype(path, dtype), mesh, sharding.TEACHERS, read
    )
