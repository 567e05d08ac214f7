"""`python -m tests.serve.load`: many clients ask the engine at once and cancel at random moments.

Prints one JSON object: how the requests ended, and the memory of the process after 200 requests and at the end. Exits
with 1 if a request that was accepted and not cancelled has no image, or if memory grew by more than --growth.
"""

import argparse
import dataclasses
import gc
import json
import pathlib
import random
import sys
import threading
import time

from dmm_jax.diffusion import solvers
from dmm_jax.pipeline import Pipeline
from dmm_jax.serve.engine import Engine
from dmm_jax.serve.requests import ImageRequest, Job, QueueFull
from dmm_jax.world.shipped_checkpoints import BASE, FOLDER


@dataclasses.dataclass
class Ends:
    """How requests ended."""

    images: int = 0
    cancelled: int = 0
    failed: int = 0
    unanswered: int = 0
    full_queues: int = 0  # Answers that said to come back; the client did.


class Clients:
    """Threads that share a number of requests."""

    def __init__(self, engine: Engine, num_requests: int, num_clients: int, num_cancelled: int, seed: int = 0):
        """Prepares the requests; `num_cancelled` of them are cancelled at a random moment."""
        rng = random.Random(seed)
        cancelled = set(rng.sample(range(num_requests), num_cancelled))
        self._engine, self._num_clients, self._lock, self.ends = engine, num_clients, threading.Lock(), Ends()
        self._requests = [(random_request(engine, rng), number in cancelled) for number in range(num_requests)]

    def run(self) -> Ends:
        """Sends everything and waits for every answer."""
        threads = [threading.Thread(target=self._client, args=(number,)) for number in range(self._num_clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.ends

    def _client(self, number):
        rng = random.Random(number)
        while True:
            with self._lock:
                if not self._requests:
                    return
                request, cancels = self._requests.pop()
            job = self._submit(request, str(number))
            if cancels:
                time.sleep(rng.random() * 0.5)
                job.cancel()
            self._count(job)

    def _submit(self, request, client) -> Job:
        while True:
            try:
                return self._engine.submit(request, client)
            except QueueFull as full:
                with self._lock:
                    self.ends.full_queues += 1
                time.sleep(min(full.retry_after, 1.0))

    def _count(self, job):
        end = "images"
        try:
            if not job.future.cancelled():
                assert job.future.result(300.0).shape == (job.request.height, job.request.width, 3)
            else:
                end = "cancelled"
        except TimeoutError:
            end = "unanswered"
        except Exception:
            end = "failed"
        with self._lock:
            setattr(self.ends, end, getattr(self.ends, end) + 1)


def random_request(engine: Engine, rng: random.Random) -> ImageRequest:
    """Returns a request of any solver, guidance, length of prompt and number of steps."""
    styles = engine.pipeline.styles
    height, width = rng.choice(engine.sizes)
    return ImageRequest(
        prompt=rng.choice(["a large red circle", "a small blue star", "a star BREAK a green square"]),
        style=rng.choice(styles) if styles else None,
        seed=rng.randrange(2**32),
        height=height,
        width=width,
        num_inference_steps=rng.randint(1, 6),
        guidance_scale=rng.choice([1.0, 3.0, 7.0]),
        solver=rng.choice(sorted(solvers.SOLVERS)),
    )


def memory_mb() -> float:
    """Returns the resident memory of this process."""
    gc.collect()
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def main() -> int:
    """Runs 200 requests, reads the memory, and runs the remaining requests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(FOLDER / BASE))
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--cancelled", type=float, default=0.2, help="share of the requests")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--growth", type=float, default=0.02, help="share of the memory after 200 requests")
    args = parser.parse_args()
    engine = Engine(Pipeline.from_pretrained(args.model), [], args.slots, max_chunks=2)
    engine.start()
    rows = []
    for seed, number in enumerate((200, args.requests - 200)):
        started = time.monotonic()
        ends = Clients(engine, number, args.clients, int(number * args.cancelled), seed).run()
        rows.append(vars(ends) | {"seconds": time.monotonic() - started, "memory_mb": memory_mb()})
    engine.stop()
    growth = rows[1]["memory_mb"] / rows[0]["memory_mb"] - 1.0
    print(json.dumps({"first_200": rows[0], "others": rows[1], "memory_growth": growth}))
    unanswered = sum(row["unanswered"] + row["failed"] for row in rows)
    return int(bool(unanswered) or growth > args.growth)


if __name__ == "__main__":
    sys.exit(main())
