"""The checkpoints that come with this package, and the students among them that every MODEL may name."""

import os
import pathlib

FOLDER = pathlib.Path(__file__).parents[1] / "world" / "checkpoints"
BASE = FOLDER / "base"
DEMO, EMOJI = "demo", "emoji"
# {student: a prompt whose words it knows}; its folder in FOLDER has the same name.
STUDENTS = {DEMO: "a small purple circle left of a large orange square", EMOJI: "rocket"}

PROMPTS = "prompts.txt"  # In a student's folder: the prompts that it was trained on, if there are many.


def is_checkpoint_folder(path: str | os.PathLike) -> bool:
    """Tells whether a path is a diffusers folder, a training run, or one network of a diffusers folder."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ("model_index.json", "config.json"))


def is_shipped(path: str | os.PathLike) -> bool:
    """Tells whether a path means a student of this package: it does unless a file or a checkpoint has that name."""
    return str(path) in STUDENTS and not (os.path.isfile(path) or is_checkpoint_folder(path))


def base_of(path: str | os.PathLike) -> pathlib.Path | None:
    """Returns the base of a student of this package, which provides the networks that it lacks; None of any other."""
    return BASE if is_shipped(path) and not (FOLDER / path / "vae").is_dir() else None
