"""A run's folder: a stranger's is left alone, and nothing is written before all that can be refused was read."""

import json
import os

import numpy as np
import pytest

from dmm_jax import train
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, save
from dmm_jax.config import workdirs


def copied(config):
    return config.copy_and_resolve_references()


def with_nan(source, target, tensor):
    """Writes a safetensors file again, with one NaN in a tensor."""
    file = TensorFile(source)
    tensors = {key: np.array(array) for key, array in file.items()}
    tensors[tensor].flat[0] = np.nan
    target.parent.mkdir(parents=True, exist_ok=True)
    save(target, tensors, file.metadata)


def test_a_refused_run_leaves_nothing_behind(tiny, tmp_path):
    with_nan(tiny[0]["left"], tmp_path / "bad.safetensors", "model.diffusion_model.out.2.weight")
    config = copied(tiny[1])
    config.teachers = (("other", str(tmp_path / "bad.safetensors")),)
    with pytest.raises(ValueError, match="NaN"):
        train.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert workdirs.check(tmp_path / "run", tiny[1]) == []


def test_nan_in_the_base_is_refused_whatever_the_student_starts_from(tiny, tmp_path):
    for path in tiny[0]["base"].rglob("*"):
        if path.is_file():
            (tmp_path / "base" / path.relative_to(tiny[0]["base"])).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "base" / path.relative_to(tiny[0]["base"])).write_bytes(path.read_bytes())
    unet = "unet/diffusion_pytorch_model.safetensors"
    with_nan(tiny[0]["base"] / unet, tmp_path / "base" / unet, "conv_in.weight")
    config = copied(tiny[1])
    config.base, config.student_init = str(tmp_path / "base"), "average"
    with pytest.raises(ValueError, match="conv_in.weight"):
        train.run(config, tmp_path / "run")


@pytest.mark.parametrize(
    "name, value",
    [
        ("student_init", "base"),
        ("style_init", "paper"),
        ("ema_decay", 0.9),
        ("ema_width", 0.1),
        ("optimizer", "muon"),
        ("max_grad_norm", 0.0),
        ("style_learning_rate_scale", 2.0),
        ("adversarial.weight", 0.1),
    ],
)
def test_options_that_change_the_arrays_of_a_checkpoint_are_refused(tiny, trained, name, value):
    before = (trained / "config.json").read_bytes()
    config = copied(tiny[1])
    config.update_from_flattened_dict({name: value})
    with pytest.raises(
        ValueError, match=f"cannot resume with {name}: .* -> {value!r}: its checkpoints started from, or hold"
    ):
        train.run(config, trained)
    assert (trained / "config.json").read_bytes() == before


def test_options_that_no_longer_exist_are_reported(tiny, tmp_path):
    workdirs.write_config(tmp_path, tiny[1])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"old": 1, "mesh": {"ring": 2}}))
    changes = workdirs.check(tmp_path, tiny[1])
    assert changes == ["mesh.ring: 2 -> no longer an option", "old: 1 -> no longer an option"]


def test_a_resume_that_fails_leaves_the_config_as_it_was(tiny, trained, monkeypatch):
    def fail(*_):
        raise ValueError("unreadable")

    before = (trained / "config.json").read_bytes()
    monkeypatch.setattr(train.StateStore, "resume", fail)
    config = copied(tiny[1])
    config.learning_rate = 0.5
    with pytest.raises(ValueError, match="unreadable"):
        train.run(config, trained)
    assert (trained / "config.json").read_bytes() == before


def test_only_an_empty_folder_or_the_runs_own_cache_is_accepted(tiny, tmp_path):
    config = copied(tiny[1])
    config.data.cache = str(tmp_path / "cache")
    for name in ("cache", "checkpoints"):
        (tmp_path / name).mkdir()
    (tmp_path / "cache" / "cache.json").write_text("{}")
    assert workdirs.check(tmp_path, config) == []
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="holds no run .*thesis.tex.*new folder"):
        train.run(tiny[1], tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        workdirs.check(tmp_path / "thesis.tex", config)


def test_an_unwritable_folder_is_refused_at_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="no permission"):
        workdirs.check(tmp_path / "run", tiny[1])
