"""Output folders: looked at before any work is done, so that a wrong one costs a second and not an hour."""

import os
import pathlib


def check_output(folder: str | pathlib.Path) -> pathlib.Path:
    """Returns `folder` if it is new or empty and can be written; makes nothing.

    Raises:
      ValueError: it is a file, is not empty, or lies where nothing can be written.
    """
    folder = pathlib.Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; the output is a folder. Give another path.")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; nothing is overwritten. Give a new folder or empty this one.")
    parent = folder
    while not parent.exists():
        parent = parent.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{folder} cannot be written: no permission in {parent}. Give a folder that you may write.")
    return folder
