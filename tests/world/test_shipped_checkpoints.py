"""The shipped checkpoints: their size and formats, and that they can be merged."""

import pathlib

import pytest

from dmm_jax.checkpoints.inspect import inspect
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.config import checks
from dmm_jax.world import demo_config
from dmm_jax.world.shipped_checkpoints import BASE, CLASSIFIER, FOLDER, TEACHERS, teacher_paths

MAX_BYTES = 20_000_000


def test_the_checkpoints_take_at_most_20_megabytes():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= MAX_BYTES
    assert (FOLDER / CLASSIFIER).is_file()


def test_the_teachers_can_be_merged_on_the_base():
    report = inspect([FOLDER / BASE, *(pathlib.Path(path) for _, path in teacher_paths())])
    assert report["mergeable"], report["obstacles"]


@pytest.mark.parametrize("name, kind", [("comic", "diffusers"), ("cartoon", "single-file"), ("neon", "diffusers")])
def test_kinds_of_checkpoints(name, kind):
    assert open_checkpoint(FOLDER / TEACHERS[name].file).kind == kind


def test_one_teacher_has_its_own_text_encoder():
    base = open_checkpoint(FOLDER / BASE)
    digests = {name: open_checkpoint(path).text_digest(base) for name, path in teacher_paths()}
    own = {name for name, digest in digests.items() if digest != base.text_digest()}
    assert own == {name for name, teacher in TEACHERS.items() if teacher.own_text_encoder} == {"ink"}


def test_one_teacher_is_a_lora_on_the_base():
    loras = {name: [lora.path.name for lora in open_checkpoint(path).loras] for name, path in teacher_paths()}
    assert {name: files for name, files in loras.items() if files} == {"blueprint": ["blueprint_lora.safetensors"]}


def test_the_demo_config_is_valid():
    checks.check(demo_config.get_config())
