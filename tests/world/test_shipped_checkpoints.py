"""The shipped checkpoints: their size and formats, and that they can be merged."""

import pathlib

import numpy as np
import pytest

from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.export import base_of
from dmm_jax.checkpoints.inspect import inspect
from dmm_jax.checkpoints.inspect_text import render
from dmm_jax.checkpoints.licenses import together
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.shipped import EMOJI, PROMPTS, STUDENTS
from dmm_jax.config import checks
from dmm_jax.pipeline import Pipeline
from dmm_jax.studies.emoji_sets import SETS
from dmm_jax.world import demo_config
from dmm_jax.world.shipped_checkpoints import BASE, CLASSIFIER, FOLDER, TEACHERS, teacher_paths

MAX_BYTES = {"the shapes world": 22_200_000, EMOJI: 25_100_000}


def test_the_checkpoints_take_at_most_22_and_25_megabytes():
    sizes = dict.fromkeys(MAX_BYTES, 0)
    for path in filter(pathlib.Path.is_file, FOLDER.rglob("*")):
        sizes[EMOJI if FOLDER / EMOJI in path.parents else "the shapes world"] += path.stat().st_size
    assert all(size <= MAX_BYTES[name] for name, size in sizes.items())
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


def test_demo_names_the_student(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    student = open_checkpoint("demo")
    assert student.name == "demo" and tuple(student.styles) == tuple(TEACHERS) and student.fallbacks == []
    assert student.text_digest() == open_checkpoint(FOLDER / BASE).text_digest()


def test_emoji_names_the_student_of_seven_sets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    student = open_checkpoint(EMOJI)
    assert student.styles == tuple(SETS) and student.fallbacks == []
    assert {"unet", "vae", "text_encoder"} == set(student.components)
    card = (FOLDER / EMOJI / "README.md").read_text()
    assert all(f"- {name}: {each.author}, {each.license}" in card for name, each in SETS.items())
    assert student.license == together(each.license for each in SETS.values())


def test_the_prompts_of_emoji_are_the_names_that_teachers_saw():
    prompts = (FOLDER / EMOJI / PROMPTS).read_text().splitlines()
    assert STUDENTS[EMOJI] in prompts and len(prompts) == len(set(prompts)) == 1472


def test_only_a_checkpoint_with_the_name_of_the_student_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo" / "pictures").mkdir(parents=True)
    assert open_checkpoint("demo").path == FOLDER / "demo"
    assert base_of("demo", open_checkpoint("demo")).path == FOLDER / BASE
    (tmp_path / "demo" / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="^demo"):
        open_checkpoint("demo")


def test_every_shipped_checkpoint_states_its_licence():
    paths = [FOLDER / BASE, FOLDER / "demo", *(path for _, path in teacher_paths())]
    assert {open_checkpoint(path).license for path in paths} == {"apache-2.0"}
    lora = inspect([FOLDER / "blueprint_lora.safetensors"])
    assert "licence: apache-2.0" in render(lora)


def test_the_student_agrees_with_each_teacher_in_its_style():
    """A teacher's own style draws the nearest latents among all styles and the base."""
    student = Pipeline.from_pretrained("demo")
    teachers = {name: path for name, path in teacher_paths() if name in ("ink", "neon")}
    stock = {name: Pipeline.from_pretrained(path, base=FOLDER / BASE) for name, path in teachers.items()}
    latents = np.random.default_rng(0).normal(size=(4, 8, 8, 4)).astype(np.float32)
    options = {"prompts": ["a large red circle"] * 4, "latents": latents, "num_inference_steps": 1, "output": "latents"}
    options["guidance_scale"] = 7.0
    drawn = {style: student(styles=style, **options) for style in student.styles}
    base = Pipeline.from_pretrained(FOLDER / BASE)(**options)
    for name, teacher in stock.items():
        target = teacher(**options)
        errors = {style: np.mean((latents - target) ** 2) for style, latents in (drawn | {"the base": base}).items()}
        assert min(errors, key=errors.get) == name


def test_the_demo_config_is_valid():
    checks.check(demo_config.get_config())
