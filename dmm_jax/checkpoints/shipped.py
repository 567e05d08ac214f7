"""The checkpoints that come with this package, and the students among them that every MODEL may name."""

import os
import pathlib

FOLDER = pathlib.Path(__file__).parents[1] / "world" / "checkpoints"
BASE = FOLDER / "base"
DEMO, EMOJI = "demo", "emoji"
# {student: a prompt whose words it knows}; its folder in FOLDER has the same name.
STUDENTS = {DEMO: "a small purple circle left of a large orange square", EMOJI: "rocket"}

PROMPTS = "prompts.txt"  # In a student's folder: the prompts that it was trained on, if there are many.


def is_shipped(path: str | os.PathLike) -> bool:
    """Tells whether a path means a student of this package: it does unless a file or folder has that name."""
    return str(path) in STUDENTS and not os.path.exists(path)
