"""Teachers on the mesh: their UNets stacked along `teacher`, and the text encoders that differ from the base's.

Checkpoints are memory-mapped and read shard by shard, so the host never holds a second copy of a network.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dmm_jax import sharding
from dmm_jax.checkpoints.compare import merge_obstacles
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.open import Checkpoint


def check_mergeable(base: Checkpoint, teachers: Mapping[str, Checkpoint]) -> None:
    """Raises CheckpointError that names everything in which a teacher does not fit the base."""
    named = [(f"teacher {name!r} ({teacher.path})", teacher) for name, teacher in teachers.items()]
    problems = merge_obstacles(base, named)
    if problems:
        raise CheckpointError("These checkpoints cannot be merged:\n" + "\n".join(f"  - {line}" for line in problems))


def lent_by_base(base: Checkpoint, teachers: Mapping[str, Checkpoint]) -> list[str]:
    """Returns a sentence for each teacher that lacks text encoders and is asked behind the base's."""
    lines = []
    for name, teacher in teachers.items():
        lacks = [encoder for encoder in base.text_encoders if not teacher.has(encoder)]
        if lacks:
            lines.append(f"Teacher {name!r} has no {' and no '.join(lacks)}: the base's is used.")
    return lines


def put_teachers(base: Checkpoint, teachers: Sequence[Checkpoint], mesh: Mesh, dtype) -> tuple[dict, dict]:
    """Loads what the step needs of the frozen networks.

    Returns:
      teachers: {"unet": parameters (N, ...), "encoder": (N,) int32 row of `others`, -1 for the base's}.
      encoders: {"base": parameters, "others": parameters (K, ...) of the distinct other encoders, or None}.
    """
    unets = put_stacked([teacher.params("unet") for teacher in teachers], mesh, sharding.TEACHERS, dtype)
    rows, distinct = encoder_rows(base, teachers)
    others = [teacher.text_params(base) for teacher in distinct]
    encoders = {
        "base": put_params(base.text_params(), mesh, dtype),
        "others": put_stacked(others, mesh, sharding.COPY, dtype) if others else None,
    }
    rows = np.asarray(rows, np.int32)
    return {
        "unet": unets,
        "encoder": sharding.make(rows.shape, np.int32, mesh, sharding.TEACHERS, rows.__getitem__),
    }, encoders


def abstract_teachers(base: Checkpoint, num_teachers: int, num_encoders: int, mesh, dtype) -> tuple[dict, dict]:
    """Returns the shapes and shardings of what `put_teachers` loads: teachers like the base, nothing allocated.

    Args:
      num_encoders: distinct text encoders of the teachers besides the base's.
    """

    def described(params, spec, leading=()):
        def one(path, leaf):
            sharded = NamedSharding(mesh, spec)
            return jax.ShapeDtypeStruct((*leading, *leaf.shape), stored_dtype(path, dtype), sharding=sharded)

        return jax.tree.map_with_path(one, params)

    rows = jax.ShapeDtypeStruct((num_teachers,), jnp.int32, sharding=NamedSharding(mesh, sharding.TEACHERS))
    unets = described(base.abstract("unet"), sharding.TEACHERS, (num_teachers,))
    texts = {name: base.abstract(name) for name in base.text_encoders}
    others = described(texts, sharding.COPY, (num_encoders,)) if num_encoders else None
    return {"unet": unets, "encoder": rows}, {"base": described(texts, sharding.COPY), "others": others}


def encoder_rows(base: Checkpoint, teachers: Sequence[Checkpoint]) -> tuple[list[int], list[Checkpoint]]:
    """Finds equal text encoders, by content: a row per teacher (-1 is the base's), and one checkpoint per row.

    A teacher's are the one or two of its family; those that it lacks are the base's.
    """
    seen, rows, distinct = {base.text_digest(): -1}, [], []
    for teacher in teachers:
        digest = teacher.text_digest(base)
        if digest not in seen:
            seen[digest] = len(distinct)
            distinct.append(teacher)
        rows.append(seen[digest])
    return rows, distinct


def put_params(params: Mapping, mesh: Mesh, dtype):
    """Hands one network's host parameters to every device, kernels in `dtype`, the rest in float32."""

    def one(path, leaf):
        kept = stored_dtype(path, dtype)
        return sharding.make(leaf.shape, kept, mesh, sharding.COPY, lambda index: leaf[index])

    return jax.tree.map_with_path(one, params)


def put_stacked(networks: Sequence[Mapping], mesh: Mesh, spec: P, dtype):
    """Stacks equal networks along a new first axis placed at `spec`, reading only what each device needs."""

    def one(path, *leaves):
        def read(index):
            rows = range(len(leaves))[index[0]]
            return np.stack([np.asarray(leaves[row][index[1:]], stored_dtype(path, dtype)) for row in rows])

        return sharding.make((len(leaves), *leaves[0].shape), stored_dtype(path, dtype), mesh, spec, read)

    return jax.tree.map_with_path(one, *networks)


def stored_dtype(path, dtype):
    """Frozen kernels rest in the compute dtype; norms, biases and tables are small and stay float32."""
    return dtype if path[-1].key == "kernel" else jnp.float32
