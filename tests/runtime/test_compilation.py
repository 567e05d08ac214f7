"""The cache of compiled programs: the next process loads them, and no other user can write one."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from dmm_jax.config.serialization import to_json
from dmm_jax.runtime import compilation

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def unset():
    """Unsets JAX's cache for a test and restores its settings."""
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_second_process_compiles_nothing(tiny, tmp_path):
    config = tiny[1].copy_and_resolve_references()
    config.num_steps, config.validation_every = 2, 0
    (tmp_path / "config.json").write_text(to_json(config))
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}

    def counts(workdir):
        program = ["tests.runtime.programs", "train_and_count_compilations", tmp_path / "config.json", workdir]
        process = subprocess.run(
            [sys.executable, "-m", *map(str, program)], env=environment, capture_output=True, text=True
        )
        assert process.returncode == 0, process.stderr
        return json.loads(process.stdout.splitlines()[-1])

    first, second = counts(tmp_path / "first"), counts(tmp_path / "second")
    assert first["misses"] > 0 and second == {"hits": first["misses"], "misses": 0}


def test_the_default_folder_belongs_to_the_user_alone(unset, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = compilation.use_cache()
    assert folder == tmp_path / "dmm_jax" / "xla" and folder.stat().st_mode & 0o777 == 0o700
    assert jax.config.jax_compilation_cache_dir == str(folder)


def test_a_folder_that_others_may_write_to_is_refused(unset, tmp_path, monkeypatch, capsys):
    shared = tmp_path / "dmm_jax" / "xla"
    shared.mkdir(parents=True)
    shared.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compilation.use_cache() is None
    message = capsys.readouterr().err
    assert "not kept" in message and "others may write to it" in message
    assert not jax.config.jax_compilation_cache_dir


def test_a_folder_that_the_environment_sets_has_precedence(unset, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    assert compilation.use_cache() == pathlib.Path(tmp_path) and not any(tmp_path.iterdir())


def test_a_cache_that_the_environment_disables_keeps_nothing(unset):
    jax.config.update("jax_enable_compilation_cache", False)
    assert compilation.use_cache() is None and not jax.config.jax_compilation_cache_dir


def test_a_first_compilation_says_that_it_takes_long_and_later_ones_how_long(unset, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        with compilation.announced("the step", "a program"):
            pass
    first, done, second, _ = capsys.readouterr().err.splitlines()
    assert "a minute or more" in first and "later starts" in first
    assert done == "Compiled the step in 0 s" and second == "Compiling the step (the last time: 0 s)"
