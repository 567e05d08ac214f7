"""Two and four real processes: one run on the mesh of all, the losses of one process, and no hang when one is lost."""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmm_jax.checkpoints.states import StateStore
from dmm_jax.config import options as config_lib
from dmm_jax.runtime import processes
from dmm_jax.runtime.metrics import read

ROOT = pathlib.Path(__file__).parents[2]
MESH = [f"--config.mesh.{axis}=2" for axis in ("teacher", "data", "fsdp")]
BOUND_S = 240  # Nothing here may take longer, however busy the machine is.


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def environment(num_devices: int, cache: pathlib.Path) -> dict[str, str]:
    """Fake devices; quick compilation, kept for the next run."""
    return os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={num_devices}",
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
            f"from dmm_jax.config.options import from_json\n\ndef get_config():\n    return from_json({text!r})\n"
        )

    def start(self, name: str, *arguments: str, num_devices: int = 8) -> subprocess.Popen:
        """Starts `dmm-jax train`; what it says goes to NAME.err."""
        command = [sys.executable, "-m", "dmm_jax", "train", f"--config={self.folder / 'experiment.py'}"]
        with open(self.folder / f"{name}.err", "w") as said:
            return subprocess.Popen(
                [*command, *MESH, *arguments], env=environment(num_devices, self.folder / "compiled"), stderr=said
            )

    def start_processes(self, count: int, *arguments: str) -> list[subprocess.Popen]:
        """Starts the processes of one run, which share eight devices."""
        several = [f"--coordinator={free_address()}", f"--num-processes={count}"]
        return [
            self.start(f"process_{k}", *arguments, *several, f"--process-id={k}", num_devices=8 // count)
            for k in range(count)
        ]

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
    """Returns what a run logged, as one row of numbers, but for its times."""
    lines = [
        {k: v for k, v in line.items() if k not in ("images_per_s", "host_ms")}
        for line in read(workdir / "metrics.jsonl")
    ]
    assert lines
    return [number for line in lines for number in numbers(line)]


def numbers(value):
    if isinstance(value, dict):
        return [number for key in sorted(value) for number in numbers(value[key])]
    return [number for one in value for number in numbers(one)] if isinstance(value, list) else [value]


@pytest.fixture(scope="module")
def stopped(world):
    """The workdir of a run in two processes that SIGTERM to one of them stopped after step 3 or later; their codes."""
    children = world.start_processes(2, f"--workdir={world.folder / 'two'}", "--config.num_steps=100000")
    wait_for(lambda: "validation loss" in world.said("process_0"), children)
    children[1].send_signal(signal.SIGTERM)
    codes = [child.wait(BOUND_S) for child in children]
    return world.folder / "two", codes, [world.said(f"process_{k}") for k in range(2)]


def test_two_processes_have_the_losses_and_validation_of_one_on_the_same_mesh(world, stopped):
    alone = world.start("alone", f"--workdir={world.folder / 'one'}", "--config.num_steps=3")
    assert alone.wait(BOUND_S) == 0, world.said("alone")[-2000:]
    wanted = losses(world.folder / "one")
    np.testing.assert_allclose(losses(stopped[0])[: len(wanted)], wanted, rtol=1e-5)


def test_a_checkpoint_of_one_device_goes_on_on_eight_with_the_losses_of_the_run_that_never_stopped(world, trained):
    workdir = world.folder / "from_one"
    shutil.copytree(trained, workdir)
    shutil.rmtree(workdir / "checkpoints" / "6")
    child = world.start("from_one", f"--workdir={workdir}")
    assert child.wait(BOUND_S) == 0, world.said("from_one")[-2000:]
    said = world.said("from_one")
    assert "Resuming at step 4 of 6" in said and "mesh teacher 2 x data 2 x fsdp 2" in said
    np.testing.assert_allclose(losses(workdir), losses(trained), rtol=1e-5)


def test_sigterm_to_one_of_two_processes_stops_both_at_one_saved_step(stopped):
    workdir, codes, said = stopped
    assert codes == [0, 0], "".join(said)[-3000:]
    step = read(workdir / "metrics.jsonl")[-1]["step"]
    assert f"stopped by SIGTERM after step {step} of 100000" in said[0]
    assert (workdir / "checkpoints" / str(step)).is_dir()


def test_process_0_alone_speaks(stopped):
    assert "step 3/" in stopped[2][0] and "loss" not in stopped[2][1]


def test_four_processes_go_on_where_two_stopped_and_when_one_is_killed_the_others_end_with_a_message(world, stopped):
    step = read(stopped[0] / "metrics.jsonl")[-1]["step"]
    unvalidated = "--config.validation_size=0"  # Each of the four would compile that, too.
    children = world.start_processes(4, f"--workdir={stopped[0]}", "--config.num_steps=100000", unvalidated)
    wait_for(lambda: f"step {step + 3}/" in world.said("process_0"), children)
    assert f"Resuming at step {step} " in world.said("process_0")
    children[3].send_signal(signal.SIGKILL)
    started = time.monotonic()
    assert all(child.wait(BOUND_S) not in (0, None) for child in children[:3])
    assert time.monotonic() - started < 2 * processes.HEARTBEAT_TIMEOUT_S
    said = world.said("process_0")
    assert "process 0 of 4 failed" in said or "another task died" in said


CHECKPOINTS = """
import sys
import jax
import numpy as np
from dmm_jax import processes, sharding
from dmm_jax.checkpoints.states import StateStore
from tests.runtime.test_processes import random_state

with processes.joined(False, sys.argv[2], 2, int(sys.argv[3])):
    mesh = sharding.make_mesh(2, 1, 4)
    def put(state):
        return jax.tree.map(lambda leaf: sharding.make_array(leaf.shape, leaf.dtype, mesh,
            sharding.parameter_spec(leaf.shape, mesh), leaf.__getitem__), state)
    with StateStore(sys.argv[1]) as store:
        step, state = store.resume(put(random_state(0)))
        for found, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(random_state(step)), strict=True):
            assert all(np.array_equal(part.data, wanted[part.index]) for part in found.addressable_shards)
        print("resumed at", step, [tuple(part.index) for part in state["kernel"].addressable_shards][:2])
        store.save(6, put(random_state(6)))
"""


EARLY = """
import hashlib, os, signal, sys, time
import jax
from dmm_jax import processes

with processes.joined(False, sys.argv[2], 2, int(sys.argv[3])):
    with processes.stop_requests() as stop:
        if sys.argv[1].endswith("begun"):
            stop.begin()
        if jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(3)
        if not sys.argv[1].endswith("begun"):
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # As one that compiles: minutes of C, with no signal heard.
        steps = range(8, 20)  # As one that resumes at step 7.
        print([step for step in steps if stop()])
        processes.wait_for_all("end")
"""


LOST = """
import os, signal, sys
import jax
import numpy as np
from dmm_jax import processes, sharding
from dmm_jax.checkpoints.states import StateStore

with processes.joined(False, sys.argv[2], 2, int(sys.argv[3])):
    mesh = sharding.make_mesh(1, 1, 8)
    kernel = np.random.default_rng(0).standard_normal((4096, 2048), np.float32)
    state = {"kernel": sharding.make_array(kernel.shape, kernel.dtype, mesh, sharding.P("fsdp"), kernel.__getitem__)}
    with StateStore(sys.argv[1]) as store:
        store.save(1, state)
        if jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("a reason")
"""


def start_two_programs(program: str, folder: pathlib.Path) -> list[subprocess.Popen]:
    """Runs `program FOLDER ADDRESS NUMBER` in two processes with four devices each."""
    address, settings = free_address(), environment(4, folder / "compiled")
    return [
        subprocess.Popen(
            [sys.executable, "-c", program, str(folder), address, str(k)],
            env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for k in range(2)
    ]  # fmt: skip


def test_sigterm_at_the_first_step_of_a_run_that_resumes_stops_all_after_it(tmp_path):
    children = start_two_programs(EARLY, tmp_path / "begun")
    said = [child.communicate(timeout=BOUND_S) for child in children]
    assert all("[8]" in out.split("\n") for out, _ in said), "".join(err for _, err in said)[-3000:]


def test_sigterm_to_one_process_before_the_first_step_ends_all_at_once_with_exit_code_0(tmp_path):
    children = start_two_programs(EARLY, tmp_path)
    said = [child.communicate(timeout=BOUND_S) for child in children]
    assert [child.returncode for child in children] == [0, 0], "".join(err for _, err in said)[-3000:]
    assert ["nothing had to be saved" in err for _, err in said] == [True, False]


ALONE = """
import hashlib, sys
from dmm_jax import processes

with processes.stop_requests():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # As one that compiles.
"""


def test_sigterm_before_the_first_step_ends_a_process_at_once_with_exit_code_0(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", ALONE], env=environment(1, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout.readline() == b"ready\n"
    child.terminate()
    assert b"nothing had to be saved" in child.communicate(timeout=BOUND_S / 10)[1] and child.returncode == 0


def test_sigterm_while_a_run_loads_its_teachers_ends_it_with_exit_code_0(world):
    child = world.start("loading", f"--workdir={world.folder / 'loading'}", num_devices=8)
    wait_for(lambda: "Teacher 'left' has no text_encoder" in world.said("loading"), [child])
    child.terminate()
    assert child.wait(BOUND_S / 10) == 0 and "stopped by SIGTERM: nothing had to be saved." in world.said("loading")
    assert not (world.folder / "loading" / "metrics.jsonl").exists()


JOINING = """
import sys
from dmm_jax import processes

processes.JOIN_TIMEOUT_S = 1
with processes.joined(False, sys.argv[1], 2, int(sys.argv[2])):
    pass
"""


@pytest.mark.parametrize("number, told", [(1, "cannot reach process 0 at"), (0, "but not all 2 processes came within")])
def test_who_cannot_join_ends_with_one_message(tmp_path, number, told):
    command = [sys.executable, "-c", JOINING, free_address(), str(number)]
    done = subprocess.run(command, env=environment(1, tmp_path), capture_output=True, text=True, timeout=BOUND_S)
    assert done.returncode == 1, done.stderr[-3000:]
    assert done.stderr.startswith(f"dmm-jax train: error: process {number} of 2 ") and told in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_failing_process_does_not_wait_for_the_lost_one_to_finish_a_save(tmp_path):
    first, lost = start_two_programs(LOST, tmp_path)
    assert lost.wait(BOUND_S) == -signal.SIGKILL
    started = time.monotonic()
    assert first.wait(BOUND_S) == 1 and time.monotonic() - started < processes.HEARTBEAT_TIMEOUT_S / 2
    assert "process 0 of 2 failed: a reason" in first.communicate()[1]


STEPS = """
import sys
import jax
from dmm_jax import processes

with processes.joined(False, sys.argv[2], 2, int(sys.argv[3])):
    for step in range(10**9):
        processes.wait_for_all("step")
        if step == 3:
            print("running", flush=True)
        if step == 4 and sys.argv[1].endswith("broken") and jax.process_index() == 1:
            raise KeyError("a bug")
"""


def test_when_process_0_is_killed_the_others_end_with_a_message(tmp_path):
    first, other = start_two_programs(STEPS, tmp_path)
    while "running" not in (line := first.stdout.readline()):
        assert line, first.communicate()[1][-3000:]
    first.kill()
    said = other.communicate(timeout=2 * processes.HEARTBEAT_TIMEOUT_S)[1]
    assert other.returncode in (processes.LOST, -signal.SIGABRT), said[-3000:]
    assert "another process is gone" in said or "another task died" in said


def test_an_error_in_one_process_ends_all_with_a_message(tmp_path):
    first, broken = start_two_programs(STEPS, tmp_path / "broken")
    said = [child.communicate(timeout=2 * processes.HEARTBEAT_TIMEOUT_S)[1] for child in (first, broken)]
    assert broken.returncode == 1 and "process 1 of 2 failed: 'a bug'" in said[1], said[1][-3000:]
    assert first.returncode in (processes.LOST, -signal.SIGABRT), said[0][-3000:]
    assert "another process is gone" in said[0] or "another task died" in said[0]


def random_state(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"kernel": rng.standard_normal((64, 64), np.float32), "bias": rng.standard_normal(64).astype(np.float32)}


def test_states_are_equal_on_other_meshes_and_in_more_or_fewer_processes_and_all_pass_over_a_damaged_one(tmp_path):
    with StateStore(tmp_path) as store:
        for step in (2, 4):
            store.save(step, jax.tree.map(jnp.asarray, random_state(step)))
    for path in (tmp_path / "checkpoints" / "4" / "state").rglob("d/*"):
        path.unlink()
    children = start_two_programs(CHECKPOINTS, tmp_path)
    said = [child.communicate(timeout=BOUND_S) for child in children]
    assert [child.returncode for child in children] == [0, 0], "".join(err for _, err in said)[-3000:]
    assert all("resumed at 2" in out for out, _ in said) and "4 is damaged" in said[0][1]
    with StateStore(tmp_path) as store:
        step, state = store.resume(jax.tree.map(jnp.zeros_like, random_state(0)))
    assert step == 6
    assert all(np.array_equal(state[name], wanted) for name, wanted in random_state(6).items())


def test_what_is_wrong_in_all_processes_is_said_by_all(world):
    children = world.start_processes(
        2, f"--workdir={world.folder / 'wrong'}", "--config.batch_size=6", "--config.num_steps=1"
    )
    assert [child.wait(BOUND_S) for child in children] == [1, 1]
    for k in range(2):
        said = world.said(f"process_{k}")
        assert f"process {k} of 2 failed: The config does not fit" in said and "Use 8" in said
        assert "Traceback" not in said and "stack trace" not in said


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
