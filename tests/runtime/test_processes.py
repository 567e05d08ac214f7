"""Runs in two and four real processes: the losses of one process, and no hang when a process is lost."""

import shutil
import signal
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmm_jax.checkpoints.states import StateStore
from dmm_jax.runtime import processes
from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.metrics import read
from tests.runtime.conftest import BOUND_S, free_address, start, wait_for
from tests.runtime.programs import fill, random_state

TIMES = ("images_per_s", "host_ms")  # The only numbers of metrics.jsonl that differ from run to run.


def losses(workdir) -> list[float]:
    """Returns all numbers that a run logged, except its times."""
    lines = [
        {key: value for key, value in line.items() if key not in TIMES} for line in read(workdir / "metrics.jsonl")
    ]
    assert lines
    return jax.tree.leaves(lines)


@pytest.fixture(scope="module")
def stopped(runs):
    """A run in two processes, after SIGTERM to the second one: its workdir, exit codes and stderrs."""
    children = runs.start_processes(2, f"--workdir={runs.folder / 'two'}", "--config.num_steps=100000")
    wait_for(lambda: "validation loss" in runs.stderr("process_0"), children)
    children[1].send_signal(signal.SIGTERM)
    codes = [child.wait(BOUND_S) for child in children]
    return runs.folder / "two", codes, [runs.stderr(f"process_{k}") for k in range(2)]


def test_two_processes_have_the_losses_of_one_on_the_same_mesh(runs, stopped):
    child = runs.start("alone", f"--workdir={runs.folder / 'one'}", "--config.num_steps=3")
    assert child.wait(BOUND_S) == 0, runs.stderr("alone")[-2000:]
    expected = losses(runs.folder / "one")
    np.testing.assert_allclose(losses(stopped[0])[: len(expected)], expected, rtol=1e-5)


def test_eight_devices_resume_a_checkpoint_of_one_with_its_losses(runs, trained):
    workdir = runs.folder / "from_one"
    shutil.copytree(trained, workdir)
    shutil.rmtree(workdir / "checkpoints" / "6")
    child = runs.start("from_one", f"--workdir={workdir}")
    assert child.wait(BOUND_S) == 0, runs.stderr("from_one")[-2000:]
    stderr = runs.stderr("from_one")
    assert "Resuming at step 4 of 6" in stderr and "mesh teacher 2 x data 2 x fsdp 2" in stderr
    np.testing.assert_allclose(losses(workdir), losses(trained), rtol=1e-5)


def test_sigterm_to_one_process_stops_both_at_the_same_saved_step(stopped):
    workdir, codes, stderrs = stopped
    assert codes == [0, 0], "".join(stderrs)[-3000:]
    step = read(workdir / "metrics.jsonl")[-1]["step"]
    assert f"stopped by SIGTERM after step {step} of 100000" in stderrs[0]
    assert (workdir / "checkpoints" / str(step)).is_dir()


def test_only_process_0_prints(stopped):
    assert "step 3/" in stopped[2][0] and "loss" not in stopped[2][1]


def test_four_processes_resume_a_run_of_two_and_end_if_one_is_killed(runs, stopped):
    step = read(stopped[0] / "metrics.jsonl")[-1]["step"]
    no_validation = "--config.validation_size=0"  # Each of the four processes would compile its program.
    children = runs.start_processes(4, f"--workdir={stopped[0]}", "--config.num_steps=100000", no_validation)
    wait_for(lambda: f"step {step + 3}/" in runs.stderr("process_0"), children)
    assert f"Resuming at step {step} " in runs.stderr("process_0")
    children[3].send_signal(signal.SIGKILL)
    start_time = time.monotonic()
    assert all(child.wait(BOUND_S) not in (0, None) for child in children[:3])
    assert time.monotonic() - start_time < 2 * processes.HEARTBEAT_TIMEOUT_S
    stderr = runs.stderr("process_0")
    assert "process 0 of 4 failed" in stderr or "another task died" in stderr


