"""An engine without networks: a thread finishes one step of every running job in every `period_s`."""

import collections
import dataclasses
import threading
import time
import types

import numpy as np

from dmm_jax.config import arguments
from dmm_jax.config.options import get_config, solver_options
from dmm_jax.config.styles import style_rows
from dmm_jax.diffusion import solvers
from dmm_jax.runtime.errors import UserError
from dmm_jax.serve.counts import Histogram
from dmm_jax.serve.engine import Engine
from dmm_jax.serve.requests import Draining, EngineFailed, Job, NotFinite, QueueFull
from dmm_jax.serve.work import Limits, Work

STYLES = ("anime", "photo", "ink")


class FakeJob(Job):
    """A job whose place in the queue is always the first."""

    def __init__(self, request, client):
        size, table = (request.height, request.width), np.zeros((request.num_inference_steps, 1), np.float32)
        super().__init__(request, Work(size, request.seed, None, 1.0, table), client, lambda _: 0)

    def preview(self):
        """Returns a picture of one colour once the job runs."""
        return np.full((8, 8, 3), 10 * self.step % 255, np.uint8) if self.step else None


class FakeEngine(Engine):
    """Draws one colour per seed. Prompts with "NaN" or "broken" in them fail as on a device."""

    def __init__(self, *, num_slots=4, queue_size=64, period_s=0.002, sizes=((64, 64), (64, 128)), styles=STYLES):
        self.pipeline = types.SimpleNamespace(
            name="tiny", styles=tuple(styles), prompt_grammar="a1111", embeddings={},
            source=types.SimpleNamespace(digest=lambda _: "0123456789abcdef", clip_skip=1),
            schedule=types.SimpleNamespace(num_train_timesteps=1000), sampling=solver_options(get_config()),
        )  # fmt: skip
        self.sizes, self.num_slots, self.queue_size, self.period_s = tuple(sizes), num_slots, queue_size, period_s
        self.ready, self.draining, self.stopped = False, False, False
        self.seconds, self.limits = Histogram(), Limits(self.sizes, 100, 4)
        self.waiting, self.running, self.lock = collections.deque(), [], threading.Lock()
        self.jobs, self.numbers = [], collections.Counter()

    def start(self):
        """Starts the thread."""
        self.ready = True
        threading.Thread(target=self._work, daemon=True).start()

    def submit(self, request, client=""):
        """Checks a request and queues it."""
        if self.draining:
            raise Draining("the server is stopping.")
        pipeline = self.pipeline
        absent = {name: value for name, value in pipeline.sampling.items() if getattr(request, name) is None}
        request = dataclasses.replace(request, **absent)
        if pipeline.styles:
            style_rows(request.style, pipeline.styles, np.array([999.0, 1.0]), 1000)
        elif request.style is not None:
            raise UserError("this checkpoint has no styles.")
        size = request.height or self.sizes[0][0], request.width or self.sizes[0][1]
        if size not in self.sizes:
            raise UserError(f"there is no size {size[1]} x {size[0]} here; there are: 64 x 64, 128 x 64.")
        arguments.whole_number("seed", request.seed, 0, arguments.MAX_SEED)
        arguments.whole_number("num_inference_steps", request.num_inference_steps, 1, self.limits.max_steps)
        arguments.number("guidance_scale", request.guidance_scale)
        arguments.number("guidance_rescale", request.guidance_rescale, 0.0, 1.0)
        fields = {"height": size[0], "width": size[1], "solver": solvers.canonical(request.solver)}
        job = FakeJob(dataclasses.replace(request, **fields), client)
        with self.lock:
            if len(self.waiting) >= self.queue_size:
                self.numbers["refused"] += 1
                raise QueueFull(f"{self.queue_size} images wait already: ask again in 3 s.", 2.5)
            self.waiting.append(job)
            self.jobs.append(job)
            self.numbers["accepted"] += 1
        return job

    def _work(self):
        while not self.stopped:
            time.sleep(self.period_s)
            with self.lock:
                self.running = [job for job in self.running if not job.future.done()]
                while self.waiting and len(self.running) < self.num_slots:
                    self.running.append(self.waiting.popleft())
                for job in self.running:
                    self._step(job)

    def _step(self, job):
        job.step += 1
        if job.step < job.num_steps or not job.future.set_running_or_notify_cancel():
            return
        if "NaN" in job.request.prompt:
            job.future.set_exception(NotFinite(f"the latents of {job.request.prompt!r} are not finite."))
        elif "broken" in job.request.prompt:
            job.future.set_exception(EngineFailed("the denoiser failed on the device."))
        else:
            self.numbers["finished"] += 1
            self.seconds.add(time.monotonic() - job.accepted_at)
            shape = (job.request.height, job.request.width, 3)
            job.future.set_result(np.full(shape, job.request.seed % 256, np.uint8))

    def drain(self, timeout):
        """Waits for all jobs."""
        self.draining, end = True, time.monotonic() + timeout
        while (self.waiting or self.running) and time.monotonic() < end:
            time.sleep(self.period_s)
        return not (self.waiting or self.running)

    def stop(self):
        """Ends the thread."""
        self.stopped = True

    def counts(self):
        """Returns what the engine has counted."""
        state = {"waiting": len(self.waiting), "running": len(self.running), "slots": self.num_slots, **self.numbers}
        return state | {"images_seconds": self.seconds.as_dict(), "step_s": {"64x64": self.period_s}}
