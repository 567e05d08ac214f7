"""Runs in a bucket equal runs in a folder (a server on this machine is the bucket), and paths that are refused."""

import os
import pathlib
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from etils import epath

import dmm_jax
from dmm_jax import train
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.export import export
from dmm_jax.checkpoints.inspect import inspect
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.states import StateStore
from dmm_jax.config.serialization import load_config
from dmm_jax.runtime import locks, metrics, storage
from dmm_jax.runtime.errors import UserError, message
from tests import fake_gcs
from tests.experiments import write_experiment

ROOT = pathlib.Path(dmm_jax.__file__).parent.parent
BOUND_S = 240  # The longest time for anything here, on a busy machine.


@pytest.fixture(scope="module")
def store():
    pytest.importorskip("gcsfs")
    with fake_gcs.reachable() as store:
        yield store


def kill_during_save(store, experiment, workdir, step):
    """Runs `dmm-jax train` until it writes checkpoint `step`, and kills it by signal 9."""
    command = [sys.executable, "-m", "dmm_jax", "train", f"--config={experiment}", f"--workdir={workdir}"]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }
    store.stalled = f"checkpoints/{step}/state/ocdbt"
    child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    arrived = store.arrived.wait(BOUND_S)
    child.kill()
    stderr = child.communicate()[1]
    store.stalled = ""
    store.released.set()
    assert arrived, stderr[-3000:]


@pytest.fixture(scope="module")
def resumed(store, tiny, trained, tmp_path_factory):
    """A finished run in the bucket that was killed while it saved step 4; its path, and the objects after the kill."""
    experiment = write_experiment(tmp_path_factory.mktemp("bucket") / "experiment.py", tiny[1])
    kill_during_save(store, experiment, "gs://runs/deep/run", 4)
    names = store.names()
    train.run(tiny[1].copy_and_resolve_references(), "gs://runs/deep/run")
    return "gs://runs/deep/run", names


def test_a_run_that_a_save_was_killed_in_equals_one_in_a_folder(resumed, trained):
    workdir, names = resumed
    assert "deep/run/checkpoints/2/commit_success.txt" in names
    assert any(name.startswith("deep/run/checkpoints/4/") for name in names)
    assert "deep/run/checkpoints/4/commit_success.txt" not in names
    actual, expected = (open_checkpoint(path).tensors("unet") for path in (workdir, trained))
    assert actual.keys() == expected.keys() and all(np.array_equal(actual[key], expected[key]) for key in actual)


def test_metrics_in_a_bucket_equal_those_in_a_folder(resumed, trained):
    actual, expected = (
        [(line["step"], line.get("loss"), line.get("validation_loss")) for line in metrics.read(path)]
        for path in (f"{resumed[0]}/metrics.jsonl", trained / "metrics.jsonl")
    )
    assert actual == expected


def test_a_run_in_a_bucket_is_inspected_and_exported(store, resumed, trained, tmp_path):
    store.write("deep/run/samples/step_0000006.png", b"picture")
    report = inspect([pathlib.Path(resumed[0])])["checkpoints"][0]  # pathlib folds "//", as on the command line.
    assert (report["path"], report["kind"], report["error"]) == (resumed[0], "workdir", "")
    folders = {resumed[0]: tmp_path / "bucket", trained: tmp_path / "folder"}
    exports = [export(run, folder, ["dmm"], recipe=False) for run, folder in folders.items()]
    actual, expected = (open_checkpoint(paths[0]).tensors("unet") for paths in exports)
    assert all(np.array_equal(actual[key], expected[key]) for key in expected)
    assert (exports[0][0] / "grid.png").read_bytes() == b"picture"


def test_a_staged_folder_is_copied_into_a_bucket_page_last(store):
    with storage.staged_folder("gs://runs/shown/report") as stage:
        (stage / "index.html").write_text("page")
        (stage / "a.png").write_bytes(b"picture")
    assert store.names("shown/") == ["shown/report/a.png", "shown/report/index.html"]
    assert store.objects["shown/report/a.png"][0] < store.objects["shown/report/index.html"][0]


def test_a_save_returns_before_it_is_written(store):
    store.stalled, store.released = "later/checkpoints/1/state", threading.Event()
    timer = threading.Timer(BOUND_S / 4, store.released.set)
    timer.start()
    with StateStore("gs://runs/later") as states:
        states.save(1, state_of(1))
        assert not store.released.is_set()
        store.stalled = ""
        store.released.set()
    timer.cancel()
    assert "later/checkpoints/1/commit_success.txt" in store.names()


def state_of(step):
    return {"step": jax.numpy.asarray(step), "params": {"kernel": jax.numpy.full((64, 8), step, jax.numpy.float32)}}


def test_a_damaged_newest_state_is_named_and_the_previous_one_used(store, capsys):
    with StateStore("gs://runs/damaged") as states:
        for step in (2, 4):
            states.save(step, state_of(step))
    for name in store.names("damaged/checkpoints/4/state/d/"):
        del store.objects[name]
    with StateStore("gs://runs/damaged") as states:
        step, state = states.resume(state_of(0))
        assert step == 2 and np.array_equal(state["params"]["kernel"], state_of(2)["params"]["kernel"])
        assert "gs://runs/damaged/checkpoints/4 is damaged" in capsys.readouterr().err
        states.save(4, state_of(4))  # The damaged one has been moved away.
    assert store.names("damaged/checkpoints/damaged_4/")
    with StateStore("gs://runs/damaged") as states:
        assert states.resume(state_of(0))[0] == 4


def test_a_bucket_keeps_the_last_states_and_every_nth(store):
    with StateStore("gs://runs/kept", keep_last=1, keep_every=2) as states:
        for step in (1, 2, 3):
            states.save(step, state_of(step))
    assert {name.split("/")[2] for name in store.names("kept/checkpoints/")} == {"2", "3"}


