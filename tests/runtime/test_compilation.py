"""Programs that were compiled once are loaded by the next process; nobody else can put one there."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from dmm_jax.runtime import compilation

PROGRAM = """
import sys
import jax
from jax import monitoring
from dmm_jax import compilation, train
import pathlib

counts = {"hits": 0, "misses": 0}
def count(event, **_):
    for name in counts:
        counts[name] += event == f"/jax/compilation_cache/cache_{name}"
monitoring.register_event_listener(count)
compilation.MIN_COMPILE_TIME_S = 0.0
assert compilation.use_cache() is not None
import ml_collections
config = ml_collections.ConfigDict(__import__("json").loads(pathlib.Path(sys.argv[1]).read_text()))
config.teachers = tuple(map(tuple, config.teachers))
train.run(config, sys.argv[2])
print("counts", counts["hits"], counts["misses"])
"""


@pytest.fixture
def unset(monkeypatch):
    """No cache is set, and what a test sets is taken back."""
    names = (
        "jax_compilation_cache_dir", "jax_enable_compilation_cache", "jax_persistent_cache_min_compile_time_secs",
    )  # fmt: skip
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_second_process_compiles_nothing(tiny, tmp_path):
    config = tiny[1].copy_and_resolve_references()
    config.num_steps, config.validation_every = 2, 0
    (tmp_path / "config.json").write_text(config.to_json())
    counted = []
    for name in ("first", "second"):
        environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "config.json"), str(tmp_path / name)],
            env=environment | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        counted.append([int(word) for word in done.stdout.split()[-2:]])
    (_, compiled), (loaded, compiled_again) = counted
    assert compiled > 0 and loaded == compiled and compiled_again == 0


def test_the_folder_is_the_users_alone(unset, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = compilation.use_cache()
    assert folder == tmp_path / "dmm_jax" / "xla" and folder.stat().st_mode & 0o777 == 0o700
    assert jax.config.jax_compilation_cache_dir == str(folder)


def test_a_folder_that_others_may_write_to_is_refused(unset, tmp_path, monkeypatch, capsys):
    shared = tmp_path / "dmm_jax" / "xla"
    shared.mkdir(parents=True)
    shared.chmod(0o777)
    with pytest.raises(ValueError, match="others may write to it"):
        compilation.use_cache(str(shared))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compilation.use_cache() is None and "not kept" in capsys.readouterr().err
    assert not jax.config.jax_compilation_cache_dir


def test_a_bucket_is_refused(unset):
    with pytest.raises(ValueError, match="compilation_cache: gs://bucket/x: what is compiled must lie on a file"):
        compilation.use_cache("gs://bucket/x")


def test_what_the_environment_says_comes_first(unset, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    assert compilation.use_cache() == pathlib.Path(tmp_path) and not any(tmp_path.iterdir())


def test_off_keeps_nothing(unset):
    assert compilation.use_cache("off") is None and not jax.config.jax_enable_compilation_cache
