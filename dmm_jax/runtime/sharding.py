"""The mesh, and the one rule that says which array lives where.

| array                                             | teacher | data | fsdp |
|---------------------------------------------------|---------|------|------|
| batch, validation inputs [N, B/N, ...]            | N       | B/N  | B/N  |
| teachers: UNets, own text encoders, styles [N, .] | N       | copy | copy |
| text encoders of the base                         | copy    | copy | copy |
| frozen backbone of a discriminator                | copy    | copy | copy |
| student, discriminator, moments, average          | part    | part | part |
| vector of all that is small of these (packed)     | copy    | copy | copy |
| counters                                          | copy    | copy | copy |
| losses of all teachers [N], gradient norm         | copy    | copy | copy |

A part is of the dimensions that `parameter_spec` chooses: whatever the mesh, each device updates its own part of the
state alone (Xu et al., arXiv:2004.13336; ZeRO, arXiv:1910.02054). How axes differ: `distill.step.build_loss_and_grads`.
"""

import collections
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dmm_jax.runtime.errors import UserError

AXES = ("teacher", "data", "fsdp")
BATCH = P("teacher", ("data", "fsdp"))
TEACHERS = P("teacher")
COPY = P()

SMALLEST_SHARDED = 1024  # Elements: below, a collective costs more than the memory it saves.


def make_mesh(teacher: int = 1, data: int = 0, fsdp: int = 1, devices=None) -> Mesh:
    """Lays the devices out as (teacher, data, fsdp); `data=0` takes all that are left.

    TPU slices come one after the other, so that over the network between them go `teacher` and `data` alone: the
    student and the sums of its gradients, once a step, of which `fsdp` leaves each device a part. `fsdp` itself gathers
    the student in every micro-batch, and stays within a slice.

    Raises:
      ValueError: the axes do not use exactly the devices that there are, or `fsdp` would lie across slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(teacher, data, fsdp, len(devices))
    slices = collections.Counter(map(_slice, devices))
    if any(size % fsdp for size in slices.values()):
        sizes = ", ".join(map(str, slices.values()))
        raise UserError(
            f"mesh.fsdp={fsdp} would lie across TPU slices, of {sizes} devices: it gathers the student several times a "
            f"step, too much for the network between them. Use a divisor of {math.gcd(*slices.values())}."
        )
    return Mesh(np.asarray(sorted(devices, key=_slice)).reshape(tuple(shape.values())), AXES)


def _slice(device) -> int:
    """Returns the number of the TPU slice that a device belongs to; there is one where devices are no TPUs."""
    return getattr(device, "slice_index", 0) if device.platform == "tpu" else 0


def abstract_mesh(teacher: int = 1, data: int = 0, fsdp: int = 1, *, num_devices: int) -> AbstractMesh:
    """Returns the mesh that `make_mesh` would make of so many devices, without any; raises as it does."""
    return AbstractMesh(tuple(mesh_shape(teacher, data, fsdp, num_devices).values()), AXES)


def mesh_shape(teacher: int, data: int, fsdp: int, num_devices: int) -> dict[str, int]:
    """Returns the devices along each axis; `data=0` takes all that are left.

    Raises:
      ValueError: an axis is too small, or the axes do not use exactly the devices that there are.
    """
    if teacher < 1 or data < 0 or fsdp < 1:
        raise UserError(
            "a mesh needs teacher >= 1, data >= 0 (0: all the devices that are left) and fsdp >= 1; "
            f"got teacher={teacher}, data={data}, fsdp={fsdp}."
        )
    data = data or max(num_devices // (teacher * fsdp), 1)
    if teacher * data * fsdp != num_devices:
        nearest = max(size for size in range(1, teacher + 1) if num_devices % size == 0 and teacher % size == 0)
        raise UserError(
            f"mesh teacher={teacher} x data={data} x fsdp={fsdp} wants {teacher * data * fsdp} devices; "
            f"there are {num_devices}. Set config.mesh so that the product is {num_devices}, for example "
            f"teacher={nearest}, data={num_devices // nearest}, fsdp=1."
        )
    return dict(zip(AXES, (teacher, data, fsdp), strict=True))


def parameter_spec(shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """Divides an array among all devices, each axis along the first dimension that it divides; vectors are copied.

    An axis that divides no dimension holds copies. A dimension divided twice is divided along `fsdp` first. The first,
    since of sums whose last dimension is divided the TPU's compiler gives every device the whole (docs/log.md).
    """
    if len(shape) < 2 or math.prod(shape) < SMALLEST_SHARDED:
        return COPY
    left, names = list(shape), [()] * len(shape)
    for axis in (axis for axis in reversed(AXES) if mesh.shape[axis] > 1):
        dim = next((dim for dim, size in enumerate(left) if size % mesh.shape[axis] == 0), None)
        if dim is not None:
            left[dim] //= mesh.shape[axis]
            names[dim] += (axis,)
    return P(*(found if len(found) > 1 else "".join(found) or None for found in names)) if any(names) else COPY


def divided_dims(spec: P) -> dict[str, int]:
    """Returns the dimension that each axis of a spec divides."""
    named = ((entry,) if isinstance(entry, str) else entry or () for entry in spec)
    return {axis: dim for dim, entry in enumerate(named) for axis in entry}


def state_specs(state, mesh: Mesh | AbstractMesh):
    """Returns the specs of a tree of arrays or shapes that lives as the student does."""
    return jax.tree.map(lambda leaf: parameter_spec(leaf.shape, mesh), state)


def shardings(mesh: Mesh | AbstractMesh, specs):
    """Returns the shardings that put a tree's leaves at `specs`."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, P))


