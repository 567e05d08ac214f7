"""States on disk: saves are kept as configured, damaged ones are skipped, and no kill loses a finished save."""

import multiprocessing
import os
import random
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.states import StateStore, restore_student
from dmm_jax.runtime.errors import UserError

# After a failed read, Orbax does not wait for its other reads.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
KILLS = int(os.environ.get("DMM_JAX_KILLS", "5"))  # Number of kills in the kill test.


def state_of(step: int, size: int = 2000):
    """Returns a state of random numbers seeded by the step; random numbers do not compress, so they fill data files."""
    rng = np.random.default_rng(step)
    params = {name: {"kernel": jnp.asarray(rng.standard_normal((size, 8), np.float32))} for name in "abc"}
    return {"step": jnp.int32(step), "params": params}


def assert_is_of(step, state, size=2000):
    for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(state_of(step, size)), strict=True):
        assert np.array_equal(leaf, expected)


def saved(folder, steps, **options):
    with StateStore(folder, **options) as store:
        for step in steps:
            store.save(step, state_of(step))
    return folder / "checkpoints"


@pytest.mark.parametrize(
    "options, steps",
    [
        ({}, [2, 4, 6, 8, 10]),
        ({"keep_last": 2}, [8, 10]),
        ({"keep_last": 1, "keep_every": 4}, [4, 8, 10]),
        ({"keep_last": 2, "keep_every": 6}, [6, 8, 10]),
    ],
)
def test_the_newest_and_every_nth_step_are_kept(tmp_path, options, steps):
    saved(tmp_path, (2, 4, 6, 8, 10), **options)
    with StateStore(tmp_path) as store:
        assert store.steps == steps and store.latest_step == 10


def test_a_step_is_saved_once(tmp_path):
    saved(tmp_path, (2, 2))
    with StateStore(tmp_path) as store:
        assert store.steps == [2]


@pytest.mark.parametrize("reason", ["No space left on device", "Disk quota exceeded"])
def test_a_full_disk_is_an_error_that_says_what_to_do(tmp_path, reason):
    def save(*_, **__):
        raise ValueError(f'RESOURCE_EXHAUSTED: Error writing "kernel/0.0" in a database: {reason} [os_error_code=1]')

    with StateStore(tmp_path) as store:
        store._manager.save = save
        with pytest.raises(UserError, match=f"checkpoints cannot be written: {reason}.*run again"):
            store.save(2, state_of(2))


def test_without_a_save_the_state_is_unchanged(tmp_path):
    with StateStore(tmp_path) as store:
        fresh = state_of(0)
        assert store.resume(fresh) == (0, fresh)
        with pytest.raises(CheckpointError, match="no complete checkpoint yet"):
            store.restore(fresh)


def delete(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path):
    """Leaves what a power cut can leave: the file's length is written, its data are not."""
    path.write_bytes(bytes(path.stat().st_size))


