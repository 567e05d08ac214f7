"""Requests over time for `bench serve`: the requests, their arrivals, and the time to each answer."""

import concurrent.futures
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from dmm_jax.serve.requests import ImageRequest

PROMPTS = ("a large red circle", "a small blue star on a green square", "two yellow triangles", "a star")
SCALES = (4.0, 7.0, 10.0)  # Guidance.
ZIPF_EXPONENT = 1.0
Submit = Callable[[ImageRequest], concurrent.futures.Future]


class Measured(NamedTuple):
    """The answers to some requests."""

    latencies: Float[np.ndarray, " n"]  # Seconds from a request's arrival to its image.
    done_at: Float[np.ndarray, " n"]  # Seconds from the start, in increasing order.

    def as_row(self) -> dict[str, float]:
        """Returns percentiles of the latency."""
        shares = {"p50_s": 50, "p95_s": 95, "p99_s": 99}
        return {name: float(np.percentile(self.latencies, share)) for name, share in shares.items()}

    def images_per_s(self, first: int, last: int) -> float:
        """Returns the rate between two answers, counted from 0."""
        return (last - first) / float(self.done_at[last] - self.done_at[first])


def draw_requests(styles: Sequence[str], steps: Sequence[int], number: int, seed: int = 0) -> list[ImageRequest]:
    """Returns requests whose styles follow Zipf's law: the k-th style is asked for 1 / k as often as the first."""
    rng = np.random.default_rng(seed)
    weights = np.arange(1, len(styles) + 1) ** -ZIPF_EXPONENT
    chosen = rng.choice(len(styles), number, p=weights / weights.sum())
    return [
        ImageRequest(
            prompt=PROMPTS[rng.integers(len(PROMPTS))],
            style=styles[style],
            seed=number,
            num_inference_steps=int(rng.choice(steps)),
            guidance_scale=float(rng.choice(SCALES)),
            solver="dpmpp_2m_karras",
        )
        for number, style in enumerate(chosen)
    ]


def open_loop(submit: Submit, requests: Sequence[ImageRequest], per_s: float, seed: int = 0) -> Measured:
    """Sends requests at random moments, `per_s` on average (a Poisson process), without waiting for answers."""
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(1.0 / per_s, len(requests)))
    clock = _Clock()
    futures = []
    for request, arrival in zip(requests, arrivals, strict=True):
        time.sleep(max(arrival - clock.elapsed(), 0.0))
        futures.append(submit(request))
        futures[-1].add_done_callback(lambda _, arrival=arrival: clock.record(arrival))
    return clock.wait(futures)


def closed_loop(submit: Submit, requests: Sequence[ImageRequest], clients: int) -> Measured:
    """Sends requests from so many clients, where a client waits for its answer before its next request."""
    clock, waiting, lock, futures = _Clock(), list(reversed(requests)), threading.Lock(), []

    def client():
        while True:
            with lock:
                if not waiting:
                    return
                request = waiting.pop()
            sent = clock.elapsed()
            future = submit(request)
            future.result()
            clock.record(sent)
            futures.append(future)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return clock.wait(futures)


class _Clock:
    """Collects when requests were answered."""

    def __init__(self):
        self._start, self._answers = time.monotonic(), []

    def elapsed(self) -> float:
        return time.monotonic() - self._start

    def record(self, arrival: float) -> None:
        done = self.elapsed()
        self._answers.append((done, done - arrival))

    def wait(self, futures) -> Measured:
        for future in futures:
            future.result()
        while len(self._answers) < len(futures):  # A callback may run a moment after the result is there.
            time.sleep(0.001)
        done_at, latencies = np.array(sorted(self._answers)).T
        return Measured(latencies, done_at)