def test_the_newer_run_in_a_bucket_takes_over_and_the_older_ends(store, capsys):
    workdir = storage.locate("gs://runs/locked")
    with locks.lock(workdir) as check_first:
        check_first()
        (workdir / locks.NAME).write_text("process 2 on elsewhere")
        with pytest.raises(UserError, match="taken over by process 2"):
            check_first()
        with locks.lock(workdir) as check_second:
            check_second()
        assert "in use by process 2 on elsewhere, or that process was killed" in capsys.readouterr().err
    assert store.names("locked/") == []


def test_a_missing_bucket_is_named_with_the_command_that_makes_it(store):
    with pytest.raises(UserError, match="gs://elsewhere/run cannot be used: there is no bucket.*buckets create"):
        load_config("gs://elsewhere/run")


def test_a_workdir_in_a_bucket_with_other_files_is_refused(store, tiny):
    store.write("mine/thesis.tex", b"mine")
    with pytest.raises(UserError, match="gs://runs/mine is not empty and holds no run .*thesis.tex"):
        train.run(tiny[1], "gs://runs/mine")


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_missing_permission_is_named_with_its_role(store, tiny, method, monkeypatch):
    monkeypatch.setattr(store, "denied", {method})
    with pytest.raises(UserError, match="gs://runs/new cannot be used: .*objects access.*roles/storage.admin"):
        train.run(tiny[1].copy_and_resolve_references(), "gs://runs/new")


@pytest.mark.parametrize(
    "path, expected",
    [
        ("s3://bucket/run", r"s3://bucket/run: .*s3:// has not been tried.*all hosts share"),
        ("gs://bucket", r"gs://bucket names a whole bucket.*gs://bucket/NAME"),
    ],
)
def test_other_stores_and_whole_buckets_are_refused(path, expected):
    for form in (path, pathlib.Path(path)):
        with pytest.raises(UserError, match=expected):
            storage.locate(form)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match="gs://bucket/run needs the package gcsfs: pip install gcsfs"):
        storage.locate("gs://bucket/run")


def test_outputs_are_refused_in_a_bucket():
    with pytest.raises(UserError, match=r"gs://bucket/x.*gcloud storage cp -r"):
        storage.check_output("gs://bucket/x")


def test_a_teacher_in_a_bucket_is_refused_with_a_command(store):
    store.write("teacher/model_index.json", b"{}")
    with pytest.raises(CheckpointError, match="gcloud storage cp -r gs://runs/teacher FOLDER"):
        open_checkpoint("gs://runs/teacher")


def test_parts_of_processes_that_are_gone_are_deleted(tmp_path):
    own = storage.part_of(tmp_path / "out").name
    gone, running = (own.replace(str(os.getpid()), str(pid)) for pid in (2**22 + 1, os.getppid()))
    (tmp_path / gone).mkdir()
    (tmp_path / own).symlink_to(tmp_path / "elsewhere")
    kept = {running, own.replace(socket.gethostname(), "otherhost"), ".out.part", f".out2{own.removeprefix('.out')}"}
    for name in kept:
        (tmp_path / name).write_text("")
    storage.part_of(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_a_file_appears_whole_and_follows_no_link(tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("mine")
    path = tmp_path / "notes.txt"
    for name in (path.name, storage.part_of(path).name):
        (tmp_path / name).symlink_to(tmp_path / "mine")
    with storage.whole_file(path) as file:
        file.write("grün")
        assert path.is_symlink()
    assert path.read_text("utf-8") == "grün" and not path.is_symlink()
    with pytest.raises(OSError) as full, storage.whole_file(path, "xb") as file:
        file.write(b"half")
        raise OSError(28, "No space left on device")
    assert message(full.value) == f"{path}: No space left on device" and path.read_text("utf-8") == "grün"
    planted = tmp_path / "planted"
    planted.symlink_to(tmp_path / "mine")
    monkeypatch.setattr(storage, "part_of", lambda path: planted)  # Somebody planted it just after part_of looked.
    with pytest.raises(FileExistsError), storage.whole_file(path):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "notes.txt"}
    assert (tmp_path / "mine").read_text() == "mine"


def test_an_error_without_a_path_gets_the_one_that_was_written(tmp_path):
    for name in ("", "inside"):
        with pytest.raises(OSError) as full, storage.staged_folder(tmp_path / "out") as stage:
            raise OSError(28, "No space left on device", *([stage / name] if name else []))
        assert message(full.value) == f"{tmp_path / 'out'}: No space left on device"


def test_a_path_without_a_scheme_is_a_folder(tmp_path):
    assert storage.locate(tmp_path) == tmp_path and not storage.in_bucket(tmp_path / "gs:" / "x")


def test_a_text_of_gigabytes_is_refused_unread(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**33)  # A hole takes no space on the disk.
    with pytest.raises(UserError, match="config.json is larger than [0-9]+ bytes"):
        storage.read_json(tmp_path / "config.json")


def test_what_is_no_regular_file_is_neither_read_nor_replaced(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name in ("fifo", "folder"):
        for path in (tmp_path / name, epath.Path(tmp_path / name)):
            with pytest.raises(UserError, match=f"{name} is no regular file"):
                storage.read_text(path)
    with pytest.raises(UserError, match="folder is a folder"), storage.whole_file(tmp_path / "folder"):
        pass


def test_text_that_is_not_utf8_is_refused_with_its_place(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes("\ufeffgrün".encode())
    assert storage.read_text(path) == "grün"
    path.write_bytes("grün".encode("latin-1"))
    with pytest.raises(UserError, match="notes.txt is not UTF-8 text .* at byte 2"):
        storage.read_text(path)
