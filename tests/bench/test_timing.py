"""Clock and power of GPUs, read from a fake `nvidia-smi`, and the timing of queued calls."""

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


def test_power_readings_are_medians_and_the_capped_share():
    read = timing.read_power(LINES)
    assert read == {
        "sm_clock_mhz": 1755, "max_sm_clock_mhz": 1980, "power_w": 686.73, "power_limit_w": 700,
        "power_capped": pytest.approx(2 / 3),
    }  # fmt: skip
    assert timing.read_power("No devices were found\n") == {}


def test_only_the_used_gpus_are_read_during_the_block(tmp_path, monkeypatch):
    """With one device the second visible GPU is not read; an error in the block ends the reading too."""
    tool, query, ended = (tmp_path / name for name in ("nvidia-smi", "query", "ended"))
    tool.write_text(
        f"#!/bin/sh\ntrap 'touch {ended}; exit' TERM\ncat <<END\n{LINES}\nEND\necho \"$@\" > {query}\n"
        "while true; do sleep 0.01; done\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    with timing.watched_power(1) as power:
        assert power == {}
    assert power == {} and not query.exists()  # Not on a CPU.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(RuntimeError), timing.watched_power(1) as power:
        while not (query.exists() and query.read_text()):
            pass
        raise RuntimeError
    assert ended.exists() and "--id=5 " in query.read_text()
    with timing.watched_power(2) as power:
        while "--id=5,3 " not in query.read_text():
            pass
    assert power == timing.read_power(LINES)


def test_calls_that_are_queued_are_all_made():
    calls = []

    def call():
        calls.append(None)
        return jnp.ones(())

    assert timing.queued_s(call, 3) > 0 and len(calls) == 4
