"""The mesh: what it refuses, and that every layout of one batch gives the same step."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from dmm_jax import sharding

ROOT = pathlib.Path(__file__).parent.parent
MESHES = [(1, 1, 1), (8, 1, 1), (2, 2, 2), (4, 2, 1), (1, 1, 8)]
FLAGS = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"  # conftest.py's, and fake devices.
PROGRAM = """
import json, sys, functools
import jax, jax.numpy as jnp, numpy as np
from dmm_jax import sharding, train
from dmm_jax.config import load, from_json
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.data.cache import LatentCache
from dmm_jax.data.pipeline import batches
from dmm_jax.distill import discriminator, incremental, step as S, student, teachers
from dmm_jax.tokenizer import Tokenizers
config = from_json(open(sys.argv[1]).read())
base = open_checkpoint(config.base)
lessons = incremental.lessons({name: open_checkpoint(path) for name, path in config.teachers}, None, 0)
described = train.discriminator_arguments(config, base)
host = batches(LatentCache(config.data.cache), 0, 8, 64)[0]
for number, (t, d, f) in enumerate(json.loads(sys.argv[2])):
    mesh = sharding.make_mesh(t, d, f, devices=jax.devices()[: t * d * f])
    frozen, encoders = teachers.put_teachers(base, lessons, base.unet_config, mesh, jnp.float32)
    networks, student_config = train.define_networks(config, base)
    style = student.style_params(student_config, "paper", 0)
    params = {"student": student.put_student([base.params("unet")], style, student_config, mesh)}
    if networks.discriminator:
        judge = discriminator.initial_params(*described, base.params("unet"), 0)
        params["discriminator"] = student.put_trained(judge, mesh)
    objective = train.define_objective(config, base, Tokenizers.from_folders(base.tokenizer_folders))
    specs = sharding.state_specs(params, mesh)
    f = S.build_loss_and_grads(networks, objective, mesh, specs, dtype=jnp.float32, gradient_accumulation=1, seed=0)
    grads, errors = jax.jit(f)(params, frozen, encoders, sharding.put(host, mesh, sharding.BATCH), jnp.int32(1))
    np.savez(f"{sys.argv[3]}/{number}.npz", *jax.tree.leaves((grads, errors)))