def test_states_move_between_meshes_and_processes_past_a_damaged_one(start_two, tmp_path):
    with StateStore(tmp_path) as store:
        for step in (2, 4):
            store.save(step, jax.tree.map(jnp.asarray, random_state(step)))
    for path in (tmp_path / "checkpoints" / "4" / "state").rglob("d/*"):
        path.unlink()
    children = start_two("resume_and_save")
    outputs = [child.communicate(timeout=BOUND_S) for child in children]
    assert [child.returncode for child in children] == [0, 0], "".join(err for _, err in outputs)[-3000:]
    assert all("resumed at 2" in out for out, _ in outputs) and "4 is damaged" in outputs[0][1]
    with StateStore(tmp_path) as store:
        step, state = store.resume(jax.tree.map(jnp.zeros_like, random_state(0)))
    assert step == 6
    assert all(np.array_equal(state[name], expected) for name, expected in random_state(6).items())


def test_a_failing_process_does_not_wait_for_the_save_of_a_lost_one(start_two):
    first, lost = start_two("fail_after_a_loss_during_a_save")
    assert lost.wait(BOUND_S) == -signal.SIGKILL
    start_time = time.monotonic()
    assert first.wait(BOUND_S) == 1 and time.monotonic() - start_time < processes.HEARTBEAT_TIMEOUT_S / 2
    assert "process 0 of 2 failed: a reason" in first.communicate()[1]


def test_the_remaining_processes_report_the_loss_of_process_0(start_two):
    first, other = start_two("take_steps")
    while "running" not in (line := first.stdout.readline()):
        assert line, first.communicate()[1][-3000:]
    first.kill()
    assert_reports_a_loss(other, other.communicate(timeout=2 * processes.HEARTBEAT_TIMEOUT_S)[1])


def assert_reports_a_loss(child, stderr):
    assert child.returncode in (processes.LOST, -signal.SIGABRT), stderr[-3000:]
    assert "another process is gone" in stderr or "another task died" in stderr


def test_a_fault_in_one_process_ends_all(start_two):
    children = start_two("fail_in_process_1")
    first, failed = (child.communicate(timeout=2 * processes.HEARTBEAT_TIMEOUT_S)[1] for child in children)
    assert children[1].returncode == 1 and "Traceback" in failed and "open an issue" in failed, failed[-3000:]
    assert "process 1 of 2 failed: 'a bug'" in failed
    assert_reports_a_loss(children[0], first)


def test_a_cache_is_the_same_for_any_number_of_processes(start_two, tmp_path):
    for child in start_two("fill_cache"):
        assert child.wait(BOUND_S) == 0, child.communicate()[1][-3000:]
    fill(str(tmp_path / "alone"))
    folders = [tmp_path / "cache", tmp_path / "alone"]
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert contents[0] == contents[1] and len(contents[0]) == 16  # Five shards of three files each, and cache.json.


def test_an_error_in_all_processes_is_printed_by_all(runs):
    children = runs.start_processes(
        2, f"--workdir={runs.folder / 'wrong'}", "--config.batch_size=6", "--config.num_steps=1"
    )
    assert [child.wait(BOUND_S) for child in children] == [1, 1]
    for k in range(2):
        stderr = runs.stderr(f"process_{k}")
        assert f"process {k} of 2 failed: The config does not fit" in stderr and "Use 8" in stderr
        assert "Traceback" not in stderr and "stack trace" not in stderr


@pytest.mark.parametrize(
    "number, expected", [(1, "cannot reach process 0 at"), (0, "but not all 2 processes joined within")]
)
def test_a_process_that_cannot_join_prints_one_line(tmp_path, number, expected):
    arguments = ["tests.runtime.programs", "join_within_a_second", free_address(), str(number)]
    child = start(tmp_path, 1, *arguments, stderr=subprocess.PIPE)
    stderr = child.communicate(timeout=BOUND_S)[1]
    assert child.returncode == 1, stderr[-3000:]
    assert stderr.startswith(f"dmm-jax: error: process {number} of 2 ") and expected in stderr
    assert stderr.count("\n") == 1


def test_incomplete_arguments_are_refused():
    with pytest.raises(UserError, match="give all three"), processes.joined(False, "localhost:1", None, 0):
        pass


def test_a_missing_cluster_is_an_error_that_names_the_arguments(runs):
    child = runs.start("nowhere", f"--workdir={runs.folder / 'nowhere'}", "--distributed")
    assert child.wait(BOUND_S) == 1 and "--coordinator HOST:PORT" in runs.stderr("nowhere")


def test_one_process_joins_without_arguments():
    with processes.joined(False):
        processes.wait_for_all("here")
    assert processes.is_first()
