"""Writes the student that ships as `demo` from a finished run of the demo.

    dmm-jax demo --workdir demo-run
    python -m dmm_jax.world.student demo-run --out dmm_jax/world/checkpoints

It is a DMM folder in float16 with the UNet alone: VAE, text encoder and tokenizer are those of the shipped base.
"""

import argparse
import dataclasses
import pathlib

from dmm_jax.checkpoints.export import describe
from dmm_jax.checkpoints.modelspec import Recipe
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.shipped import DEMO
from dmm_jax.checkpoints.write import write_folder


def save_student(folder: pathlib.Path, workdir: pathlib.Path) -> pathlib.Path:
    """Writes the student of a run on the shipped checkpoints below `folder`; returns its path.

    Raises:
      CheckpointError: the run has no finished student.
      UserError: the folder of the student is not empty.
    """
    student = open_checkpoint(workdir)
    alone = dataclasses.replace(student, components={"unet": student.components["unet"]}, tokenizer_folder=None)
    details = describe(workdir, student, {}, "")  # How the student draws is among the options.
    recipe = Recipe("shapes, one student of five teachers", list(student.styles), details)
    return write_folder(folder / DEMO, alone, "float16", recipe)


def main() -> None:
    """Writes the student of the run that the command line names, and prints its path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    args = parser.parse_args()
    print(save_student(args.out, args.workdir))


if __name__ == "__main__":
    main()
