"""The engine: an image does not depend on other requests, and a fault stays with the requests that it concerns."""

import gc
import threading
import time
import weakref

import numpy as np
import pytest

from dmm_jax.diffusion import solvers
from dmm_jax.serve import programs, work
from dmm_jax.serve.engine import Engine
from dmm_jax.serve.requests import Draining, EngineFailed, NotFinite, QueueFull
from tests.serve.load import Clients
from tests.serve.students import ONE_LEVEL, SIZE, drawn_alone, request, small_pipeline, started

TIMEOUT = 60.0  # Seconds; only a fault takes so long.


@pytest.fixture(scope="module")
def pipeline():
    return small_pipeline(**ONE_LEVEL)


@pytest.fixture(scope="module")
def engine(pipeline):
    engine = started(pipeline)
    yield engine
    engine.stop()


def random_request(rng):
    kind = rng.integers(4)  # The reference compiles a program for each kind, and for each kind of solver.
    styles = ["style_0", "style_1", {"style_0": 0.3, "style_1": 0.7}, [(1000, "style_0"), (500, "style_1")]]
    return request(
        prompt=["a large red circle", "a star", "a star", "a red circle BREAK a (star:1.3)"][kind],
        negative_prompt=[None, "blur", "blur", None][kind],
        style=styles[rng.integers(4)],
        seed=int(rng.integers(2**32)),
        num_inference_steps=int(rng.integers(1, 7)),
        guidance_scale=[3.0, 1.0, 7.5, 4.0][kind],
        guidance_rescale=[0.0, 0.0, 0.7, 0.0][kind],
        solver=sorted(solvers.SOLVERS)[rng.integers(len(solvers.SOLVERS))],
    )


def test_images_are_the_pipelines_whatever_joins_and_leaves(engine, pipeline):
    rng = np.random.default_rng(0)
    jobs = []
    for number in range(40):
        jobs.append(engine.submit(random_request(rng), client=str(number % 3)))
        if number % 7 == 3:
            jobs.pop(rng.integers(len(jobs))).cancel()
        if number % 3 == 0:
            time.sleep(rng.random() * 0.05)
    for job in jobs:
        image = job.future.result(TIMEOUT)
        expected = drawn_alone(pipeline, job.request)
        assert image.dtype == np.uint8 and np.abs(expected.astype(int) - image).max() <= 1, job.request
        assert job.step <= job.num_steps == job.num_dispatched
    counts = engine.counts()
    assert counts["slot_steps_busy"] > counts["steps"]  # Requests shared programs.


def test_every_client_is_answered_while_others_cancel(engine):
    ends = Clients(engine, num_requests=60, num_clients=16, num_cancelled=12).run()
    assert ends.images + ends.cancelled == 60 and not ends.failed and not ends.unanswered
    assert engine.counts()["waiting"] == 0


def test_an_answered_request_is_freed_without_the_search_for_cycles(engine):
    job = engine.submit(request())
    job.future.result(TIMEOUT)
    reference = weakref.ref(job)
    engine.submit(request()).future.result(TIMEOUT)  # The engine's threads now hold this request.
    gc.disable()
    del job
    try:
        assert reference() is None
    finally:
        gc.enable()


def test_a_waiting_jobs_place_and_a_running_jobs_preview(engine):
    jobs = [engine.submit(request(num_inference_steps=60, solver="heun")) for _ in range(6)]
    while jobs[0].step < 3:
        time.sleep(0.001)
    assert [job.queued_ahead for job in jobs] == [0, 0, 0, 0, 0, 1]
    assert jobs[0].num_steps == 119 and jobs[5].step == 0 and jobs[5].preview() is None
    preview = jobs[0].preview()
    assert preview.shape == (8, 8, 3) and preview.dtype == np.uint8 and preview.std() > 0
    for job in jobs:
        job.cancel()
    assert all(job.future.cancelled() for job in jobs)
    last = engine.submit(request())
    last.future.result(TIMEOUT)  # The slots are free again.
    assert last.started_at - last.accepted_at < TIMEOUT


def test_a_full_queue_says_when_to_come_back(pipeline, engine):
    before = engine.counts()["refused"]
    jobs = []
    with pytest.raises(QueueFull, match="64 requests wait.*Try again in") as full:
        for _ in range(100):
            jobs.append(engine.submit(request(num_inference_steps=100)))
    for job in jobs:
        job.cancel()
    assert full.value.retry_after > 0.0 and engine.counts()["refused"] == before + 1
    engine.submit(request()).future.result(TIMEOUT)


