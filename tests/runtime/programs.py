"""`python -m tests.runtime.programs NAME [ARGUMENTS]`: programs that tests run in processes of their own.

Most of them take FOLDER ADDRESS NUMBER and are process NUMBER of two that join at ADDRESS.
"""

import hashlib
import json
import os
import pathlib
import signal
import sys
import time

import jax
import numpy as np
from jax import monitoring

from dmm_jax.checkpoints.states import StateStore
from dmm_jax.config.serialization import from_json
from dmm_jax.runtime import compilation, processes, sharding
from dmm_jax.runtime.stopping import stop_requests


def random_state(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"kernel": rng.standard_normal((64, 64), np.float32), "bias": rng.standard_normal(64).astype(np.float32)}


def joined(address: str, number: str):
    return processes.joined(False, address, 2, int(number))


def stay_in_c():
    """Stays in C for minutes, as a process that compiles: Python runs no signal handler."""
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)


def resume_and_save(folder: str, address: str, number: str):
    """Resumes a state of other processes on a mesh of two times four devices, compares it, and saves another one."""
    with joined(address, number):
        mesh = sharding.make_mesh(2, 1, 4)

        def put(leaf):
            spec = sharding.parameter_spec(leaf.shape, mesh)
            return sharding.make_array(leaf.shape, leaf.dtype, mesh, spec, leaf.__getitem__)

        with StateStore(folder) as store:
            step, state = store.resume(jax.tree.map(put, random_state(0)))
            for array, expected in zip(jax.tree.leaves(state), jax.tree.leaves(random_state(step)), strict=True):
                assert all(np.array_equal(shard.data, expected[shard.index]) for shard in array.addressable_shards)
            print("resumed at", step)
            store.save(6, jax.tree.map(put, random_state(6)))


def fill_cache(folder: str, address: str, number: str):
    """Fills a cache of nine pictures in shards of two, of three sizes."""
    with joined(address, number):
        fill(f"{folder}/cache")


def fill(folder: str):
    from dmm_jax.data.fill_cache import encode_images
    from tests.data.test_fill_cache import SIZES, Oblongs, halved, tokenize

    options = {"scaling_factor": 0.5, "vae": "v", "tokenizer": "t", "shard_size": 2}
    encode_images(Oblongs(9, unreadable=(4,)), halved, tokenize, folder, 2, sizes=SIZES, **options)


def receive_sigterm_before_the_first_step(folder: str, address: str, number: str):
    """Process 1 gets SIGTERM; both processes then stay in C."""
    with joined(address, number), stop_requests():
        _send_sigterm_to_process_1()
        stay_in_c()


def receive_sigterm_at_the_first_step(folder: str, address: str, number: str):
    """Process 1 gets SIGTERM; both processes then take steps and print those after which they are to stop."""
    with joined(address, number), stop_requests() as stop:
        stop.begin()
        _send_sigterm_to_process_1()
        steps = range(8, 20)  # The run resumes at step 7.
        print([step for step in steps if stop()])
        processes.wait_for_all("end")


def receive_ctrl_c_and_sigterm_under_way(folder: str, address: str, number: str):
    """Process 0 gets Ctrl-C and process 1 SIGTERM while both take steps; each prints where and why it stops."""
    with joined(address, number), stop_requests() as stop:
        stop.begin()
        for step in range(1, 10**9):
            if step == 3:
                os.kill(os.getpid(), signal.SIGINT if jax.process_index() == 0 else signal.SIGTERM)
            if stop():
                break
            time.sleep(0.05)
        processes.wait_for_all("saved")
        stopped = stop.stopped(f"step {step}")
        print(f"{stopped} {stopped.exit_code}")


def _send_sigterm_to_process_1():
    if jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(3)


def stay_in_c_alone():
    """One process, not joined with another."""
    with stop_requests():
        print("ready", flush=True)
        stay_in_c()


def join_within_a_second(address: str, number: str):
    processes.JOIN_TIMEOUT_S = 1
    with joined(address, number):
        pass


def fail_after_a_loss_during_a_save(folder: str, address: str, number: str):
    """Process 1 is killed while both save; process 0 then raises an error."""
    with joined(address, number):
        mesh = sharding.make_mesh(1, 1, 8)
        kernel = np.random.default_rng(0).standard_normal((4096, 2048), np.float32)
        array = sharding.make_array(kernel.shape, kernel.dtype, mesh, sharding.P("fsdp"), kernel.__getitem__)
        with StateStore(folder) as store:
            store.save(1, {"kernel": array})
            if jax.process_index() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("a reason")


def take_steps(folder: str, address: str, number: str):
    """Takes steps without end, and prints after some."""
    with joined(address, number):
        for step in range(10**9):
            processes.wait_for_all("step")
            if step == 3:
                print("running", flush=True)


def fail_in_process_1(folder: str, address: str, number: str):
    """Takes steps, until process 1 raises an error."""
    with joined(address, number):
        for step in range(10**9):
            processes.wait_for_all("step")
            if step == 4 and jax.process_index() == 1:
                raise KeyError("a bug")


def train_and_count_compilations(config: str, workdir: str):
    """Trains and prints {"hits": programs loaded from the cache, "misses": programs compiled}."""
    from dmm_jax import train

    counts = {"hits": 0, "misses": 0}

    def count(event, **_):
        for name in counts:
            counts[name] += event == f"/jax/compilation_cache/cache_{name}"

    monitoring.register_event_listener(count)
    compilation.MIN_COMPILE_TIME_S = 0.0
    assert compilation.use_cache() is not None
    train.run(from_json(pathlib.Path(config).read_text()), workdir)
    print(json.dumps(counts))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
