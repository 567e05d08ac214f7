"""The mesh: what it refuses, and that every layout of one batch gives the same steps."""

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

from dmm_jax.runtime import sharding
from tests import mesh_program

ROOT = pathlib.Path(__file__).parents[2]
MESHES = [(1, 1, 1), (8, 1, 1), (2, 2, 2), (4, 2, 1), (1, 1, 8)]
FLAGS = (  # conftest.py's, and fake devices.
    f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8 --xla_llvm_disable_expensive_passes=true"
)
IN_PARTS = (4, 2, 1)  # The mesh on which gradients are summed over two micro-batches.
JUDGED = {"adversarial.weight": 0.1}
CASES = {
    **{("float32", mesh): {"gradient_accumulation": 1 + (mesh == IN_PARTS)} for mesh in MESHES},
    ("judged", (4, 2, 1)): JUDGED,
    ("judged", (2, 2, 2)): JUDGED,
}


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """What two whole steps of eight teachers logged, and where they led, in each of CASES; where the arrays lived."""
    folder = tmp_path_factory.mktemp("meshes")
    environment = os.environ | {"XLA_FLAGS": FLAGS, "PYTHONPATH": str(ROOT)}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    cases = json.dumps([[mesh, changes] for (_, mesh), changes in CASES.items()])
    command = [sys.executable, "-m", "tests.mesh_program", cases, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {case: dict(np.load(folder / f"{number}.npz")) for number, case in enumerate(CASES)}
    return found, json.loads((folder / "places.json").read_text())


def difference(found, wanted, name):
    """Returns the distance between what two runs call `name`, over all its arrays, relative to its length."""
    pairs = [(found[key].astype(np.float64), wanted[key]) for key in wanted if key.startswith(f"{name}.")]
    assert pairs
    length = np.sqrt(sum(np.square(other, dtype=np.float64).sum() for _, other in pairs))
    return np.sqrt(sum(np.square(one - other).sum() for one, other in pairs)) / length


@pytest.mark.parametrize("mesh", MESHES[1:], ids=str)
def test_every_mesh_and_micro_batches_make_the_same_steps(steps, mesh):
    """Losses, gradient norm, moments, and with them parameters and their average: all that a step leaves behind.

    Adam divides by a gradient's size, so a parameter whose gradient is nothing but rounding would move by the learning
    rate, anyhow; with an epsilon of 1e-3, of the size of the gradients, an update is as exact as its gradient.
    """
    wanted, found = steps[0]["float32", MESHES[0]], steps[0]["float32", mesh]
    for name in ("score", "feature", "grad_norm"):
        for number in range(2):
            key = f"logged {name}.{number}"
            np.testing.assert_allclose(found[key], wanted[key], rtol=1e-5, err_msg=key)
    for name in ("student mu", "student nu", "student moved", "student average"):
        assert difference(found, wanted, name) < 1e-5, name
    moments = [key for key in wanted if key.startswith("student mu.")]
    whole = np.sqrt(sum(np.square(wanted[key]).sum() for key in moments))
    for key in moments:  # And in every array, but for those that hardly move.
        length = max(np.linalg.norm(wanted[key]), 1e-3 * whole)
        assert np.linalg.norm(found[key] - wanted[key]) < 1e-5 * length, key


def test_the_steps_that_are_compared_tell_teachers_apart_and_are_clipped(steps):
    """No two teachers have a loss in common, so one in another's place is seen."""
    found = steps[0]["float32", (1, 1, 1)]
    losses = np.sort(found["logged score.0"])
    assert losses.shape == (8,) and (np.diff(losses) > 1e-3 * losses[:-1]).all()
    assert found["logged grad_norm.0"] > mesh_program.settings({}).max_grad_norm


def test_a_discriminator_learns_the_same_on_two_meshes(steps):
    """Gradients up to rounding, of which the tiny head makes much: two compilations for one mesh differ by 6e-5."""
    wanted, found = steps[0]["judged", (2, 2, 2)], steps[0]["judged", (4, 2, 1)]
    for name in ("score", "feature", "adversarial", "discriminator"):
        np.testing.assert_allclose(found[f"logged {name}.0"], wanted[f"logged {name}.0"], rtol=1e-5)
    for name in ("score", "feature"):  # Before the first update nothing is judged.
        alone = steps[0]["float32", (1, 1, 1)][f"logged {name}.0"]
        np.testing.assert_allclose(found[f"logged {name}.0"], alone, rtol=1e-5)
    for name in ("student mu", "student nu", "student moved", "discriminator mu", "discriminator nu"):
        assert difference(found, wanted, name) < 2e-4, name


def test_arrays_live_where_the_table_says(steps):
    """Read off the devices of the mesh 2 x 2 x 2; the table is the one of `sharding`."""
    rows = [line.strip("| ").split("|") for line in sharding.__doc__.splitlines() if line.startswith("| ")][1:]
    table = {
        name.strip(): [axis for axis, place in zip(sharding.AXES, places, strict=True) if place.strip() != "copy"]
        for name, *places in rows
    }
    named = {
        "batch": "batch", "teachers": "teacher", "text": "text", "backbone": "frozen", "trained": "student",
        "counters": "counters", "small": "vector", "logged": "losses",
    }  # fmt: skip
    assert len(table) == len(named)
    for name, start in named.items():
        (told,) = [axes for row, axes in table.items() if row.startswith(start)]
        places = [axes for axes in steps[1][name] if axes or name != "trained"]  # Small ones are copied.
        assert places and all(axes == told for axes in places), name
    assert [] in steps[1]["trained"]


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


def test_large_parameters_are_divided_along_the_first_dimension_that_divides():
    mesh = AbstractMesh((1, 1, 4), sharding.AXES)
    assert sharding.parameter_spec((3, 3, 320, 1280), mesh) == P(None, None, "fsdp", None)
    assert sharding.parameter_spec((3, 1280), mesh) == P(None, "fsdp")
    assert sharding.parameter_spec((1001, 3), mesh) == P()  # Nothing divides.
    assert sharding.parameter_spec((16, 16), mesh) == P()  # Too small.
    assert sharding.parameter_spec((10240,), mesh) == P()  # A vector.


def test_parameters_are_divided_along_every_axis_that_divides_what_is_left():
    mesh = AbstractMesh((8, 4, 2), sharding.AXES)
    assert sharding.parameter_spec((3, 3, 320, 640), mesh) == P(None, None, ("fsdp", "data", "teacher"), None)
    assert sharding.parameter_spec((3, 3, 16, 320), mesh) == P(None, None, ("fsdp", "data"), "teacher")
    assert sharding.parameter_spec((3, 3, 4, 320), mesh) == P(None, None, "fsdp", ("data", "teacher"))
    assert sharding.parameter_spec((513, 12), mesh) == P(None, "fsdp")


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


@pytest.mark.parametrize(
    "num_rows, at_once, sizes", [(5, 8, [5]), (5, 2, [2, 2, 2]), (7, 6, [4, 4]), (6, 3, [3, 3]), (1, 1, [1])]
)
def test_parts_of_a_batch_are_equal_and_none_is_larger_than_allowed(num_rows, at_once, sizes):
    seen = []

    def run(rows, more):
        seen.append(len(rows))
        return 2 * rows + more

    rows = np.arange(num_rows, dtype=np.float32)
    assert np.array_equal(sharding.in_parts(run, at_once, rows, rows[::-1]), 2 * rows + rows[::-1])
    assert seen == sizes
