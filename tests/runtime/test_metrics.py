"""metrics.jsonl and TensorBoard; a process that does not write is silent."""

import struct
import sys
import time
import types

import numpy as np
import pytest

from dmm_jax.runtime import metrics
from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.metrics import HostClock, MetricsLog, losses_table, read
from dmm_jax.runtime.trackers import open_trackers

METRICS = {"score": np.array([1.0, 3.0]), "feature": np.array([10.0, 30.0]), "grad_norm": np.float32(0.5)}
METRICS |= {"skipped_steps": np.int32(2), "skipped_in_a_row": np.int32(0)}


def write_log(folder, **options):
    with MetricsLog(folder, 0, ["left", "right"], **options) as log:
        log.start_clock(0)
        log.train(4, 10, 8, {"score": 1.0, "feature": 0.1}, METRICS, None)
        log.validation(4, {"left": [1.0], "right": [2.0]}, None)
    return log.last


def tensorboard_events(folder):
    """Reads TensorBoard's files: records of length (8 bytes), checksum (4), event, checksum (4)."""
    from tensorboardX.proto.event_pb2 import Event

    for path in folder.glob("events.*"):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_tensorboard_gets_every_number_of_a_line(tmp_path):
    last = write_log(tmp_path, trackers=open_trackers(["tensorboard"], tmp_path, {}))
    scalars = {
        value.tag: (event.step, value.simple_value)
        for event in tensorboard_events(tmp_path)
        for value in event.summary.value
    }
    assert scalars["loss"] == (4, pytest.approx(4.0)) and last["loss"] == 4.0
    assert scalars["score/left"] == (4, 1.0) and scalars["feature/right"] == (4, 30.0)
    assert scalars["skipped_steps"] == (4, 2.0) and scalars["validation_loss"] == (4, 1.5)


def test_without_tensorboardx_the_error_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match="pip install tensorboardX"):
        open_trackers(["tensorboard"], tmp_path, {})
    assert not list(tmp_path.iterdir())


def test_weights_and_biases_continues_the_curves_of_a_workdir(tmp_path, monkeypatch):
    calls, steps = [], []
    run = types.SimpleNamespace(log=lambda scalars, step: steps.append((step, scalars)), finish=lambda: steps.append(0))
    fake = types.SimpleNamespace(init=lambda **options: calls.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        write_log(tmp_path, trackers=open_trackers(["wandb"], tmp_path, {"seed": 3}))
    assert calls[0] == calls[1] and calls[0]["resume"] == "allow" and calls[0]["config"] == {"seed": 3}
    assert [step and step[0] for step in steps] == 2 * [4, 4, 0] and steps[0][1]["score/left"] == 1.0


def test_an_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(UserError, match="did you mean tensorboard"):
        open_trackers(["tensorbord"], tmp_path, {})


def test_a_validation_may_leave_its_table_to_the_end(tmp_path, capsys):
    with MetricsLog(tmp_path, 0, ["left", "right"]) as log:
        for with_table in (True, False):
            log.validation(4, {"left": [1.0], "right": [2.0]}, None, with_table=with_table)
    assert capsys.readouterr().err.count("style") == 1


def test_the_table_of_losses_has_both_ends_and_the_last_validation(capsys):
    lines = [{"step": step, "score": {"left": 1.0 / step, "right": 2.0}} for step in (1, 5, 10)]
    lines.insert(2, {"step": 7, "validation": {"left": [0.5, None, 1.0], "right": [None]}})
    assert losses_table(lines).splitlines() == [
        "style  score at step 1  score at step 10  validation",
        "left           1.00000           0.10000     0.75000",
        "right          2.00000           2.00000         nan",
    ]


def test_a_process_that_does_not_write_has_the_same_numbers(tmp_path, capsys):
    (tmp_path / "silent").mkdir()
    (tmp_path / "writing").mkdir()
    silent = write_log(tmp_path / "silent", writes=False)
    assert not list((tmp_path / "silent").iterdir()) and capsys.readouterr().err == ""
    writing = write_log(tmp_path / "writing")
    for numbers in (silent, writing):
        del numbers["images_per_s"], numbers["host_ms"]
    assert silent == writing and len(read(tmp_path / "writing" / "metrics.jsonl")) == 2
    assert "2 steps skipped" in capsys.readouterr().err


def test_damage_before_the_last_line_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read(path) == [{"step": 1}]
    path.write_text('{"st\n{"step": 2}\n')
    with pytest.raises(UserError, match="metrics.jsonl, line 1 is not JSON"):
        read(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="metrics.jsonl is not UTF-8 text"):
        read(path)


def test_host_time_is_the_median_without_waiting():
    clock = HostClock()
    for busy_s in (0.02, 0.02, 0.2):
        clock.restart()
        time.sleep(busy_s)
        with clock.waiting():
            time.sleep(0.1)
        clock.step_done()
    assert 20 <= clock.median_ms() < 100
    assert clock.median_ms() is None  # No step since the last call.


def test_peak_memory_is_that_of_the_fullest_device():
    full, half = {"peak_bytes_in_use": 3 * 2**30}, {"peak_bytes_in_use": 2**30}
    assert metrics.peak_of([None, half, full, {}]) == {"peak_memory_gb": 3.0}
    assert metrics.peak_of([None, {}]) == {}
