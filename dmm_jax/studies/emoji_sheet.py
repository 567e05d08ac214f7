"""Pictures of some concepts side by side: drawn by people, by the teachers, by the base and by the student."""

import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from dmm_jax.config.styles import Style
from dmm_jax.gallery.grid import labelled_grid
from dmm_jax.gallery.sample import draw
from dmm_jax.pipeline import Pipeline
from dmm_jax.studies.emoji_pictures import PICTURES, TRAIN
from dmm_jax.studies.emoji_study import Study

SEED = 500  # The first row's.
NUM_SEEN, NUM_HELD_OUT = 10, 4
CONTACTS, CONTACTS_PER_ROW, CONTACT_CELL, BATCH_SIZE = 200, 10, (140, 88), 20


def write_sheet(study: Study, row: str, seed: int) -> pathlib.Path:
    """Draws the same prompts and noise with every model that exists; returns the file, OUT/sheet.png.

    Args:
      study: its base exists.
      row, seed: of the student.
    """
    rows = chosen_rows(study)
    prompts = [by_set[next(iter(study.sets))]["caption"] for by_set in rows]
    columns = {
        f"{name}, drawn by people": np.stack([_picture(study, by_set[name]["file"]) for by_set in rows])
        for name in study.sets
    }
    columns["base"] = _draw(study, study.pipeline(study.base), None, prompts)
    for name in study.sets:
        if study.teacher(name).exists():
            columns[f"{name}, teacher"] = _draw(study, study.pipeline(study.teacher(name)), None, prompts)
    if study.student(row, seed).exists():
        student = Pipeline.from_pretrained(study.student(row, seed), dtype=study.dtype)
        columns |= {f"{name}, student": _draw(study, student, name, prompts) for name in study.sets}
    labels = [by_set[next(iter(study.sets))]["caption"] for by_set in rows]
    for number, by_set in enumerate(rows):
        if any(line["split"] != TRAIN for line in by_set.values()):
            labels[number] += " (held out)"
    path = study.out / "sheet.png"
    labelled_grid(np.stack(list(columns.values()), axis=1), labels, list(columns)).save(path)
    return path


def write_contact_sheet(study: Study, row: str, seed: int) -> pathlib.Path:
    """Draws CONTACTS random pictures that teachers saw, left the student's and right the person's; returns the file.

    Args:
      study: the student exists.
      row, seed: of the student.
    """
    seen = [line for line in study.rows if line["split"] == TRAIN and " on pale " not in line["caption"]]
    rng = np.random.default_rng(0)
    chosen = [seen[place] for place in rng.choice(len(seen), min(CONTACTS, len(seen)), replace=False)]
    student = Pipeline.from_pretrained(study.student(row, seed), dtype=study.dtype)
    jobs = [(line["caption"], line["set"], number) for number, line in enumerate(chosen)]
    batches = draw(student, jobs, min(BATCH_SIZE, len(jobs)), **study.sampling)
    drawn = np.concatenate([images for images, _ in batches])[: len(jobs)]
    side, (width, height) = drawn.shape[1], CONTACT_CELL
    sheet = Image.new("RGB", (CONTACTS_PER_ROW * width, -(-len(jobs) // CONTACTS_PER_ROW) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (line, image) in enumerate(zip(chosen, drawn, strict=True)):
        x, y = number % CONTACTS_PER_ROW * width, number // CONTACTS_PER_ROW * height
        sheet.paste(Image.fromarray(image), (x, y))
        sheet.paste(Image.fromarray(_picture(study, line["file"])), (x + side + 2, y))
        pen.text((x, y + side), line["caption"][:23], fill="black")
        pen.text((x, y + side + 10), line["set"], fill="blue")
    path = study.out / "contact.png"
    sheet.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    return path


def chosen_rows(study: Study) -> list[dict[str, dict]]:
    """Returns the pictures on white of concepts that every set draws, by set: some seen ones, then held-out ones."""
    concepts: dict[str, dict[str, dict]] = {}
    for row in study.rows:
        concepts.setdefault(row["concept"], {}).setdefault(row["set"], row)  # The first is on white.
    complete = [concepts[key] for key in sorted(concepts) if len(concepts[key]) == len(study.sets)]
    is_seen = np.array([all(row["split"] == TRAIN for row in by_set.values()) for by_set in complete])
    rng = np.random.default_rng(0)
    chosen = []
    for places, count in ((np.flatnonzero(is_seen), NUM_SEEN), (np.flatnonzero(~is_seen), NUM_HELD_OUT)):
        chosen += [complete[place] for place in rng.permutation(places)[:count]]
    return chosen


def _picture(study: Study, file: str) -> UInt8[np.ndarray, "H W 3"]:
    with Image.open(study.folder / PICTURES / file) as image:
        return np.asarray(image.convert("RGB"))


def _draw(study: Study, pipeline: Pipeline, style: Style, prompts: Sequence[str]) -> UInt8[np.ndarray, "n H W 3"]:
    jobs = [(prompt, style, SEED + row) for row, prompt in enumerate(prompts)]
    batches = draw(pipeline, jobs, len(jobs), **study.sampling)
    return np.concatenate([images for images, _ in batches])[: len(jobs)]
