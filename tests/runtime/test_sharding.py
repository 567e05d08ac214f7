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
from dmm_jax.runtime.errors import UserError
from tests import mesh_program

ROOT = pathlib.Path(__file__).parents[2]
MESHES = [(1, 1, 1), (2, 2, 2), (4, 2, 1), (1, 2, 4)]
FLAGS = "--xla_force_host_platform_device_count=8 --xla_llvm_disable_expensive_passes=true"
ACCUMULATING = (4, 2, 1)  # The mesh on which gradients are summed over two micro-batches.
UNROLLED = (2, 2, 2)  # The mesh on which the middle block's two transformer blocks are not a loop.
STREAMED = (1, 2, 4)  # The mesh to which teachers come from the host's memory, one at a time.
ADVERSARIAL = {"adversarial.weight": 0.1}
CASES = {
    **{
        ("float32", mesh): {
            "gradient_accumulation": 2 if mesh == ACCUMULATING else 1,
            "loop_blocks": 0 if mesh == UNROLLED else 2,
            "teachers_in_host_memory": mesh == STREAMED,
        }
        for mesh in MESHES
    },
    ("adversarial", (4, 2, 1)): ADVERSARIAL,
    ("adversarial", (2, 2, 2)): ADVERSARIAL,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Runs `mesh_program` on CASES; returns {case: {name: array}}, and along which axes arrays are divided."""
    folder = tmp_path_factory.mktemp("meshes")
    environment = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {FLAGS}", "PYTHONPATH": str(ROOT)}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    cases = json.dumps([[mesh, changes] for (_, mesh), changes in CASES.items()])
    command = [sys.executable, "-m", "tests.mesh_program", cases, str(folder)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert process.returncode == 0, process.stderr[-3000:]
    arrays = {case: dict(np.load(folder / f"{number}.npz")) for number, case in enumerate(CASES)}
    return arrays, json.loads((folder / "places.json").read_text())


def difference(actual, expected, name):
    """Returns the distance between the arrays that two runs store under `name`, relative to their length."""
    pairs = [(actual[key].astype(np.float64), expected[key]) for key in expected if key.startswith(f"{name}.")]
    assert pairs
    length = np.sqrt(sum(np.square(b, dtype=np.float64).sum() for _, b in pairs))
    return np.sqrt(sum(np.square(a - b).sum() for a, b in pairs)) / length


@pytest.mark.parametrize("mesh", MESHES[1:], ids=str)
def test_all_ways_to_divide_a_step_take_the_same_steps(results, mesh):
    """Compares losses, gradient norm, moments, and with them parameters and their average.

    Adam divides by a gradient's size, so a parameter whose gradient is only rounding would move by the learning rate.
    With an epsilon of 1e-3, of the size of the gradients, an update is as exact as its gradient.
    """
    expected, actual = results[0]["float32", MESHES[0]], results[0]["float32", mesh]
    for name in ("score", "feature", "grad_norm"):
        for number in range(2):
            key = f"logged {name}.{number}"
            np.testing.assert_allclose(actual[key], expected[key], rtol=1e-5, err_msg=key)
    for name in ("student mu", "student nu", "student moved", "student average"):
        assert difference(actual, expected, name) < 1e-5, name
    moments = [key for key in expected if key.startswith("student mu.")]
    total = np.sqrt(sum(np.square(expected[key]).sum() for key in moments))
    for key in moments:  # Every array too, relative to a thousandth of all arrays at least.
        length = max(np.linalg.norm(expected[key]), 1e-3 * total)
        assert np.linalg.norm(actual[key] - expected[key]) < 1e-5 * length, key


def test_compared_steps_are_clipped_and_every_loss_differs(results):
    """Otherwise the comparison would not see exchanged teachers."""
    arrays = results[0]["float32", (1, 1, 1)]
    losses = np.sort(arrays["logged score.0"])
    assert losses.shape == (4,) and (np.diff(losses) > 1e-3 * losses[:-1]).all()
    assert arrays["logged grad_norm.0"] > mesh_program.make_config({}).max_grad_norm


def test_a_discriminator_learns_the_same_on_two_meshes(results):
    """The tiny head amplifies the rounding of gradients: two compilations for one mesh differ by 6e-5."""
    expected, actual = results[0]["adversarial", (2, 2, 2)], results[0]["adversarial", (4, 2, 1)]
    for name in ("score", "feature", "adversarial", "discriminator"):
        np.testing.assert_allclose(actual[f"logged {name}.0"], expected[f"logged {name}.0"], rtol=1e-5)
    for name in ("score", "feature"):  # Before its first update, the discriminator does not change them.
        without = results[0]["float32", (1, 1, 1)][f"logged {name}.0"]
        np.testing.assert_allclose(actual[f"logged {name}.0"], without, rtol=1e-5)
    for name in ("student mu", "student nu", "student moved", "discriminator mu", "discriminator nu"):
        assert difference(actual, expected, name) < 2e-4, name


def test_arrays_are_placed_as_the_table_of_the_module_says(results):
    """Compares the table in the docstring of `sharding` with the devices of the mesh 2 x 2 x 2."""
    rows = [line.strip("| ").split("|") for line in sharding.__doc__.splitlines() if line.startswith("| ")][1:]
    table = {
        name.strip(): [axis for axis, place in zip(sharding.AXES, places, strict=True) if place.strip() != "copy"]
        for name, *places in rows
    }
    row_starts = {
        "batch": "batch", "teachers": "teacher", "text": "text", "backbone": "frozen", "trained": "student",
        "counters": "counters", "small": "vector", "logged": "losses",
    }  # fmt: skip
    assert len(table) == len(row_starts)
    for name, start in row_starts.items():
        (expected,) = [axes for row, axes in table.items() if row.startswith(start)]
        places = [axes for axes in results[1][name] if axes or name != "trained"]  # Small trained arrays are copied.
        assert places and all(axes == expected for axes in places), name
    assert [] in results[1]["trained"]


def test_a_mesh_that_does_not_use_all_devices_is_refused():
    with pytest.raises(UserError, match="needs 2 devices; there are 1.*product is 1, for example teacher=1, data=1"):
        sharding.make_mesh(2, 1, 1, devices=jax.devices()[:1])


@pytest.mark.parametrize("sizes", [(0, 0, 1), (1, -1, 1), (1, 0, 0), (1, 0, -1)])
def test_an_axis_without_devices_is_refused(sizes):
    with pytest.raises(UserError, match="teacher >= 1, data >= 0 .* and fsdp >= 1; got"):
        sharding.mesh_shape(*sizes, num_devices=8)


class FakeDevice:
    """Has the attributes that a mesh reads."""

    platform = device_kind = "cpu"

    def __init__(self, number, process_index):
        self.id, self.process_index = number, process_index


def tpus(*slices):
    """Returns one TPU device in each of the slices."""
    devices = [FakeDevice(number, number) for number, _ in enumerate(slices)]
    for device, number in zip(devices, slices, strict=True):
        device.platform, device.slice_index = "tpu", number
    return devices


def test_only_the_fsdp_axis_stays_within_a_tpu_slice():
    mesh = sharding.make_mesh(2, 1, 2, devices=tpus(0, 1, 0, 1))
    assert [[device.slice_index for device in row] for row in mesh.devices.reshape(2, 2)] == [[0, 0], [1, 1]]
    with pytest.raises(UserError, match="mesh.fsdp=4 would cross TPU slices, of 2, 2 devices.*divisor of 2"):
        sharding.make_mesh(1, 1, 4, devices=tpus(0, 1, 0, 1))


def test_parameters_are_divided_along_the_first_possible_dimension():
    mesh = AbstractMesh((1, 1, 4), sharding.AXES)
    assert sharding.parameter_spec((3, 3, 320, 1280), mesh) == P(None, None, "fsdp", None)
    assert sharding.parameter_spec((3, 1280), mesh) == P(None, "fsdp")
    assert sharding.parameter_spec((1001, 3), mesh) == P()  # No dimension divides.
    assert sharding.parameter_spec((16, 16), mesh) == P()  # Too small.
    assert sharding.parameter_spec((10240,), mesh) == P()  # A vector.


def test_parameters_are_divided_along_every_possible_axis():
    mesh = AbstractMesh((8, 4, 2), sharding.AXES)
    assert sharding.parameter_spec((3, 3, 320, 640), mesh) == P(None, None, ("fsdp", "data", "teacher"), None)
    assert sharding.parameter_spec((3, 3, 16, 320), mesh) == P(None, None, ("fsdp", "data"), "teacher")
    assert sharding.parameter_spec((3, 3, 4, 320), mesh) == P(None, None, "fsdp", ("data", "teacher"))
    assert sharding.parameter_spec((513, 12), mesh) == P(None, "fsdp")


def mesh_of(owners):
    """Returns a mesh whose devices (teacher, data, fsdp) belong to the processes `owners`."""
    devices = [FakeDevice(number, owner) for number, owner in enumerate(np.ravel(owners).tolist())]
    return Mesh(np.array(devices, object).reshape(np.shape(owners)), sharding.AXES)


@pytest.mark.parametrize(
    "owners",
    [
        [[[0, 0], [0, 0]], [[1, 1], [1, 1]]],  # Teachers divided among processes.
        [[[0, 0], [1, 1]], [[0, 0], [1, 1]]],  # Columns divided.
        [[[0, 0], [1, 1]], [[2, 2], [3, 3]]],  # Both.
        [[[0, 1], [0, 1]], [[2, 3], [2, 3]]],  # Columns in turns, like the tiles of a TPU slice.
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


def test_devices_of_a_process_must_be_a_rectangle():
    with pytest.raises(UserError, match="process 0 devices that are not a rectangle.*3 devices"):
        sharding.batch_share(mesh_of([[[0], [0]], [[0], [1]], [[1], [1]]]), 3, 4, 0)


@pytest.mark.parametrize(
    "num_rows, rows_per_device, sizes", [(5, 8, [5]), (5, 2, [2, 2, 2]), (7, 6, [4, 4]), (6, 3, [3, 3]), (1, 1, [1])]
)
def test_parts_of_a_batch_have_equal_sizes_below_the_limit(num_rows, rows_per_device, sizes):
    seen = []

    def function(rows, offsets):
        seen.append(len(rows))
        return 2 * rows + offsets

    rows = np.arange(num_rows, dtype=np.float32)
    assert np.array_equal(sharding.in_parts(function, rows_per_device, rows, rows[::-1]), 2 * rows + rows[::-1])
    assert seen == sizes
