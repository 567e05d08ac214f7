"""`bench serve`: the requests follow its laws, both loops measure what they say, and each way to serve has its rows."""

import collections
import concurrent.futures
import threading
import time

import numpy as np
import pytest

from dmm_jax.bench import load, networks, serve, table
from dmm_jax.bench.batch_server import BatchServer
from dmm_jax.verbs import main as cli
from tests.bench.test_jobs import config
from tests.serve.students import ONE_LEVEL, request, small_pipeline


def test_styles_follow_zipfs_law_and_steps_are_mixed():
    requests = load.draw_requests(["a", "b", "c", "d"], [20, 30], 4000)
    styles = collections.Counter(request.style for request in requests)
    shares = np.array([styles[name] for name in "abcd"]) / 4000
    assert np.abs(shares - np.array([1, 1 / 2, 1 / 3, 1 / 4]) / (25 / 12)).max() < 0.03
    assert {request.num_inference_steps for request in requests} == {20, 30}
    assert len({request.seed for request in requests}) == 4000


def answered_after(seconds):
    """Returns a server that answers each request after so many seconds, and the largest number on their way at once."""
    on_the_way, most, lock = [], [0], threading.Lock()

    def submit(request):
        future = concurrent.futures.Future()
        with lock:
            on_the_way.append(request)
            most[0] = max(most[0], len(on_the_way))

        def answer():
            with lock:
                on_the_way.pop()
            future.set_result(None)

        threading.Timer(seconds, answer).start()
        return future

    return submit, most


def test_an_open_loop_does_not_wait_for_answers():
    submit, most = answered_after(0.1)
    measured = load.open_loop(submit, [request()] * 40, per_s=200.0)
    assert most[0] > 5 and measured.latencies.min() >= 0.1 and len(measured.done_at) == 40
    assert (np.diff(measured.done_at) >= 0).all()


def test_a_closed_loop_has_one_request_per_client():
    submit, most = answered_after(0.01)
    measured = load.closed_loop(submit, [request()] * 30, clients=3)
    assert most[0] <= 3 and len(measured.latencies) == 30
    assert measured.latencies.min() >= 0.01


def test_percentiles_and_rates_are_those_of_the_answers():
    measured = load.Measured(np.arange(1.0, 101.0), np.arange(100) / 4.0)
    assert measured.as_row() == {"p50_s": 50.5, "p95_s": 95.05, "p99_s": 99.01}
    assert measured.images_per_s(10, 90) == 4.0


def test_a_batch_has_one_style_and_one_number_of_steps():
    batches, release = [], threading.Event()

    def pipeline(prompts, styles, seeds, guidance_scale, num_inference_steps, solver):
        release.wait()
        batches.append((styles, num_inference_steps))
        return np.asarray(seeds)

    server = BatchServer(pipeline, [1, 2, 4])
    kinds = [("a", 20), ("b", 20), ("a", 20), ("a", 30), ("a", 20), ("b", 20)]
    first = server.submit(request(style="c"))
    while server._waiting:
        time.sleep(0.001)
    futures = [
        server.submit(request(style=style, num_inference_steps=steps, seed=seed))
        for seed, (style, steps) in enumerate(kinds)
    ]
    release.set()
    assert [future.result(10.0) for future in futures] == list(range(6)) and first.result() == 0
    assert batches[1:] == [(["a"] * 4, 20), (["b"] * 2, 20), (["a"], 30)]
    server.stop()


def test_rows_compare_the_engine_with_three_other_ways(monkeypatch, tmp_path):
    pipeline = small_pipeline(**ONE_LEVEL)
    monkeypatch.setattr(networks, "random_pipeline", lambda size, config: pipeline)
    rows = list(serve.measure(config(), "tiny", num_slots=2, num_requests=12, loads=[0.5], steps=[3]))
    assert [row["job"] for row in rows] == [
        "offline batches", "engine, 4 clients in a closed loop", "engine", "one style at a time",
        "one request at a time",
    ]  # fmt: skip
    closed = rows[1]
    assert 0.0 < closed["occupancy"] <= 1.0 and closed["p50_s"] <= closed["p95_s"] <= closed["p99_s"]
    assert closed["share_of_offline"] == closed["images_per_s"] / rows[0]["images_per_s"]
    assert {row["offered_per_s"] for row in rows[2:]} == {0.5 * closed["images_per_s"]}
    assert "p99_s" in table.render(rows, serve.COLUMNS)
    written = serve.write_figure(rows, tmp_path / "load.png")
    assert [path.name for path in written] == ["load.png", "load_dark.png"] and written[0].stat().st_size > 1000


def test_too_few_requests_and_wrong_loads_are_refused(capsys):
    with pytest.raises(ValueError, match="--requests must be at least 34 for 8 slots; got 20"):
        next(serve.measure(config(), "tiny", 8, 20))
    assert cli.main(["bench", "serve", "--loads", "half"]) == 1
    assert "--loads must be numbers above 0, as in 0.5,0.8; got 'half'" in capsys.readouterr().err
