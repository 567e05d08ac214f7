"""The mesh of devices, and the rule that places every array on it.

| array                                             | teacher | data | fsdp |
|---------------------------------------------------|---------|------|------|
| batch, validation inputs [N, B/N, ...]            | N       | B/N  | B/N  |
| teachers: UNets, own text encoders, styles [N, .] | N       | copy | copy |
| text encoders of the base                         | copy    | copy | copy |
| frozen: discriminator's backbone, UNet of a LoRA  | copy    | copy | copy |
| student, discriminator, moments, average          | part    | part | part |
| vector of their small arrays (distill/layout.py)  | copy    | copy | copy |
| counters                                          | copy    | copy | copy |
| losses of all teachers [N], gradient norm         | copy    | copy | copy |

N and B/N name the divided dimension. `parameter_spec` chooses the dimensions of a part: on every mesh, each device
updates only its own part of the state (Xu et al., arXiv:2004.13336; ZeRO, arXiv:1910.02054). The docstring of
`distill.step.build_gradients` describes how the axes differ. With `config.teachers_in_host_memory`, whose mesh has no
`teacher` axis, every device holds one teacher at a time.
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

SMALLEST_SHARDED = 1024  # Elements. For smaller arrays, a collective costs more than the memory that it saves.


def make_mesh(teacher: int = 1, data: int = 0, fsdp: int = 1, devices=None) -> Mesh:
    """Arranges the devices as (teacher, data, fsdp); `data=0` takes all remaining devices.

    Devices are sorted by TPU slice, so that `teacher` and `data` cross the slow network between slices: once per step,
    with the student and the sums of its gradients, divided by `fsdp`. `fsdp` gathers the student in every micro-batch
    and stays within a slice.

    Raises:
      UserError: the axes do not use all devices, or `fsdp` would cross slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(teacher, data, fsdp, len(devices))
    slices = collections.Counter(map(_slice, devices))
    if any(size % fsdp for size in slices.values()):
        sizes = ", ".join(map(str, slices.values()))
        raise UserError(
            f"mesh.fsdp={fsdp} would cross TPU slices, of {sizes} devices: it gathers the student several times per "
            f"step, too much for the network between them. Use a divisor of {math.gcd(*slices.values())}."
        )
    return Mesh(np.asarray(sorted(devices, key=_slice)).reshape(tuple(shape.values())), AXES)


def _slice(device) -> int:
    """Returns the number of a device's TPU slice; devices of other platforms are in slice 0."""
    return getattr(device, "slice_index", 0) if device.platform == "tpu" else 0


def abstract_mesh(teacher: int = 1, data: int = 0, fsdp: int = 1, *, num_devices: int) -> AbstractMesh:
    """Returns the mesh that `make_mesh` makes of `num_devices` devices, without devices; raises the same errors."""
    return AbstractMesh(tuple(mesh_shape(teacher, data, fsdp, num_devices).values()), AXES)