def batch_share(mesh: Mesh, num_teachers: int, per_teacher: int, process_index: int | None = None):
    """Returns the rows (teachers) and columns of a batch [N, B/N, ...] that lie on one process's devices.

    Raises:
      ValueError: they are no rectangle, so a sample would be read by two processes.
    """
    process_index = jax.process_index() if process_index is None else process_index
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices).reshape(mesh.shape["teacher"], -1)
    ours = owners == process_index  # (slices of teachers, slices of columns)
    slices = np.flatnonzero(ours.any(1)), np.flatnonzero(ours.any(0))
    if not ours[np.ix_(*slices)].all():
        raise UserError(
            f"mesh teacher={mesh.shape['teacher']} x data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']} gives "
            f"process {process_index} devices that are no rectangle of teachers x columns. "
            f"Choose data x fsdp as a multiple or a divisor of the {ours.sum()} devices of a process."
        )
    sizes = num_teachers // owners.shape[0], per_teacher // owners.shape[1]
    return tuple((places[:, None] * size + np.arange(size)).ravel() for places, size in zip(slices, sizes, strict=True))


def abstract_arrays(shapes, specs, mesh: Mesh | AbstractMesh):
    """Returns a tree of shapes with the shardings that put its leaves at `specs`; nothing is allocated."""

    def one(leaf, spec):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(one, shapes, specs)


def put(tree, mesh: Mesh, spec: P):
    """Hands each process's own part to the mesh (of a batch: what `batch_share` names), every leaf at `spec`."""
    sharding = NamedSharding(mesh, spec)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), tree)


def put_global(tree, mesh: Mesh, spec: P):
    """Hands host arrays that every process holds to the mesh, every leaf at `spec`."""
    return jax.tree.map(lambda leaf: make_array(leaf.shape, leaf.dtype, mesh, spec, leaf.__getitem__), tree)


def on_each_device(tree):
    """Puts arrays whole on each of this process's devices, where a batch is to be divided among them by `spread`."""
    return jax.device_put(tree, NamedSharding(_own_devices(), COPY))


def spread(tree):
    """Divides batches along their first axis among this process's devices; what does not divide is whole on each."""
    mesh = _own_devices()

    def one(leaf):
        divides = leaf.shape[0] % mesh.size == 0
        return jax.device_put(leaf, NamedSharding(mesh, P("batch") if divides else COPY))

    return jax.tree.map(one, tree)


def in_parts(run: Callable, at_once: int, *batches) -> jax.Array:
    """Returns `run(*batches)`, computed part by part, so that the memory it takes does not grow with the batch.

    Args:
      run: maps batches (B, ...), which are spread, to an array (B, ...), each row by itself.
      at_once: rows on a device, at most. Parts are equal, the last one filled up: one compiled program serves all.
    """
    num_rows, num_devices = len(batches[0]), _own_devices().size
    num_parts = -(-num_rows // (at_once * num_devices))
    if num_parts == 1:
        return run(*spread(batches))
    size = -(-num_rows // (num_parts * num_devices)) * num_devices
    rows = np.minimum(np.arange(num_parts * size), num_rows - 1).reshape(num_parts, size)
    return jnp.concatenate([run(*spread([batch[part] for batch in batches])) for part in rows])[:num_rows]


def _own_devices() -> Mesh:
    return Mesh(np.asarray(jax.local_devices()), ("batch",))


def make_array(shape: tuple[int, ...], dtype, mesh: Mesh, spec: P, read) -> jax.Array:
    """Builds one array shard by shard: `read(index)` returns the part that a device needs, and nothing else is held."""
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(shape, sharding, lambda index: np.asarray(read(index), dtype=dtype))
