"""The checkpoints that come with this package, and the student among them that every MODEL may name."""

import os
import pathlib

FOLDER = pathlib.Path(__file__).parents[1] / "world" / "checkpoints"
BASE = FOLDER / "base"
DEMO = "demo"  # The name of the student; its folder in FOLDER, too.


def is_demo(path: str | os.PathLike) -> bool:
    """Tells whether a path means the student of this package: it does unless a file or folder has that name."""
    return str(path) == DEMO and not os.path.exists(path)