def test_clients_take_turns(engine):
    first = [engine.submit(request(num_inference_steps=10), client="first") for _ in range(12)]
    second = engine.submit(request(num_inference_steps=10), client="second")
    second.future.result(TIMEOUT)
    assert sum(job.future.done() for job in first) <= 8
    for job in first:
        job.future.result(TIMEOUT)


def test_an_image_that_is_not_finite_fails_alone(engine, pipeline, monkeypatch):
    def with_nan(*args, check=work.check):
        fields, arrays = check(*args)
        arrays.table[2, work.COLUMNS.index("c_skip")] = np.nan
        return fields, arrays

    good = engine.submit(request(num_inference_steps=6))
    with monkeypatch.context() as patch:
        patch.setattr(work, "check", with_nan)
        bad = engine.submit(request(num_inference_steps=6))
    assert np.abs(drawn_alone(pipeline, good.request).astype(int) - good.future.result(TIMEOUT)).max() <= 1
    with pytest.raises(NotFinite, match="hold NaN or infinity. Take a lower guidance scale"):
        bad.future.result(TIMEOUT)
    later = engine.submit(request(seed=3))  # In the slot that held NaN.
    assert np.abs(drawn_alone(pipeline, later.request).astype(int) - later.future.result(TIMEOUT)).max() <= 1


@pytest.mark.parametrize("program", ["denoise", "place", "decode"])
def test_a_failed_program_fails_its_requests_alone(engine, pipeline, monkeypatch, program):
    real, calls = getattr(programs, program), []

    def fails_once(*args):
        calls.append(args)
        if len(calls) == 1:
            raise RuntimeError("the device is on fire")
        return real(*args)

    monkeypatch.setattr(programs, program, fails_once)
    failing = engine.submit(request())
    with pytest.raises(EngineFailed, match="a program of the engine failed on the device: the device is on fire"):
        failing.future.result(TIMEOUT)
    later = engine.submit(request(seed=5))
    assert np.abs(drawn_alone(pipeline, later.request).astype(int) - later.future.result(TIMEOUT)).max() <= 1


def test_an_error_that_arrives_with_the_results_is_recovered(engine, pipeline, monkeypatch):
    complete, calls = engine._complete, []

    def broken_once(*args):
        calls.append(args)
        if len(calls) == 1:
            raise RuntimeError("lost device")
        complete(*args)

    monkeypatch.setattr(engine, "_complete", broken_once)
    with pytest.raises(EngineFailed, match="lost device"):
        engine.submit(request(num_inference_steps=5)).future.result(TIMEOUT)
    engine.submit(request(seed=5)).future.result(TIMEOUT)


def test_draining_finishes_what_was_accepted(pipeline):
    engine = started(pipeline)
    jobs = [engine.submit(request(num_inference_steps=4, seed=seed)) for seed in range(9)]
    assert not engine.drain(timeout=0.0)
    with pytest.raises(Draining):
        engine.submit(request())
    assert engine.drain(TIMEOUT) and all(job.future.result(0).shape == (*SIZE, 3) for job in jobs)
    engine.stop()
    assert engine.counts()["finished"] == 9 and not engine.ready


def test_stopping_answers_everyone_at_once(pipeline):
    engine = started(pipeline)
    before = threading.active_count()
    jobs = [engine.submit(request(num_inference_steps=100, solver="heun")) for _ in range(9)]
    engine.stop()
    for job in jobs:
        with pytest.raises(Draining, match="has stopped"):
            job.future.result(0)
    assert threading.active_count() == before - 2


def test_wrong_arguments_are_refused(pipeline):
    with pytest.raises(ValueError, match="size's height must be a multiple of 8 pixels; got 60. Use 56"):
        Engine(pipeline, [(60, 64)], 4)
    with pytest.raises(ValueError, match="queue_size must be a whole number of at least 1"):
        Engine(pipeline, [], 4, queue_size=0)
    assert Engine(pipeline, [], 4).sizes == (SIZE,)


def test_starting_says_which_sizes_are_compiled(pipeline, monkeypatch, capsys):
    monkeypatch.setattr("dmm_jax.serve.warm_up._warm_up", lambda pool: None)
    engine = Engine(pipeline, [(64, 64), (64, 128)], 4)
    engine.start()
    engine.stop()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0].split(" in ")[0] for line in lines] == [
        f"{stage} the programs of {size}" for size in ("64x64", "128x64") for stage in ("Compiling", "Compiled")
    ]
