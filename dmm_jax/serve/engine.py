"""The engine: requests of any style, solver, guidance and number of steps share one batch, evaluation by evaluation.

One thread plans and dispatches. While the device computes one evaluation, the thread waits until shortly before its
end, gives free slots to waiting requests, and dispatches the next one; so a request waits for one evaluation, and the
device for nothing. A second thread hands finished images over.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import queue
import threading
import time
import weakref
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from dmm_jax.config import arguments
from dmm_jax.models.unet_config import per_axis
from dmm_jax.pipeline import Pipeline
from dmm_jax.runtime.errors import UserError
from dmm_jax.serve import work
from dmm_jax.serve.counts import Counts
from dmm_jax.serve.pool import Flight, Pool
from dmm_jax.serve.requests import Draining, EngineFailed, ImageRequest, Job, NotFinite, QueueFull
from dmm_jax.serve.warm_up import warm_up

# The next evaluation is dispatched when this share of the current one's time is left, or earlier.
SHARE_BEFORE_END = 0.25
NEWEST_SHARE = 0.2  # Weight of the newest measurement in the running means of times.


class Engine:
    """A pipeline that serves requests from any number of threads."""

    def __init__(
        self,
        pipeline: Pipeline,
        sizes: Sequence[tuple[int, int]],
        num_slots: int,
        *,
        queue_size: int = 64,
        max_steps: int = 100,
        max_chunks: int = 4,
    ):
        """Checks the arguments; `start` compiles.

        Args:
          sizes: (height, width) in pixels of the images that it draws; the first is the default. Empty: the model's.
          num_slots: images of each size on their way at once, a multiple of the number of local devices.
          queue_size: requests that wait, at most.
          max_steps: of a request.
          max_chunks: chunks of tokens of a prompt.

        Raises:
          UserError: a number or a size does not fit.
        """
        mesh = Mesh(np.asarray(jax.local_devices()), ("batch",))
        arguments.whole_number("num_slots", num_slots, 1)
        if num_slots % mesh.size:
            multiple = -(-num_slots // mesh.size) * mesh.size
            raise UserError(
                f"num_slots must be a multiple of the {mesh.size} devices; got {num_slots}. Use {multiple}."
            )
        self.pipeline, self.num_slots = pipeline, num_slots
        self.queue_size = arguments.whole_number("queue_size", queue_size, 1)
        max_steps = arguments.whole_number("max_steps", max_steps, 1, pipeline.schedule.num_train_timesteps)
        max_chunks = arguments.whole_number("max_chunks", max_chunks, 1)
        self.sizes = tuple(dict.fromkeys(_checked_size(pipeline, *size) for size in sizes or [(0, 0)]))
        self.limits = work.Limits(self.sizes, max_steps, max_chunks)
        self.pools = {size: Pool(pipeline, size, num_slots, max_chunks, mesh) for size in self.sizes}
        self.ready = False
        self._plan = work.plans(pipeline)
        self._counts = Counts()
        self._changed = threading.Condition()  # Guards the counts, the waiting jobs and who has which slot.
        self._draining, self._stopping = False, threading.Event()
        self._flights: collections.deque[tuple[Pool, Flight, float]] = collections.deque()  # And times of dispatch.
        self._completed_at, self._dispatch_s = 0.0, 0.0
        self._decodings: queue.SimpleQueue = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Compiles every program, which takes minutes at full size, and begins to serve."""
        for pool in self.pools.values():
            warm_up(pool)
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._run, self._deliver)]
        for thread in self._threads:
            thread.start()
        self.ready = True

    def submit(self, request: ImageRequest, client: str = "") -> Job:
        """Accepts a request.

        Args:
          client: whose request it is: waiting clients take turns.

        Raises:
          QueueFull: try again after its `retry_after`.
          Draining: the engine stops.
          UserError: the request does not fit; the message says what would.
        """
        fields = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
        fields, arrays = work.check(fields, self.pipeline, self.limits, self._plan)
        job = Job(ImageRequest(**fields), arrays, client, self._num_ahead)
        with self._changed:
            if self._draining:
                raise Draining("the server is stopping and takes no more requests.")
            if self._num_waiting() >= self.queue_size:
                self._counts.refused += 1
                seconds = self._seconds_to_a_place()
                raise QueueFull(
                    f"{self.queue_size} requests wait, and no more may. Try again in {seconds:.1f} seconds.", seconds
                )
            self._counts.accepted += 1
            self.pools[arrays.size].waiting.push(job)
            self._changed.notify_all()
        # A strong reference would make a cycle, which keeps images until Python looks for cycles.
        job.future.add_done_callback(functools.partial(self._settled, weakref.ref(job), job.accepted_at))
        return job

    def drain(self, timeout: float) -> bool:
        """Takes no more requests, and waits for the accepted ones; returns whether all are answered in time."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._counts.unfinished, timeout)

    def stop(self) -> None:
        """Ends at once: requests without an image fail with `Draining`."""
        with self._changed:
            self._draining, self.ready = True, False
            self._stopping.set()
            self._changed.notify_all()
        for thread in self._threads[:1]:
            thread.join()
        self._decodings.put(None)  # After the last images.
        for thread in self._threads[1:]:
            thread.join()
        for pool in self.pools.values():
            for job in [*pool.waiting, *pool.running]:
                _fail(job, Draining("the server has stopped."))

    def counts(self) -> dict:
        """Returns counters since the start, and how many requests wait and run now."""
        with self._changed:
            running = sum(len(pool.running) for pool in self.pools.values())
            gauges = {"waiting": self._num_waiting(), "running": running, "slots": self.num_slots * len(self.pools)}
            step_s = {f"{width}x{height}": pool.newest_step_s for (height, width), pool in self.pools.items()}
            return self._counts.as_dict() | gauges | {"step_s": step_s}

    def _num_waiting(self) -> int:
        return sum(len(pool.waiting) for pool in self.pools.values())

    def _num_ahead(self, job):
        with self._changed:
            return self.pools[job.work.size].waiting.num_ahead(job)

    def _seconds_to_a_place(self) -> float:
        """Returns the time until a job leaves the queue: until the first running job of a pool with a queue is done."""
        busy = [pool for pool in self.pools.values() if pool.busy]
        times = [pool.seconds_to_a_slot for pool in busy if pool.waiting]
        return min(times, default=0.0) * len(busy)

    def _settled(self, reference: weakref.ref, accepted_at: float, future) -> None:
        """Counts an answered request; a cancelled one leaves the queue."""
        with self._changed:
            if (job := reference()) is not None:
                self.pools[job.work.size].waiting.discard(job)
            if future.cancelled():
                self._counts.cancelled += 1
            elif future.exception() is not None:
                self._counts.failed += 1
            else:
                self._counts.finished += 1
                self._counts.images_seconds.add(time.monotonic() - accepted_at)
            self._changed.notify_all()

    def _run(self) -> None:
        """Plans and dispatches until the engine stops."""
        turn = 0
        while not self._stopping.is_set():
            with self._changed:
                if not self._flights:
                    self._changed.wait_for(lambda: self._stopping.is_set() or self._busy_pools())
                busy = self._busy_pools()
            turn += 1
            pool = busy[turn % len(busy)] if busy else None
            try:
                if pool is not None:
                    self._step(pool)
                while len(self._flights) > (1 if busy else 0):
                    pool = self._flights[0][0]
                    self._complete(*self._flights.popleft())
            except Exception as error:  # Whatever a program does, the next requests are served.
                self._recover(pool, error)

    def _busy_pools(self):
        return [pool for pool in self.pools.values() if pool.busy]

    def _step(self, pool: Pool) -> None:
        """Dispatches the prompts of a pool's new jobs, one evaluation for all, and the decoding of finished ones."""
        self._wait_for_the_end_of_the_last_flight()
        started = time.monotonic()
        with self._changed:
            pool.release()
            new = pool.admit(started)
            for _, job in new:
                self._counts.start_seconds.add(started - job.accepted_at)
        if not pool.running:
            return
        pool.place(new)
        flight = pool.denoise()
        self._flights.append((pool, flight, started))
        for decoding in pool.decode_finished():
            self._decodings.put(decoding)
        self._dispatch_s += NEWEST_SHARE * (time.monotonic() - started - self._dispatch_s)
        with self._changed:
            self._counts.steps += 1
            self._counts.slot_steps_busy += len(flight.jobs)
            self._counts.slot_steps_computed += flight.variant.num_slots * pool.mesh.size

    def _wait_for_the_end_of_the_last_flight(self) -> None:
        """Waits until shortly before the device is free, so that requests that come until then join the next flight."""
        if self._flights:
            pool, flight, dispatched_at = self._flights[-1]
            begun_at, step_s = max(self._completed_at, dispatched_at), pool.step_s[flight.variant]
            ahead = max(SHARE_BEFORE_END * step_s, 2.0 * self._dispatch_s)
            self._stopping.wait(max(begun_at + step_s - ahead - time.monotonic(), 0.0))

    def _complete(self, pool: Pool, flight: Flight, dispatched_at: float) -> None:
        """Waits for an evaluation on the device, and tells its jobs."""
        is_late = flight.finite.is_ready()
        finite = np.asarray(flight.finite)
        completed_at = time.monotonic()
        seconds = completed_at - max(self._completed_at, dispatched_at)
        if is_late:  # The device waited for this thread, which must plan earlier: the true time is below this one.
            seconds /= 2
        pool.step_s[flight.variant] += NEWEST_SHARE * (seconds - pool.step_s[flight.variant])
        pool.newest_step_s = pool.step_s[flight.variant]
        self._completed_at = completed_at
        for job, row in flight.jobs:
            job.step, job.newest_preview = job.step + 1, (flight.previews, row)
            if not finite[row]:
                _fail(job, _not_finite("latents"))

    def _recover(self, pool: Pool, error: Exception) -> None:
        """Fails the running jobs of a pool whose program failed, and gives it new slots."""
        failure = EngineFailed(f"a program of the engine failed on the device: {error}")
        failure.__cause__ = error
        self._flights = collections.deque(entry for entry in self._flights if entry[0] is not pool)
        with self._changed:
            self._counts.engine_failures += 1
            jobs, pool.jobs = pool.running, [None] * len(pool.jobs)
        for job in jobs:
            _fail(job, failure)
        pool.slots = None

    def _deliver(self) -> None:
        """Hands images over as they arrive from the device."""
        while (decoding := self._decodings.get()) is not None:
            try:
                images, finite = np.asarray(decoding.images), np.asarray(decoding.finite)
            except Exception as error:
                failure = EngineFailed(f"the decoder failed on the device: {error}")
                for job in filter(None, decoding.jobs):
                    _fail(job, failure)
                continue
            for job, image, is_finite in zip(decoding.jobs, images, finite, strict=True):
                if job is None:
                    continue
                if not is_finite:
                    _fail(job, _not_finite("pixels"))
                elif not job.future.done() and job.future.set_running_or_notify_cancel():
                    job.future.set_result(image.copy())


def _fail(job: Job, error: Exception) -> None:
    """Answers a job with an error, unless it is answered or cancelled."""
    try:
        job.future.set_exception(error)
    except concurrent.futures.InvalidStateError:
        pass


def _not_finite(values: str) -> NotFinite:
    return NotFinite(
        f"the {values} of this image hold NaN or infinity. Take a lower guidance scale, another solver or more steps; "
        "if all images fail, the server's checkpoint is damaged or needs --dtype float32."
    )


def _checked_size(pipeline: Pipeline, height: int, width: int) -> work.Size:
    """Returns a size that the networks can halve as often as they do; 0 is the model's side."""
    config, factor = pipeline.unet.merged().config, pipeline.vae_scale_factor
    multiple = factor * 2 ** (len(config["down_block_types"]) - 1)
    cells = per_axis(config["sample_size"])
    height = arguments.pixels("a size's height", height or cells[0] * factor, multiple)
    return height, arguments.pixels("a size's width", width or cells[1] * factor, multiple)
