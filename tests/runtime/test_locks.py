"""A folder belongs to one process at a time; a lock that a killed process left is taken over."""

import os
import socket

import pytest

from dmm_jax.config import workdirs
from dmm_jax.runtime import locks
from dmm_jax.runtime.errors import UserError
from tests import worlds


def test_a_second_run_in_a_folder_is_refused_and_named(tmp_path):
    config = worlds.tiny_config(dict.fromkeys(("base", *worlds.NAMES), tmp_path), tmp_path)
    with locks.lock(tmp_path) as check:
        check()
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on {socket.gethostname()}, and two"):
            workdirs.check(tmp_path, config)
    assert list(tmp_path.iterdir()) == [] and workdirs.check(tmp_path, config) == []


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    (tmp_path / locks.NAME).write_text("process 999999 on elsewhere")
    with locks.lock(tmp_path) as check:
        check()
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_lock_was_replaced_saves_nothing_more(tmp_path):
    with locks.lock(tmp_path) as check:
        (tmp_path / locks.NAME).write_text("process 2 on elsewhere")
        with pytest.raises(UserError, match="taken over by process 2 on elsewhere"):
            check()
    assert (tmp_path / locks.NAME).exists()  # It is the other's.


def test_a_lock_that_somebody_deletes_is_taken_again(tmp_path):
    with locks.lock(tmp_path) as check:
        (tmp_path / locks.NAME).unlink()
        check()
        with pytest.raises(UserError, match="in use by"), locks.lock(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_the_place_of_a_lock_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / locks.NAME).symlink_to(tmp_path / "mine")
    with pytest.raises(OSError), locks.lock(tmp_path):
        pass
    assert (tmp_path / "mine").read_text() == "mine"
