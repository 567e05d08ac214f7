"""Two real processes: one run on the mesh of both, the same losses as one process, and no hang when one is lost."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from dmm_jax import config as config_lib
from dmm_jax import processes
from dmm_jax.metrics import read

ROOT = pathlib.Path(__file__).parent.parent
MESH = [f"--config.mesh.{axis}=2" for axis in ("teacher", "data", "fsdp")]
BOUND_S = 100  # Nothing here may take longer; the lost process is noticed at once or by its heartbeat.


def environment(num_devices: int, cache: pathlib.Path) -> dict[str, str]:
    """Fake devices; quick compilation, kept for the next run."""
    flags = f"--xla_force_host_platform_device_count={num_devices} --xla_backend_optimization_level=0"
    return os.environ | {
        "XLA_FLAGS": flags,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


class World:
    """The tiny world as an experiment file, and runs on it."""

    def __init__(self, folder: pathlib.Path, config):
        self.folder = folder
        text = config_lib.to_json(config)
        (folder / "experiment.py").write_text(
            f"from dmm_jax import config\n\ndef get_config():\n    return config.from_json({text!r})\n"
        )

    def start(self, name: str, *arguments: str, num_devices: int = 4) -> subprocess.Popen:
        """Starts `dmm-jax train`; what it says goes to NAME.err."""
        command = [sys.executable, "-m", "dmm_jax.cli", "train", f"--config={self.folder / 'experiment.py'}"]
        with open(self.folder / f"{name}.err", "w") as said:
            return subprocess.Popen(
                [*command, *MESH, *arguments], env=environment(num_devices, self.folder / "compiled"), stderr=said
            )

    def start_two(self, *arguments: str) -> list[subprocess.Popen]:
        """Starts the two processes of one run."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        several = [f"--coordinator=localhost:{port}", "--num-processes=2"]
        return [self.start(f"process_{k}", *arguments, *several, f"--process-id={k}") for k in range(2)]

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.err").read_text()


def wait_for(condition, children) -> None:
    """Waits until `condition()`; fails if a child ends before, or after the bound."""
    deadline = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < deadline, "took too long"
        assert all(child.poll() is None for child in children), "ended too early"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    return World(tmp_path_factory.mktemp("processes"), tiny[1])


def losses(workdir):
    """Returns what a run logged, as one row of numbers."""
    lines = [{k: v for k, v in line.items() if k != "images_per_s"} for line in read(workdir / "metrics.jsonl")]
    assert lines
    return [number for line in lines for number in numbers(line)]


def numbers(value):
    if isinstance(value, dict):
        return [number for key in sorted(value) for number in numbers(value[key])]
    return [number for one in value for number in numbers(one)] if isinstance(value, list) else [value]


def test_two_processes_have_the_losses_and_validation_of_one_on_the_same_mesh(world):
    two, one = world.folder / "two", world.folder / "one"
    children = world.start_two(f"--workdir={two}", "--config.num_steps=3")
    codes = [child.wait(BOUND_S) for child in children]
    assert codes == [0, 0], world.said("process_0")[-2000:] + world.said("process_1")[-2000:]
    alone = world.start("alone", f"--workdir={one}", "--config.num_steps=3", num_devices=8)
    assert alone.wait(BOUND_S) == 0, world.said("alone")[-2000:]
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)
    assert "step 3/3" in world.said("process_0") and "step" not in world.said("process_1").replace("[Gloo]", "")


def test_when_a_process_is_killed_the_other_ends_with_a_message(world):
    children = world.start_two(f"--workdir={world.folder / 'killed'}", "--config.num_steps=100000")
    wait_for(lambda: "step 3/" in world.said("process_0"), children)
    children[1].send_signal(signal.SIGKILL)
    started = time.monotonic()
    assert children[0].wait(BOUND_S) not in (0, None)
    assert time.monotonic() - started < 2 * processes.HEARTBEAT_TIMEOUT_S
    said = world.said("process_0")
    assert "process 0 of 2 failed" in said or "another task died" in said


def test_half_of_the_arguments_are_refused():
    with pytest.raises(ValueError, match="give all three"), processes.joined(False, "localhost:1", None, 0):
        pass


def test_no_cluster_to_ask_is_told(world):
    child = world.start("nowhere", f"--workdir={world.folder / 'nowhere'}", "--distributed")
    assert child.wait(BOUND_S) == 1 and "--coordinator HOST:PORT" in world.said("nowhere")


def test_one_process_alone_joins_nothing():
    with processes.joined(False):
        processes.wait_for_all("here")
    assert processes.is_first()
