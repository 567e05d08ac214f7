"""Ctrl-C and SIGTERM: before the first step they end all processes at once; test_processes.py has a run under way."""

import re
import signal
import subprocess

from dmm_jax.runtime import stopping
from tests.runtime.conftest import BOUND_S, start, wait_for


def test_the_first_ctrl_c_saves_and_the_second_exits_at_once(monkeypatch, capfd):
    exits, before = [], signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(stopping, "_exit", lambda *arguments: exits.append(arguments))
    with stopping.stop_requests() as stop:
        stop.begin()
        signal.raise_signal(signal.SIGINT)
        assert stop() and exits == [] and "Ctrl-C again stops at once" in capfd.readouterr().err
        stopped = stop.stopped("step 3 of 10")
        assert str(stopped) == "stopped by Ctrl-C after step 3 of 10, which is saved." and stopped.exit_code == 130
        signal.raise_signal(signal.SIGINT)
        assert exits[0] == (signal.SIGINT, stopping.AT_ONCE)
    assert signal.getsignal(signal.SIGINT) == before


def test_ctrl_c_before_the_first_step_exits_unless_it_is_ignored(monkeypatch):
    exits = []
    monkeypatch.setattr(stopping, "_exit", lambda *arguments: exits.append(arguments))
    with stopping.stop_requests():
        signal.raise_signal(signal.SIGINT)
        assert exits[0] == (signal.SIGINT, "nothing had to be saved.")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopping.stop_requests():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_sigterm_at_the_first_step_of_a_resumed_run_stops_after_it(start_two):
    outputs = [child.communicate(timeout=BOUND_S) for child in start_two("receive_sigterm_at_the_first_step")]
    assert all("[8]" in out.split("\n") for out, _ in outputs), "".join(err for _, err in outputs)[-3000:]


def test_ctrl_c_and_sigterm_stop_two_processes_after_one_step(start_two):
    outputs = [child.communicate(timeout=BOUND_S) for child in start_two("receive_ctrl_c_and_sigterm_under_way")]
    lines = [next((line for line in out.splitlines() if "stopped by" in line), "") for out, _ in outputs]
    assert re.fullmatch(r"stopped by Ctrl-C after step \d+, which is saved. 130", lines[0]), outputs
    assert lines[1] == lines[0].replace("Ctrl-C", "SIGTERM").replace("130", "0")


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
