"""The wheel holds all that the command line needs, outside the repository."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE", "dmm_jax", "configs")
MAX_BYTES = 50_000_000
FIRST_STEPS = """
import sys, pathlib
import dmm_jax
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.serve.app import STATIC
from dmm_jax.verbs.main import main
from dmm_jax.world import demo_config

assert pathlib.Path(dmm_jax.__file__).is_relative_to(sys.argv[1])
config = demo_config.get_config()
assert main(["list", "configs"]) == 0
assert main(["config", "sd15"]) == 0
assert main(["inspect", config.base, *(path for _, path in config.teachers)]) == 0
size = ["--config.data.num_examples=8", "--config.data.cache=cache"]
assert main(["prepare", "--config=demo_gpu", *size]) == 0
assert main(["list", "emoji"]) == main(["list", "models"]) == 0
assert open_checkpoint("demo").styles and open_checkpoint("emoji").styles and (STATIC / "index.html").is_file()
"""


@pytest.mark.slow
def test_the_demo_begins_from_an_installed_wheel_in_another_folder(tmp_path):
    source, installed, elsewhere = (tmp_path / name for name in ("source", "installed", "elsewhere"))
    source.mkdir(), elsewhere.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = source.glob("*.whl")
    assert wheel.stat().st_size <= MAX_BYTES
    zipfile.ZipFile(wheel).extractall(installed)
    shutil.rmtree(source)
    run = [sys.executable, "-c", FIRST_STEPS, str(installed)]
    done = subprocess.run(
        run, cwd=elsewhere, env=os.environ | {"PYTHONPATH": str(installed)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "sd15_paper" in done.stdout and "--config.batch_size=48" in done.stdout
    assert (elsewhere / "cache" / "cache.json").is_file()
