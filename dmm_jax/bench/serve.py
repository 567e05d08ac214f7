"""`dmm-jax bench serve`: the engine under load, next to three other ways to draw the same requests.

*Offline* draws full batches of equal steps with any styles, without arrivals: the most that a device can do. *One style
at a time* answers the same arrivals with batches of one style, *one request at a time* with batches of one.
"""

import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence

import jax

from dmm_jax.bench import load as load_lib
from dmm_jax.bench import networks as bench_networks
from dmm_jax.bench import timing
from dmm_jax.bench.batch_server import BatchServer
from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.metrics import peak_memory
from dmm_jax.serve.engine import Engine

ENGINE, ONE_STYLE, ONE_REQUEST = "engine", "one style at a time", "one request at a time"
LOADS = (0.5, 0.8, 0.95)  # Shares of the engine's images/s in a closed loop.
STEPS = (20, 25, 30)
CLIENTS_PER_SLOT = 2
COLUMNS = (
    "job", "load", "offered_per_s", "images_per_s", "share_of_offline", "p50_s", "p95_s", "p99_s", "start_p50_s",
    "occupancy", "step_s", "batch", "peak_memory_gb", "start_s",
)  # fmt: skip


def measure(
    config,
    size: str,
    num_slots: int,
    num_requests: int = 0,
    loads: Sequence[float] = LOADS,
    steps: Sequence[int] = STEPS,
) -> Iterator[dict]:
    """Yields rows: offline, the engine in a closed loop, then every way to serve at each load.

    Args:
      size: of the networks: a name in `SIZES`.
      num_slots: of the engine, and the largest batch of the other servers.
      num_requests: of each measurement; 0: twelve per slot.
      loads: requests per second of the open loops, as shares of the engine's images/s in the closed loop.
      steps: of the requests, equally often.

    Raises:
      UserError: too few requests to measure a rate.
    """
    num_requests = num_requests or 12 * num_slots
    clients = CLIENTS_PER_SLOT * num_slots
    if num_requests < 2 * clients + 2:
        raise UserError(f"--requests must be at least {2 * clients + 2} for {num_slots} slots; got {num_requests}.")
    pipeline = bench_networks.random_pipeline(size, config)
    requests = load_lib.draw_requests(pipeline.styles, steps, num_requests)
    offline = _offline(pipeline, requests, num_slots)
    yield offline
    engine = Engine(pipeline, [], num_slots, queue_size=num_requests, max_chunks=1)
    started = time.perf_counter()
    engine.start()
    start_s = time.perf_counter() - started
    closed = _engine_row(engine, lambda submit: load_lib.closed_loop(submit, requests, clients))
    closed["images_per_s"] = closed.pop("measured").images_per_s(clients, num_requests - clients)
    closed["share_of_offline"] = closed["images_per_s"] / offline["images_per_s"]
    yield closed | {"job": f"{ENGINE}, {clients} clients in a closed loop", "start_s": start_s}
    for load in loads:
        offered = load * closed["images_per_s"]
        row = _engine_row(engine, lambda submit, offered=offered: load_lib.open_loop(submit, requests, offered))
        yield _open_row(ENGINE, row, load, offered)
    engine.stop()
    for name, sizes in ((ONE_STYLE, (1, max(num_slots // 4, 1), num_slots)), (ONE_REQUEST, (1,))):
        server = BatchServer(pipeline, sizes)
        server.warm_up(requests)
        for load in loads:
            offered = load * closed["images_per_s"]
            measured = load_lib.open_loop(server.submit, requests, offered)
            yield _open_row(name, {"measured": measured, "batch": sizes[-1]} | measured.as_row(), load, offered)
        server.stop()


def _offline(pipeline, requests, batch_size) -> dict:
    """Returns the images/s of full batches, each of requests with the same number of steps and any styles."""
    server = BatchServer(pipeline, [batch_size])
    server.warm_up(requests)
    seconds, num_images = 0.0, 0
    for steps in sorted({request.num_inference_steps for request in requests}):
        batch = [request for request in requests if request.num_inference_steps == steps][:batch_size]
        seconds += timing.median_s(lambda batch=batch: server.draw(batch), 3) if batch else 0.0
        num_images += batch_size
    server.stop()
    return {"job": "offline batches", "images_per_s": num_images / seconds, "batch": batch_size} | peak_memory()


def _engine_row(engine, send) -> dict:
    """Returns the row of one measurement of the engine, except its rate."""
    before, started = engine.counts(), []

    def submit(request):
        job = engine.submit(request)
        started.append(job)
        return job.future

    measured = send(submit)
    after = engine.counts()
    waits = sorted(job.started_at - job.accepted_at for job in started)
    steps, busy = (after[name] - before[name] for name in ("steps", "slot_steps_busy"))
    (step_s,) = after["step_s"].values()
    row = {"measured": measured, "batch": engine.num_slots, "occupancy": busy / (steps * engine.num_slots)}
    return row | {"start_p50_s": waits[len(waits) // 2], "step_s": step_s} | measured.as_row() | peak_memory()


def _open_row(name, row, load, offered) -> dict:
    measured = row.pop("measured")
    images_per_s = measured.images_per_s(0, len(measured.done_at) - 1)
    return row | {"job": name, "load": load, "offered_per_s": offered, "images_per_s": images_per_s}


def write_figure(rows: Sequence[Mapping], path: pathlib.Path) -> list[pathlib.Path]:
    """Draws the 99th percentile of the latency over the load: PATH for light pages, NAME_dark.png for dark ones.

    Raises:
      UserError: no row has a load.
    """
    from dmm_jax.evaluation import figures

    lines: dict[str, list] = {}
    for row in sorted((row for row in rows if "load" in row), key=lambda row: row["load"]):
        lines.setdefault(row["job"], []).append((row["load"], row["p99_s"]))
    if not lines:
        raise UserError(f"{path} is not drawn: no row was measured at a load.")
    pictures = figures.render(lambda theme: figures.latencies(lines, theme))
    paths = {"light": path, "dark": path.with_name(f"{path.stem}_dark{path.suffix}")}
    for theme, written in paths.items():
        written.write_bytes(pictures[theme])
    return list(paths.values())


def device() -> dict:
    """Returns what every row says about the machine."""
    return {"device": jax.devices()[0].device_kind, "num_devices": jax.local_device_count(), "jax": jax.__version__}
