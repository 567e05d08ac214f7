"""`dmm-jax prepare`: impossible options are refused before a picture is drawn."""

import pathlib
import re

import pytest

from dmm_jax.distill import teacher_samples
from dmm_jax.verbs import main as cli


def test_a_dry_run_counts_the_images_and_writes_nothing(experiment, tmp_path, capsys):
    arguments = [experiment()[0], f"--config.data.cache={tmp_path / 'cache'}", "--dry-run"]
    assert cli.main(["prepare", *arguments]) == 0
    assert "24 images would be encoded into" in capsys.readouterr().err and not (tmp_path / "cache").exists()


def test_prepare_ends_with_the_command_that_trains(monkeypatch, capsys):
    monkeypatch.setattr(teacher_samples, "prepare_cache", lambda *arguments: None)
    assert cli.main(["prepare", "--config=sd15", "--config.data.cache=my cache"]) == 0
    command = "dmm-jax train --config=sd15 --workdir=runs/sd15 '--config.data.cache=my cache'"
    assert capsys.readouterr().err.endswith(f"\nNext:\n  {command}\n")


def test_the_readme_trains_in_the_workdirs_that_prepare_names():
    readme = (pathlib.Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    runs = re.findall(r"dmm-jax train --config=(\S+) --workdir=(\S+)", readme)
    assert len(runs) == 2 and all(workdir == f"runs/{pathlib.Path(config).stem}" for config, workdir in runs)


@pytest.mark.parametrize(
    "option, expected",
    [
        ("base=nothing_here", "there is no checkpoint"),
        ("seed=-1", "seed must not be negative"),
        ("dtype=foo", "dtype must be one of float32, bfloat16"),
        ("data.resolution=0", "data.resolution must be at least 1"),
        ("data.resolution=60", "data.resolution must be a multiple of 8 pixels; got 60. Use 56"),
    ],
)
def test_impossible_options_write_nothing(failing, experiment, tmp_path, option, expected):
    arguments = [experiment()[0], f"--config.data.cache={tmp_path / 'cache'}", f"--config.{option}"]
    assert expected in failing("prepare", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["experiment.py"]
