"""What `bench` reads of a GPU's clock and power, from an `nvidia-smi` that answers as the real one."""

import os

import jax
import jax.numpy as jnp
import pytest

from dmm_jax.bench import timing

LINES = """1665, 1980, 686.73, 700.00, 0x0000000000000004
1755, 1980, 690.42, 700.00, 0x0000000000000004
1980, 1980, 310.00, 700.00, 0x0000000000000000
[N/A], 1980, [N/A], [N/A], 0x0000000000000000
17"""


def test_medians_of_clock_and_power_and_how_often_the_limit_held_the_clock_back():
    read = timing.read_power(LINES)
    assert read == {
        "sm_clock_mhz": 1755, "max_sm_clock_mhz": 1980, "power_w": 686.73, "power_limit_w": 700,
        "power_capped": pytest.approx(2 / 3),
    }  # fmt: skip
    assert timing.read_power("No devices were found\n") == {}


def test_the_gpus_that_run_are_read_while_they_run(tmp_path, monkeypatch):
    """The second of the visible ones is not among one device; the reading ends with the block, also by an error."""
    tool, asked, ended = (tmp_path / name for name in ("nvidia-smi", "asked", "ended"))
    tool.write_text(
        f"#!/bin/sh\ntrap 'touch {ended}; exit' TERM\ncat <<END\n{LINES}\nEND\necho \"$@\" > {asked}\n"
        "while true; do sleep 0.01; done\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    with timing.watched_power(1) as power:
        assert power == {}
    assert power == {} and not asked.exists()  # Not on a CPU.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(RuntimeError), timing.watched_power(1) as power:
        while not (asked.exists() and asked.read_text()):
            pass
        raise RuntimeError
    assert ended.exists() and "--id=5 " in asked.read_text()
    with timing.watched_power(2) as power:
        while "--id=5,3 " not in asked.read_text():
            pass
    assert power == timing.read_power(LINES)


def test_calls_that_are_queued_are_all_made():
    calls = []

    def call():
        calls.append(None)
        return jnp.ones(())

    assert timing.queued_s(call, 3) > 0 and len(calls) == 4
