"""Writes the student that ships as `emoji`: a DMM folder with the authors' names and a list of prompts."""

import pathlib

from dmm_jax.checkpoints import model_card
from dmm_jax.checkpoints.modelspec import MERGED_FROM, Recipe
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.recorded_sampling import metadata_of, recipe_of, recorded_sampling
from dmm_jax.checkpoints.shipped import EMOJI, PROMPTS
from dmm_jax.checkpoints.write import write_folder
from dmm_jax.studies.emoji_pictures import TRAIN
from dmm_jax.studies.emoji_study import Study


def write_package(study: Study, row: str, seed: int, out: pathlib.Path) -> pathlib.Path:
    """Copies a row's student to the folder `emoji` below `out`, in float16; returns its path.

    `prompts.txt` in it has the names of the concepts that teachers saw, as `dmm-jax list emoji` prints them.

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
    about = "The weights are trained on these sets, drawn at 64 pixels on white or a pale ground:"
    (folder / model_card.NAME).write_text(f"{card}\n## Authors\n\n{about}\n\n{authors}\n", encoding="utf-8")
    seen = [line["caption"] for line in study.rows if line["split"] == TRAIN]
    names = sorted({caption for caption in seen if " on pale " not in caption})
    (folder / PROMPTS).write_text("\n".join(names) + "\n", encoding="utf-8")
    return folder
