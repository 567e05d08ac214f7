"""Writes the student that ships as `emoji`: a DMM folder with the authors' names and a list of prompts."""

import pathlib

from dmm_jax.checkpoints import model_card
from dmm_jax.checkpoints.modelspec import MERGED_FROM, Recipe
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.recorded_sampling import metadata_of, recipe_of, recorded_sampling
from dmm_jax.checkpoints.shipped import EMOJI, PROMPTS
from dmm_jax.checkpoints.write import write_folder
from dmm_jax.studies.emoji_study import Study


def write_package(study: Study, row: str, seed: int, out: pathlib.Path) -> pathlib.Path:
    """Copies a row's student to the folder `emoji` below `out`, in float16; returns its path.

    `prompts.txt` in it has the name of every concept, as `dmm-jax list emoji` prints them.

    Raises:
      CheckpointError: the student is not trained.
      UserError: the folder is not empty.
    """
    student = open_checkpoint(study.student(row, seed))
    recipe, licenses = recipe_of(student), study.licenses
    about = Recipe(EMOJI, metadata_of(student)[MERGED_FROM].split(", "), recipe, licenses)
    folder = write_folder(out / EMOJI, student, "float16", about)
    origin = student.styles, student.architecture, recipe["parents"], licenses
    drawing = student.scheduler_config, recorded_sampling(student)
    card = model_card.card(["dmm"], EMOJI, *origin, None, False, *drawing).replace("PATH", EMOJI)
    authors = "\n".join(f"- {name}: {each.author}, {each.license}" for name, each in study.sets.items())
    authors = f"\n## Authors\n\nThe weights are trained on these sets, drawn at 64 pixels:\n\n{authors}\n"
    (folder / model_card.NAME).write_text(card + authors, encoding="utf-8")
    names = sorted({line["caption"] for line in study.rows if " on pale " not in line["caption"]})
    (folder / PROMPTS).write_text("\n".join(names) + "\n", encoding="utf-8")
    return folder
