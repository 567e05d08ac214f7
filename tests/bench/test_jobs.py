"""`bench` measures what it says it measures; speeds themselves are never tested."""

import json

import jax
import numpy as np
import pytest

from dmm_jax.bench import jobs, numerics
from dmm_jax.verbs import main as cli

CONTRACT = {
    "job", "images_per_s", "tflop_per_s", "matmul_peak_tflop_per_s", "compile_s", "batch", "step_s", "share_of_peak",
}  # fmt: skip


def config(**changes):
    values = jobs.get_config()
    values.teachers = values.teachers[:2]
    values.batch_size, values.dtype = 4, "float32"
    values.update(changes)
    return values


@pytest.mark.parametrize("measure", [jobs.bench_train, jobs.bench_host])
def test_a_batch_that_does_not_divide_among_the_devices_is_refused_with_one_that_does(monkeypatch, measure):
    eight = jobs.sharding.abstract_mesh(1, 8, 1, num_devices=8)
    monkeypatch.setattr(jobs.sharding, "make_mesh", lambda **_: eight)
    with pytest.raises(ValueError, match="batch_size 24 cannot be divided.*Use 32") as refused:
        measure(config(batch_size=24, validation_size=12), "tiny", 1)
    assert "validation_size" not in str(refused.value)  # Nothing is validated.


def test_more_devices_than_there_are_and_jobs_that_take_all_are_refused():
    with pytest.raises(ValueError, match="9 devices were asked for; there are 1"):
        jobs.bench_train(config(), "tiny", 1, num_devices=9)
    with pytest.raises(ValueError, match="`sample` takes all"):
        jobs.bench("sample", config(), "tiny", num_devices=1)


def test_sampling_is_timed_in_one_style_and_in_a_mix_per_image_by_one_program():
    one, mixed = jobs.bench_sample(config(), "tiny", num_steps=1, batch_size=2)
    assert one.keys() | {"matmul_peak_tflop_per_s", "share_of_peak"} >= CONTRACT
    assert mixed["compile_s"] < one["compile_s"] / 2  # Nothing but the first call's program.


def test_numerics_are_errors_relative_to_float32(monkeypatch):
    """One step is computed; it stands for both, a hundredth larger as bfloat16's."""
    loss, gradient = numerics._step(config(attention="xla"), "tiny")
    assert loss > 1e-3
    steps = {"float32": (loss, gradient), "bfloat16": (1.01 * loss, jax.tree.map(lambda leaf: 1.01 * leaf, gradient))}
    samples = {"float32": np.array([3.0, 4.0]), "bfloat16": np.array([3.0, 4.5])}
    monkeypatch.setattr(numerics, "_step", lambda values, size: steps[values.dtype])
    monkeypatch.setattr(numerics, "_sample", lambda values, size: samples[values.dtype])
    step, sample = jobs.bench("numerics", config(dtype="bfloat16"), "tiny")
    assert step["arithmetic"] == sample["arithmetic"] == "bfloat16, xla"
    for name in ("loss_error", "grad_norm_error", "gradient_error"):
        assert step[name] == pytest.approx(0.01, rel=1e-3)
    assert sample["latents_error"] == pytest.approx(0.1)
    assert "gradient_error" in jobs.table([step, sample]) and "images_per_s" not in jobs.table([step, sample])


def test_ratios_are_to_each_line_of_the_peer():
    ours, theirs = [{"images_per_s": 30.0}], [{"job": "a", "images_per_s": 10.0}, {"job": "b", "images_per_s": 60.0}]
    assert jobs.with_ratios(ours, theirs)[0]["ratio"] == {"a": 3.0, "b": 0.5}


def test_the_verb_prints_one_object_a_line(monkeypatch, capsys):
    lines = [{"job": "train", "images_per_s": 2.0, "tflop_per_s": 1.0}]
    monkeypatch.setattr(jobs, "bench", lambda *_: lines)
    monkeypatch.setattr(jobs, "peer", lambda *_: [{"job": "other", "images_per_s": 1.0}])
    assert cli.main(["bench", "train", "--json", "--against", "torch", "--config.batch_size=16"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["job"] for line in printed] == ["other", "train"] and printed[1]["ratio"] == {"other": 2.0}
    assert cli.main(["bench", "train"]) == 0
    assert "images_per_s" in capsys.readouterr().out


@pytest.mark.parametrize("job", ["numerics", "host", "fid", "scaling"])
def test_what_has_no_peer_is_not_compared(job, capsys):
    assert cli.main(["bench", job, "--against", "torch"]) == 1
    assert f"no peer of `{job}`" in capsys.readouterr().err


def test_what_is_no_number_of_devices_is_told_in_words(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "train", "--devices", "two"])
    assert "expected a number, or several as in 1,2,4; got 'two'" in capsys.readouterr().err


def test_a_peer_that_fails_is_an_error_with_its_last_words(monkeypatch, capsys):
    monkeypatch.setattr(jobs.sys, "executable", "/bin/false")
    assert cli.main(["bench", "sample", "--against", "torch"]) == 1
    assert "[torch] extra" in capsys.readouterr().err


def test_packing_the_state_halves_the_arrays_that_a_step_hands_over():
    whole, packed = jobs.bench("host", config(), "tiny", num_steps=2)
    assert packed["arrays"]["out"] < whole["arrays"]["out"] / 2
    assert packed["host_ms"] == pytest.approx(sum(packed["host_parts_ms"].values()))


@pytest.mark.parametrize("option", ["--num-steps", "--batch-size"])
def test_numbers_below_one_are_refused_before_anything_runs(option, capsys):
    assert cli.main(["bench", "train", option, "0", "--against", "torch"]) == 1
    assert f"{option} must be a whole number of at least 1; got 0." in capsys.readouterr().err
