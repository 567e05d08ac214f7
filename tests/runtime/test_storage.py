"""Where a run lives: a bucket is as good as a folder, by a server on this machine; what cannot be there is told."""

import os
import pathlib
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

import dmm_jax
from dmm_jax import train
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.export import export
from dmm_jax.checkpoints.inspect import inspect
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.states import StateStore
from dmm_jax.config import options as config
from dmm_jax.data.cache import LatentCache
from dmm_jax.runtime import metrics, storage
from dmm_jax.runtime.storage import staged_folder
from tests import fake_gcs

ROOT = pathlib.Path(dmm_jax.__file__).parent.parent
BOUND_S = 240  # Nothing here may take longer, however busy the machine is.


@pytest.fixture(scope="module")
def store():
    pytest.importorskip("gcsfs")
    with fake_gcs.serving() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        yield store


def killed_in_mid_save(store, config_file, workdir, step):
    """Runs `dmm-jax train` until a write of checkpoint `step` is under way, and kills it by signal 9."""
    command = [sys.executable, "-m", "dmm_jax", "train", f"--config={config_file}", f"--workdir={workdir}"]
    settings = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    }
    store.stalled = f"checkpoints/{step}/state/ocdbt"
    child = subprocess.Popen(command, env=settings, stderr=subprocess.PIPE, text=True)
    arrived = store.arrived.wait(BOUND_S)
    child.kill()
    said = child.communicate()[1]
    store.stalled = ""
    store.released.set()
    assert arrived, said[-3000:]


@pytest.fixture(scope="module")
def resumed(store, tiny, trained, tmp_path_factory):
    """A run in the bucket that was killed while it saved step 4, and resumed to the end; what was there between."""
    config_file = tmp_path_factory.mktemp("bucket") / "experiment.py"
    text = config.to_json(tiny[1])
    config_file.write_text(
        f"from dmm_jax.config.options import from_json\n\ndef get_config():\n    return from_json({text!r})\n"
    )
    killed_in_mid_save(store, config_file, "gs://runs/deep/run", 4)
    between = store.names()
    train.run(tiny[1].copy_and_resolve_references(), "gs://runs/deep/run")
    return "gs://runs/deep/run", between


def test_a_run_in_a_bucket_that_was_killed_in_mid_save_equals_one_in_a_folder_bit_for_bit(resumed, trained):
    workdir, between = resumed
    assert "deep/run/checkpoints/2/commit_success.txt" in between
    assert any(name.startswith("deep/run/checkpoints/4/") for name in between)
    assert "deep/run/checkpoints/4/commit_success.txt" not in between
    ours, theirs = (open_checkpoint(path).tensors("unet") for path in (workdir, trained))
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[key], theirs[key]) for key in ours)


def test_the_lines_of_the_metrics_are_those_of_a_run_in_a_folder(resumed, trained):
    ours, theirs = (
        [(line["step"], line.get("loss"), line.get("validation_loss")) for line in metrics.read(where)]
        for where in (f"{resumed[0]}/metrics.jsonl", trained / "metrics.jsonl")
    )
    assert ours == theirs


def test_a_run_in_a_bucket_is_inspected_and_exported(store, resumed, trained, tmp_path):
    store.write("deep/run/samples/step_0000006.png", b"picture")
    report = inspect([pathlib.Path(resumed[0])])["checkpoints"][0]  # As the command line brings it: pathlib folds "//".
    assert (report["path"], report["kind"], report["error"]) == (resumed[0], "workdir", "")
    outs = {resumed[0]: tmp_path / "ours", trained: tmp_path / "theirs"}
    exports = [export(run, out, ["dmm"], recipe=False) for run, out in outs.items()]
    ours, theirs = (open_checkpoint(paths[0]).tensors("unet") for paths in exports)
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    assert (exports[0][0] / "grid.png").read_bytes() == b"picture"


def test_pages_and_sample_grids_go_into_the_bucket(store):
    with staged_folder("gs://runs/shown/report") as part:
        (part / "index.html").write_text("page")
        (part / "a.png").write_bytes(b"picture")
    assert store.names("shown/") == ["shown/report/a.png", "shown/report/index.html"]


