"""Fixtures that start processes: `dmm-jax train` on the tiny world, and programs of `programs.py`."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

from tests.experiments import write_experiment

ROOT = pathlib.Path(__file__).parents[2]
MESH = [f"--config.mesh.{axis}=2" for axis in ("teacher", "data", "fsdp")]
BOUND_S = 900  # The longest time for anything here, on a very busy machine.
children: list[subprocess.Popen] = []  # Started by the current module.


def free_address() -> str:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return f"localhost:{listener.getsockname()[1]}"


def start(folder: pathlib.Path, num_devices: int, *arguments: str, **pipes) -> subprocess.Popen:
    """Starts `python -m ARGUMENTS` with fake devices; programs that are compiled are kept in the folder."""
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={num_devices}",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    children.append(subprocess.Popen([sys.executable, "-m", *arguments], env=environment, text=True, **pipes))
    return children[-1]


@pytest.fixture(scope="module", autouse=True)
def _no_child_remains():
    """Kills the processes that a failed test of the module leaves."""
    yield
    while children:
        children.pop().kill()


class Runs:
    """Starts `dmm-jax train` on the tiny world, on a mesh of eight devices; the stderr of NAME is in NAME.err."""

    def __init__(self, folder: pathlib.Path, config):
        self.folder = folder
        self._experiment = write_experiment(folder / "experiment.py", config)

    def start(self, name: str, *arguments: str, num_devices: int = 8) -> subprocess.Popen:
        with open(self.folder / f"{name}.err", "w") as file:
            train = ["dmm_jax", "train", f"--config={self._experiment}", *MESH, *arguments]
            return start(self.folder, num_devices, *train, stderr=file)

    def start_processes(self, count: int, *arguments: str) -> list[subprocess.Popen]:
        """Starts the processes of one run, which share the eight devices."""
        group = [f"--coordinator={free_address()}", f"--num-processes={count}"]
        return [
            self.start(f"process_{k}", *arguments, *group, f"--process-id={k}", num_devices=8 // count)
            for k in range(count)
        ]

    def stderr(self, name: str) -> str:
        return (self.folder / f"{name}.err").read_text()


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("processes"), tiny[1])


@pytest.fixture
def start_two(tmp_path):
    """Returns a function that runs a program of `programs.py` in two processes with four devices each."""

    def start_two(program: str) -> list[subprocess.Popen]:
        address, pipes = free_address(), {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        module = "tests.runtime.programs"
        return [start(tmp_path, 4, module, program, str(tmp_path), address, str(k), **pipes) for k in range(2)]

    return start_two


def wait_for(condition, processes) -> None:
    """Waits until `condition()`; fails if a process ends before, or after the bound."""
    deadline = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < deadline, "took too long"
        assert all(process.poll() is None for process in processes), "ended too early"
        time.sleep(0.1)
