"""The world that ships: small enough, in the formats found in the wild, and mergeable."""

import pathlib

import pytest

from dmm_jax.checkpoints.inspect import inspect
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.world import demo_config
from dmm_jax.world.shipped_checkpoints import BASE, CLASSIFIER, FOLDER, TEACHERS, teacher_paths

MOST_BYTES = 20_000_000


def test_it_takes_at_most_20_megabytes():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= MOST_BYTES
    assert (FOLDER / CLASSIFIER).is_file()


def test_its_teachers_can_be_merged_on_its_base():
    report = inspect([FOLDER / BASE, *(pathlib.Path(path) for _, path in teacher_paths())])
    assert report["mergeable"], report["obstacles"]


@pytest.mark.parametrize("name, kind", [("comic", "diffusers"), ("cartoon", "single-file"), ("neon", "diffusers")])
def test_teachers_come_as_people_store_them(name, kind):
    assert open_checkpoint(FOLDER / TEACHERS[name].file).kind == kind


def test_one_teacher_has_a_text_encoder_of_its_own():
    base = open_checkpoint(FOLDER / BASE)
    digests = {name: open_checkpoint(path).text_digest(base) for name, path in teacher_paths()}
    own = {name for name, digest in digests.items() if digest != base.text_digest()}
    assert own == {name for name, teacher in TEACHERS.items() if teacher.own_text_encoder} == {"ink"}


def test_one_teacher_is_a_lora_on_the_base():
    found = {name: [one.path.name for one in open_checkpoint(path).loras] for name, path in teacher_paths()}
    assert {name: files for name, files in found.items() if files} == {"blueprint": ["blueprint_lora.safetensors"]}


def test_the_experiment_is_a_valid_config():
    from dmm_jax.config import checks

    checks.check(demo_config.get_config())