def mesh_shape(teacher: int, data: int, fsdp: int, num_devices: int) -> dict[str, int]:
    """Returns the number of devices along each axis; `data=0` takes all remaining devices.

    Raises:
      UserError: an axis is too small, or the axes do not use all devices.
    """
    if teacher < 1 or data < 0 or fsdp < 1:
        raise UserError(
            "a mesh needs teacher >= 1, data >= 0 (0: all remaining devices) and fsdp >= 1; "
            f"got teacher={teacher}, data={data}, fsdp={fsdp}."
        )
    data = data or max(num_devices // (teacher * fsdp), 1)
    if teacher * data * fsdp != num_devices:
        possible = max(size for size in range(1, teacher + 1) if num_devices % size == 0 and teacher % size == 0)
        raise UserError(
            f"mesh teacher={teacher} x data={data} x fsdp={fsdp} needs {teacher * data * fsdp} devices; "
            f"there are {num_devices}. Set config.mesh so that the product is {num_devices}, for example "
            f"teacher={possible}, data={num_devices // possible}, fsdp=1."
        )
    return dict(zip(AXES, (teacher, data, fsdp), strict=True))


def parameter_spec(shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """Divides an array among all devices, each axis along the first dimension that it divides; vectors are copied.

    An axis that divides no dimension gets copies. A dimension that two axes divide is divided along `fsdp` first.
    """
    if len(shape) < 2 or math.prod(shape) < SMALLEST_SHARDED:
        return COPY
    sizes, names = list(shape), [()] * len(shape)
    for axis in (axis for axis in reversed(AXES) if mesh.shape[axis] > 1):
        # The first dimension: if the last one is divided, the TPU's compiler gives every device the whole sum of the
        # gradients (docs/log.md).
        dim = next((dim for dim, size in enumerate(sizes) if size % mesh.shape[axis] == 0), None)
        if dim is not None:
            sizes[dim] //= mesh.shape[axis]
            names[dim] += (axis,)
    return P(*(axes if len(axes) > 1 else "".join(axes) or None for axes in names)) if any(names) else COPY


def divided_dims(spec: P) -> dict[str, int]:
    """Returns the dimension that each axis of a spec divides."""
    axes_of = ((entry,) if isinstance(entry, str) else entry or () for entry in spec)
    return {axis: dim for dim, axes in enumerate(axes_of) for axis in axes}


def shardings(mesh: Mesh | AbstractMesh, specs):
    """Returns the shardings on the mesh for a tree of specs."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, P))


def abstract_arrays(shapes, specs, mesh: Mesh | AbstractMesh):
    """Returns a tree of shapes with the shardings for `specs`; allocates nothing."""

    def abstract_array(leaf, spec):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(abstract_array, shapes, specs)


def batch_share(mesh: Mesh, num_teachers: int, per_teacher: int, process_index: int | None = None):
    """Returns the rows (teachers) and columns of a batch [N, B/N, ...] that the devices of one process hold.

    Raises:
      UserError: they are not a rectangle, so that two processes would read the same sample.
    """
    process_index = jax.process_index() if process_index is None else process_index
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices).reshape(mesh.shape["teacher"], -1)
    is_own = owners == process_index  # (slices of teachers, slices of columns)
    slices = np.flatnonzero(is_own.any(1)), np.flatnonzero(is_own.any(0))
    if not is_own[np.ix_(*slices)].all():
        raise UserError(
            f"mesh teacher={mesh.shape['teacher']} x data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']} gives "
            f"process {process_index} devices that are not a rectangle of teachers x columns. "
            f"Choose data x fsdp as a multiple or a divisor of the {is_own.sum()} devices of a process."
        )
    sizes = num_teachers // owners.shape[0], per_teacher // owners.shape[1]
    return tuple((places[:, None] * size + np.arange(size)).ravel() for places, size in zip(slices, sizes, strict=True))


def put(tree, mesh: Mesh, spec: P):
    """Puts each process's part of the arrays on the mesh, every leaf at `spec`; `batch_share` names a batch's part."""
    sharding = NamedSharding(mesh, spec)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), tree)


def put_global(tree, mesh: Mesh, spec: P):
    """Puts host arrays that every process has in full on the mesh, every leaf at `spec`."""
    return jax.tree.map(lambda leaf: make_array(leaf.shape, leaf.dtype, mesh, spec, leaf.__getitem__), tree)


def make_array(
    shape: tuple[int, ...], dtype, mesh: Mesh, spec: P, read: Callable, memory_kind: str | None = None
) -> jax.Array:
    """Builds an array from the parts that this process's devices need: `read(index)` returns one part at a time.

    Args:
      memory_kind: JAX's name of the memory that holds it; None: the devices' own.
    """
    sharding = NamedSharding(mesh, spec, memory_kind=memory_kind)
    return jax.make_array_from_callback(shape, sharding, lambda index: np.asarray(read(index), dtype=dtype))


def on_each_device(tree):
    """Copies arrays to each of this process's devices, as parameters for batches that `spread` divides."""
    return jax.device_put(tree, NamedSharding(_local_mesh(), COPY))


def spread(tree):
    """Divides batches along their first axis among this process's devices, or copies them if it does not divide."""
    mesh = _local_mesh()

    def put_leaf(leaf):
        divides = leaf.shape[0] % mesh.size == 0
        return jax.device_put(leaf, NamedSharding(mesh, P("batch") if divides else COPY))

    return jax.tree.map(put_leaf, tree)


def in_parts(function: Callable, rows_per_device: int, *batches):
    """Returns `function(*batches)`, computed part by part: the memory does not grow with the batch.

    Args:
      function: maps batches (B, ...), which are spread, to a tree of arrays (B, ...), each row independently.
      rows_per_device: at most. All parts have the same size, the last one is padded: one compiled program is enough.
    """
    num_rows, num_devices = len(batches[0]), _local_mesh().size
    num_parts = -(-num_rows // (rows_per_device * num_devices))
    if num_parts == 1:
        return function(*spread(batches))
    size = -(-num_rows // (num_parts * num_devices)) * num_devices
    rows = np.minimum(np.arange(num_parts * size), num_rows - 1).reshape(num_parts, size)
    parts = [function(*spread([batch[part] for batch in batches])) for part in rows]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[:num_rows], *parts)


def _local_mesh() -> Mesh:
    return Mesh(np.asarray(jax.local_devices()), ("batch",))
