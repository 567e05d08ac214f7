"""What a run says: scalars for TensorBoard, and silence from all processes but one."""

import struct
import sys
import time

import numpy as np
import pytest

from dmm_jax.runtime import metrics
from dmm_jax.runtime.metrics import HostClock, MetricsLog, read

METRICS = {"score": np.array([1.0, 3.0]), "feature": np.array([10.0, 30.0]), "grad_norm": np.float32(0.5)}
METRICS |= {"skipped_steps": np.int32(2), "skipped_in_a_row": np.int32(0)}


def logged(folder, **options):
    with MetricsLog(folder, 0, ["left", "right"], **options) as log:
        log.start_clock(0)
        log.train(4, 10, 8, {"score": 1.0, "feature": 0.1}, METRICS, None)
        log.validation(4, {"left": [1.0], "right": [2.0]}, None)
    return log.last


def events(folder):
    """Reads TensorBoard's files: records of length (8 bytes), checksum (4), event, checksum (4)."""
    from tensorboardX.proto.event_pb2 import Event

    for path in folder.glob("events.*"):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_tensorboard_gets_every_number_of_a_line(tmp_path):
    last = logged(tmp_path, tensorboard=True)
    found = {value.tag: (event.step, value.simple_value) for event in events(tmp_path) for value in event.summary.value}
    assert found["loss"] == (4, pytest.approx(4.0)) and last["loss"] == 4.0
    assert found["score/left"] == (4, 1.0) and found["feature/right"] == (4, 30.0)
    assert found["skipped_steps"] == (4, 2.0) and found["validation_loss"] == (4, 1.5)


def test_without_the_package_the_error_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match="pip install tensorboardX"):
        MetricsLog(tmp_path, 0, ["left"], tensorboard=True)
    assert not list(tmp_path.iterdir())


def test_a_process_that_does_not_write_knows_the_numbers_and_says_nothing(tmp_path, capsys):
    (tmp_path / "quiet").mkdir()
    (tmp_path / "loud").mkdir()
    quiet = logged(tmp_path / "quiet", writes=False, tensorboard=True)
    assert not list((tmp_path / "quiet").iterdir()) and capsys.readouterr().err == ""
    loud = logged(tmp_path / "loud")
    assert {k: v for k, v in quiet.items() if k not in ("images_per_s", "host_ms")} == {
        k: v for k, v in loud.items() if k not in ("images_per_s", "host_ms")
    }
    assert len(read(tmp_path / "loud" / "metrics.jsonl")) == 2
    assert "2 steps skipped" in capsys.readouterr().err


def test_the_hosts_time_of_a_step_leaves_out_the_waiting_and_is_the_median():
    clock = HostClock()
    for worked in (0.02, 0.02, 0.2):
        clock.restart()
        time.sleep(worked)
        with clock.waiting():
            time.sleep(0.1)
        clock.step_done()
    assert 20 <= clock.median_ms() < 100
    assert clock.median_ms() is None  # Told already.


def test_the_memory_that_is_told_is_the_fullest_devices(monkeypatch):
    class Device:
        def __init__(self, **told):
            self.memory_stats = lambda: told or None

    full, less, silent = Device(peak_bytes_in_use=3 * 2**30), Device(peak_bytes_in_use=2**30), Device()
    monkeypatch.setattr(metrics.jax, "local_devices", lambda: [silent, less, full])
    assert metrics.peak_memory() == {"peak_memory_gb": 3.0}
    monkeypatch.setattr(metrics.jax, "local_devices", lambda: [silent])
    assert metrics.peak_memory() == {}