def flip(path):
    changed = bytearray(path.read_bytes())
    for place in (len(changed) // 10, len(changed) // 2, len(changed) * 9 // 10):
        changed[place] ^= 0x40
    path.write_bytes(changed)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A folder with the checkpoints of steps 2 and 4, and the names of the files of one."""
    folder = saved(tmp_path_factory.mktemp("two"), (2, 4))
    return folder, sorted(path.relative_to(folder / "4") for path in (folder / "4").rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", [delete, truncate, zero, flip])
def test_damage_of_any_file_makes_resume_go_back_to_a_sound_state(two_steps, damage, tmp_path, capsys):
    original, files = two_steps
    went_back = []
    for number, name in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(original, folder / "checkpoints")
        damage(folder / "checkpoints" / "4" / name)
        with StateStore(folder) as store:
            step, state = store.resume(state_of(0))
            assert_is_of(step, state)
            stderr = capsys.readouterr().err
            if step == 2:
                went_back.append(name)
                assert str(folder / "checkpoints" / "4") in stderr and "going back to step 2" in stderr
                store.save(4, state_of(4))  # Its place is free again.
            else:
                assert step == 4 and not stderr
        with StateStore(folder) as store:
            assert store.steps == [2, 4]
    parents = {str(name.parent) for name in went_back}
    assert {"state/ocdbt.process_0/d", "state/d", "record"} <= parents


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("damage", [delete, flip])
def test_restore_student_skips_a_damaged_state_and_leaves_it(tmp_path, capsys, damage):
    folder = saved(tmp_path, (2, 4))
    damage(largest(folder / "4" / "state"))
    params = restore_student(tmp_path, state_of(0)["params"])
    assert_is_of(2, {"step": 2, "params": params})
    assert f"{folder / '4'} is damaged" in capsys.readouterr().err and (folder / "4").is_dir()
    damage(largest(folder / "2" / "state"))
    with pytest.raises(CheckpointError, match="2 is damaged .* no other checkpoint"):
        restore_student(tmp_path, state_of(0)["params"])


def test_a_state_that_does_not_fit_the_config_is_refused_and_kept(tmp_path):
    folder = saved(tmp_path, (2, 4))
    with StateStore(tmp_path) as store:
        message = (
            r"does not fit the config in 3 arrays. \['params'\]\['a'\]\['kernel'\] was saved as float32\[2000, 8\]"
        )
        with pytest.raises(CheckpointError, match=message + r"; expected float32\[1000, 8\]"):
            store.resume(state_of(0, 1000))
        with pytest.raises(CheckpointError, match=r"\['ema'\] was saved as nothing; expected float32\[1\]"):
            store.resume(state_of(0) | {"ema": jnp.zeros(1)})
    assert (folder / "4").is_dir()


def test_a_state_without_checksums_is_read(tmp_path):
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(2, args=ocp.args.Composite(state=ocp.args.StandardSave(state_of(2))))
    with StateStore(tmp_path) as store:
        step, state = store.resume(state_of(0))
        assert step == 2 and store.notes(2) == {}
        assert_is_of(2, state)
        with pytest.raises(CheckpointError, match="holds no checksums"):
            store.resume(state_of(0, 1000))
    assert_is_of(2, {"step": 2, "params": restore_student(tmp_path, state_of(0)["params"])})


def test_notes_come_back(tmp_path):
    with StateStore(tmp_path) as store:
        store.save(2, state_of(2), {"samples_seen": 7})
    with StateStore(tmp_path) as store:
        assert store.notes(2) == {"samples_seen": 7}


def test_if_all_states_are_damaged_resume_refuses_and_keeps_them(tmp_path):
    folder = saved(tmp_path, (2,))
    delete(largest(folder / "2" / "state"))
    with StateStore(tmp_path) as store, pytest.raises(CheckpointError, match="no other checkpoint.*start again"):
        store.resume(state_of(0))
    assert (folder / "2").is_dir()


def save_for_ever(folder, report):
    """Saves a state at every step and reports the newest finished save: a save ends when its folder gets its name."""
    with StateStore(folder, keep_last=2) as store:
        step, _ = store.resume(state_of(0, 20_000))
        while True:
            step += 1
            store.save(step, state_of(step, 20_000))
            steps = [int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit()]
            report.send(max(steps, default=0))


def test_kill_9_at_any_moment_loses_no_finished_save(tmp_path):
    """Every second kill comes while the child saves; the next may come while a new child starts and cleans up."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dmm_jax.checkpoints.states"])
    rng = random.Random(0)
    finished, broken_off, starting_s, kill = 0, 0, [], 0
    while kill < KILLS or (not broken_off and kill < 10 * KILLS):  # A busy machine may need more kills to hit a save.
        reader, writer = context.Pipe(duplex=False)
        child = context.Process(target=save_for_ever, args=(tmp_path, writer), daemon=True)
        started = time.monotonic()
        child.start()
        writer.close()
        if kill % 2 == 0:
            before = finished
            while finished == before:  # At least one more save, however slow the machine is.
                assert reader.poll(60)
                finished = max(finished, reader.recv())
            starting_s.append(time.monotonic() - started)
            time.sleep(rng.uniform(0.0, 0.5))
        else:
            time.sleep(rng.uniform(0.0, max(starting_s)))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        try:
            while reader.poll():
                finished = max(finished, reader.recv())
        except EOFError:
            pass
        broken_off += any(path.name.endswith("tmp") for path in (tmp_path / "checkpoints").iterdir())
        kill += 1
        if kill % 2 == 0 or kill >= KILLS:
            with StateStore(tmp_path) as store:
                assert store.latest_step >= finished
                step, state = store.resume(state_of(0, 20_000))
                assert step == store.latest_step
                assert_is_of(step, state, 20_000)
    assert finished > KILLS // 2 and broken_off
    print(f"{kill} kills, {broken_off} of them in the middle of a save; {finished} saves finished, none lost")
