"""Every job measures what its name says; speeds themselves are never tested."""

import json

import jax
import numpy as np
import pytest

from dmm_jax.bench import comparison, data, host, jobs, networks, numerics, sample, table, train
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


@pytest.mark.parametrize("measure", [train.measure, host.measure])
def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(monkeypatch, measure):
    eight = networks.sharding.abstract_mesh(1, 8, 1, num_devices=8)
    monkeypatch.setattr(networks.sharding, "make_mesh", lambda **_: eight)
    with pytest.raises(ValueError, match="batch_size 24 cannot be divided.*Use 32") as refused:
        measure(config(batch_size=24, validation_size=12), "tiny", 1)
    assert "validation_size" not in str(refused.value)  # No job validates.


def test_too_many_devices_and_devices_for_sampling_are_refused():
    with pytest.raises(ValueError, match="9 devices were asked for; there are 1"):
        train.measure(config(), "tiny", 1, num_devices=9)
    with pytest.raises(ValueError, match="`sample` takes all"):
        jobs.bench("sample", config(), "tiny", num_devices=1)


def test_one_program_samples_one_style_and_a_mix_per_image():
    one_style, mixes = sample.measure(config(), "tiny", num_steps=1, batch_size=2)
    assert one_style.keys() | {"matmul_peak_tflop_per_s", "share_of_peak"} >= CONTRACT
    assert mixes["compile_s"] < one_style["compile_s"] / 2  # The second job reuses the program.


def test_numerics_are_errors_relative_to_float32(monkeypatch):
    """One step is computed; bfloat16's is a copy that is one hundredth larger."""
    loss, gradient = numerics._step(config(attention="xla"), "tiny")
    assert loss > 1e-3
    steps = {"float32": (loss, gradient), "bfloat16": (1.01 * loss, jax.tree.map(lambda leaf: 1.01 * leaf, gradient))}
    samples = {"float32": np.array([3.0, 4.0]), "bfloat16": np.array([3.0, 4.5])}
    monkeypatch.setattr(numerics, "_step", lambda values, size: steps[values.dtype])
    monkeypatch.setattr(numerics, "_sample", lambda values, size: samples[values.dtype])
    step_row, sample_row = jobs.bench("numerics", config(dtype="bfloat16"), "tiny")
    assert step_row["arithmetic"] == sample_row["arithmetic"] == "bfloat16, xla"
    for name in ("loss_error", "grad_norm_error", "gradient_error"):
        assert step_row[name] == pytest.approx(0.01, rel=1e-3)
    assert sample_row["latents_error"] == pytest.approx(0.1)
    text = table.render([step_row, sample_row])
    assert "gradient_error" in text and "images_per_s" not in text


def test_ratios_are_to_each_row_of_the_peer():
    peer_rows = [{"job": "a", "images_per_s": 10.0}, {"job": "b", "images_per_s": 60.0}]
    (row,) = comparison.with_ratios([{"images_per_s": 30.0}], peer_rows)
    assert row["ratio"] == {"a": 3.0, "b": 0.5}


def test_the_verb_prints_one_object_per_line(monkeypatch, capsys):
    monkeypatch.setattr(jobs, "bench", lambda *_: [{"job": "train", "images_per_s": 2.0, "tflop_per_s": 1.0}])
    monkeypatch.setattr(comparison, "run_peer", lambda *_: [{"job": "other", "images_per_s": 1.0}])
    assert cli.main(["bench", "train", "--json", "--against", "torch", "--config.batch_size=16"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["job"] for row in printed] == ["other", "train"] and printed[1]["ratio"] == {"other": 2.0}
    assert cli.main(["bench", "train"]) == 0
    assert "images_per_s" in capsys.readouterr().out


def test_each_number_of_teachers_is_a_row_the_fewest_first(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(comparison, "run_peer", lambda *arguments: calls.append(arguments) or [])
    monkeypatch.setattr(jobs, "bench", lambda job, values, *_: [{"job": job, "teachers": len(values.teachers)}])
    command = ["bench", "train", "--json", "--size", "sdxl", "--teachers", "8,1", "--against", "torch"]
    assert cli.main([*command, "--config.batch_size=8"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["teachers"] for row in rows] == [1, 8] and calls == [("train", "sdxl", 8, 10, 1, 8)]


@pytest.mark.parametrize("arguments, message", [("sample --teachers 1", "`sample` takes the config's"),
                                                ("train --teachers 9", "must be 1 to 8"),
                                                ("train --teachers 0", "must be 1 to 8")])  # fmt: skip
def test_a_number_of_teachers_that_cannot_be_measured_is_refused(arguments, message, capsys):
    assert cli.main(["bench", *arguments.split()]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("job", ["numerics", "host", "fid", "scaling"])
def test_a_job_without_a_peer_is_not_compared(job, capsys):
    assert cli.main(["bench", job, "--against", "torch"]) == 1
    assert f"no peer of `{job}`" in capsys.readouterr().err


def test_a_word_as_number_of_devices_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "train", "--devices", "two"])
    assert "expected a number, or several as in 1,2,4; got 'two'" in capsys.readouterr().err


def test_a_peer_that_fails_is_an_error_that_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(comparison.sys, "executable", "/bin/false")
    assert cli.main(["bench", "sample", "--against", "torch"]) == 1
    assert "[torch] extra" in capsys.readouterr().err


def test_packing_halves_the_arrays_that_a_step_returns():
    unpacked, packed = jobs.bench("host", config(), "tiny", num_steps=2)
    assert packed["arrays"]["out"] < unpacked["arrays"]["out"] / 2
    assert packed["host_ms"] == pytest.approx(sum(packed["host_parts_ms"].values()))


@pytest.mark.parametrize("option", ["--num-steps", "--batch-size"])
def test_numbers_below_one_are_refused_before_any_measurement(option, capsys):
    assert cli.main(["bench", "train", option, "0", "--against", "torch"]) == 1
    assert f"{option} must be a whole number of at least 1; got 0." in capsys.readouterr().err


def test_simulated_hosts_read_equal_shares_and_no_example_twice(monkeypatch):
    monkeypatch.setattr(data, "EXAMPLES", 512)
    speed, shares = jobs.bench("data", config(), "tiny", num_steps=2)
    assert speed["images_per_s"] > 0 and shares["fewest_examples"] == shares["most_examples"] == 4
    assert shares["read_too_often"] == 0


def test_prepare_is_timed_part_by_part_and_whole(monkeypatch):
    monkeypatch.setattr(data, "NUM_PHOTOS", 2)
    monkeypatch.setattr(data, "PHOTO_SIDE", 128)
    values = config()
    values.data.resolution = 64
    rows = jobs.bench("prepare", values, "tiny", num_steps=1, batch_size=2)
    assert [row["job"] for row in rows] == [f"prepare: {part}" for part in ("decode", "fit", "encode", "all")]
    assert rows[3]["share_of_encode"] == pytest.approx(rows[3]["images_per_s"] / rows[2]["images_per_s"])
