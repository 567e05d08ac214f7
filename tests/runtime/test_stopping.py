"""SIGTERM before the first step ends all processes at once; test_processes.py has SIGTERM to a run under way."""

import subprocess

from tests.runtime.conftest import BOUND_S, start, wait_for


def test_sigterm_at_the_first_step_of_a_resumed_run_stops_after_it(start_two):
    outputs = [child.communicate(timeout=BOUND_S) for child in start_two("receive_sigterm_at_the_first_step")]
    assert all("[8]" in out.split("\n") for out, _ in outputs), "".join(err for _, err in outputs)[-3000:]


def test_sigterm_to_one_process_before_the_first_step_ends_all(start_two):
    children = start_two("receive_sigterm_before_the_first_step")
    outputs = [child.communicate(timeout=BOUND_S) for child in children]
    assert [child.returncode for child in children] == [0, 0], "".join(err for _, err in outputs)[-3000:]
    assert ["nothing had to be saved" in err for _, err in outputs] == [True, False]


def test_sigterm_before_the_first_step_ends_a_process_that_compiles(tmp_path):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    child = start(tmp_path, 1, "tests.runtime.programs", "stay_in_c_alone", **pipes)
    assert child.stdout.readline() == "ready\n"
    child.terminate()
    assert "nothing had to be saved" in child.communicate(timeout=BOUND_S / 10)[1] and child.returncode == 0


def test_sigterm_while_a_run_loads_its_teachers_ends_it(runs):
    child = runs.start("loading", f"--workdir={runs.folder / 'loading'}")
    wait_for(lambda: "Teacher 'left' has no text_encoder" in runs.stderr("loading"), [child])
    child.terminate()
    assert child.wait(BOUND_S / 10) == 0
    assert "stopped by SIGTERM: nothing had to be saved." in runs.stderr("loading")
    assert not (runs.folder / "loading" / "metrics.jsonl").exists()