def test_a_save_returns_before_it_is_written(store):
    store.stalled, store.released = "later/checkpoints/1/state", threading.Event()
    late = threading.Timer(BOUND_S / 4, store.released.set)
    late.start()
    with StateStore("gs://runs/later") as states:
        states.save(1, state_of(1))
        assert not store.released.is_set()
        store.stalled = ""
        store.released.set()
    late.cancel()
    assert "later/checkpoints/1/commit_success.txt" in store.names()


def state_of(step):
    return {"step": jax.numpy.asarray(step), "params": {"kernel": jax.numpy.full((64, 8), step, jax.numpy.float32)}}


def test_a_damaged_newest_state_in_a_bucket_is_named_and_the_one_before_it_used(store, capsys):
    with StateStore("gs://runs/damaged") as states:
        for step in (2, 4):
            states.save(step, state_of(step))
    for name in store.names("damaged/checkpoints/4/state/d/"):
        del store.objects[name]
    with StateStore("gs://runs/damaged") as states:
        step, state = states.resume(state_of(0))
        assert step == 2 and np.array_equal(state["params"]["kernel"], state_of(2)["params"]["kernel"])
        assert "gs://runs/damaged/checkpoints/4 is damaged" in capsys.readouterr().err
        states.save(4, state_of(4))  # Its place is free again.
    assert store.names("damaged/checkpoints/damaged_4/")
    with StateStore("gs://runs/damaged") as states:
        assert states.resume(state_of(0))[0] == 4


def test_the_last_ones_and_every_so_many_th_are_kept_in_a_bucket(store):
    with StateStore("gs://runs/kept", keep_last=1, keep_every=2) as states:
        for step in (1, 2, 3):
            states.save(step, state_of(step))
    assert {name.split("/")[2] for name in store.names("kept/checkpoints/")} == {"2", "3"}


def test_a_bucket_that_is_not_there_is_told(store):
    with pytest.raises(ValueError, match="gs://elsewhere/run cannot be used: there is no bucket.*buckets create"):
        config.load("gs://elsewhere/run")


def test_a_place_in_a_bucket_that_holds_other_things_is_no_place_for_a_run(store, tiny):
    store.write("mine/thesis.tex", b"mine")
    with pytest.raises(ValueError, match="gs://runs/mine is not empty and holds no run .*thesis.tex"):
        train.run(tiny[1], "gs://runs/mine")


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_missing_permission_is_told_with_the_role_that_gives_it(store, tiny, method, monkeypatch):
    monkeypatch.setattr(store, "denied", {method})
    with pytest.raises(ValueError, match="gs://runs/new cannot be used: .*objects access.*roles/storage.admin"):
        train.run(tiny[1].copy_and_resolve_references(), "gs://runs/new")


@pytest.mark.parametrize(
    "path, told",
    [
        ("s3://bucket/run", r"s3://bucket/run: .*s3:// has not been tried.*all hosts share"),
        ("gs://bucket", r"gs://bucket names a whole bucket.*gs://bucket/NAME"),
    ],
)
def test_what_no_run_can_be_kept_in_is_told(path, told):
    for given in (path, pathlib.Path(path)):
        with pytest.raises(ValueError, match=told):
            storage.locate(given)


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="gs://bucket/run needs the package gcsfs: pip install gcsfs"):
        storage.locate("gs://bucket/run")


@pytest.mark.parametrize("use", [LatentCache, storage.check_output])
def test_what_is_mapped_or_run_from_a_disk_is_refused_in_a_bucket(use):
    with pytest.raises(ValueError, match=r"gs://bucket/x.*gcloud storage cp -r"):
        use("gs://bucket/x")


def test_a_teacher_in_a_bucket_is_refused_with_the_command_that_copies_it(store):
    store.write("teacher/model_index.json", b"{}")
    with pytest.raises(CheckpointError, match="gcloud storage cp -r gs://runs/teacher FOLDER"):
        open_checkpoint("gs://runs/teacher")


def test_a_path_without_a_scheme_is_a_folder(tmp_path):
    assert storage.locate(tmp_path) == tmp_path and not storage.in_bucket(tmp_path / "gs:" / "x")