"""


def on_each_mesh(tiny, folder, meshes, adversarial_weight):
    """Returns the gradients and errors, as lists of arrays, of one step of eight teachers on each mesh."""
    from dmm_jax.config import to_json

    config = tiny[1].copy_and_resolve_references()
    config.teachers = tuple((f"{name}_{k}", path) for k in range(4) for name, path in config.teachers)
    config.adversarial.weight = adversarial_weight
    (folder / "config.json").write_text(to_json(config))
    environment = os.environ | {"XLA_FLAGS": FLAGS, "PYTHONPATH": str(ROOT)}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    command = [sys.executable, "-c", PROGRAM, str(folder / "config.json"), json.dumps(meshes), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [list(np.load(folder / f"{number}.npz").values()) for number in range(len(meshes))]


def norm(leaves):
    return np.sqrt(sum(float(np.square(leaf, dtype=np.float64).sum()) for leaf in leaves))


def difference(left, right):
    return norm([a.astype(np.float64) - b for a, b in zip(left, right, strict=True)])


def test_every_mesh_gives_the_same_gradients_and_errors(tiny, tmp_path):
    first, *others = on_each_mesh(tiny, tmp_path, MESHES, 0.0)
    for mesh, leaves in zip(MESHES[1:], others, strict=True):
        assert difference(leaves, first) < 1e-5 * norm(first), mesh
        for one, other in zip(leaves, first, strict=True):
            assert difference([one], [other]) < 1e-5 * max(norm([other]), 1e-3 * norm(first)), mesh


def test_a_mesh_gives_the_same_gradients_and_errors_with_a_discriminator(tiny, tmp_path):
    """Gradients up to rounding, of which the tiny head makes much: two compilations for one mesh differ by 6e-5."""
    alone, divided = on_each_mesh(tiny, tmp_path, [(1, 1, 1), (2, 2, 2)], 0.1)
    *_, adversarial, discriminator, feature, score = zip(alone, divided, strict=True)
    for one, other in (adversarial, discriminator, feature, score):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    assert difference(alone, divided) < 2e-4 * norm(alone)


def test_a_mesh_that_does_not_use_all_devices_is_refused():
    with pytest.raises(ValueError, match="wants 2 devices; there are 1.*product is 1, for example teacher=1, data=1"):
        sharding.make_mesh(2, 1, 1, devices=jax.devices()[:1])


def pod(*slices):
    """Returns TPU devices, numbered through, of the slices given."""
    devices = [Device(number, number) for number, _ in enumerate(slices)]
    for device, number in zip(devices, slices, strict=True):
        device.platform, device.slice_index = "tpu", number
    return devices


def test_teachers_lie_across_slices_and_shards_within_one():
    mesh = sharding.make_mesh(2, 1, 2, devices=pod(0, 1, 0, 1))
    assert [[device.slice_index for device in row] for row in mesh.devices.reshape(2, 2)] == [[0, 0], [1, 1]]
    with pytest.raises(ValueError, match="mesh.fsdp=4 would lie across TPU slices, of 2, 2 devices.*divisor of 2"):
        sharding.make_mesh(1, 1, 4, devices=pod(0, 1, 0, 1))


def test_large_parameters_are_sharded_along_the_largest_dimension_that_divides():
    mesh = AbstractMesh((1, 1, 4), sharding.AXES)
    assert sharding.parameter_spec((3, 3, 320, 1280), mesh) == P(None, None, None, "fsdp")
    assert sharding.parameter_spec((1280, 3), mesh) == P("fsdp", None)
    assert sharding.parameter_spec((1001, 3), mesh) == P()  # Nothing divides.
    assert sharding.parameter_spec((320,), mesh) == P()  # Too small.


class Device:
    """All that a mesh asks of a device."""

    platform = device_kind = "cpu"

    def __init__(self, number, process_index):
        self.id, self.process_index = number, process_index


def mesh_of(owners):
    """Returns a mesh whose devices (teacher, data, fsdp) belong to the processes `owners`."""
    devices = [Device(number, owner) for number, owner in enumerate(np.ravel(owners).tolist())]
    return Mesh(np.array(devices, object).reshape(np.shape(owners)), sharding.AXES)


@pytest.mark.parametrize(
    "owners",
    [
        [[[0, 0], [0, 0]], [[1, 1], [1, 1]]],  # Teachers divided among processes.
        [[[0, 0], [1, 1]], [[0, 0], [1, 1]]],  # Columns divided.
        [[[0, 0], [1, 1]], [[2, 2], [3, 3]]],  # Both.
        [[[0, 1], [0, 1]], [[2, 3], [2, 3]]],  # Columns in turns, as the tiles of a TPU slice lie.
    ],
)
def test_the_shares_of_the_processes_cover_a_batch_once(owners):
    mesh, covered = mesh_of(owners), np.zeros((4, 8), int)
    for process in np.unique(owners).tolist():
        rows, columns = sharding.batch_share(mesh, 4, 8, process)
        covered[np.ix_(rows, columns)] += 1
        slices = np.repeat(np.repeat(np.reshape(owners, (2, 4)), 2, 0), 2, 1)
        assert (slices[np.ix_(rows, columns)] == process).all()
    assert (covered == 1).all()


def test_devices_of_a_process_that_are_no_rectangle_are_refused():
    with pytest.raises(ValueError, match="process 0 devices that are no rectangle.*3 devices"):
        sharding.batch_share(mesh_of([[[0], [0]], [[0], [1]], [[1], [1]]]), 3, 4, 0)


@pytest.mark.parametrize("sizes", [(0, 0, 1), (1, -1, 1), (1, 0, 0), (1, 0, -1)])
def test_an_axis_of_no_devices_is_refused(sizes):
    with pytest.raises(ValueError, match="teacher >= 1, data >= 0 .* and fsdp >= 1; got"):
        sharding.mesh_shape(*sizes, num_devices=8)
