"""The slots of one image size: which job has which, and what the device is asked to do next."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dmm_jax.models import drawing
from dmm_jax.models.preview import GREY
from dmm_jax.pipeline import PIXELS_DECODED, Pipeline
from dmm_jax.runtime import sharding
from dmm_jax.serve import programs, work
from dmm_jax.serve.fair_queue import FairQueue
from dmm_jax.serve.programs import Variant
from dmm_jax.serve.requests import Job

SMALL_SHARE = 4  # A second program has a quarter of the slots: one request alone does not wait for all slots' work.
CHUNKS_ENCODED = 8  # Rows of the text encoders' program: the prompts of four guided requests.
IMAGES_DECODED = 4  # Images that each device decodes at once, if so many are finished.


def variants(per_device: int, max_chunks: int) -> list[Variant]:
    """Returns the forms of `denoise` that a pool compiles, the cheapest first.

    There are four, since each takes seconds to compile; the small one serves all kinds of requests.
    """
    small = max(per_device // SMALL_SHARE, 1)
    every_kind = {Variant(small, True, max_chunks), Variant(per_device, True, max_chunks)}
    full = {Variant(per_device, guided, 1) for guided in (False, True)}
    return sorted(every_kind | full, key=lambda variant: variant.cost)


def decode_counts(size: work.Size, per_device: int) -> list[int]:
    """Returns how many images each device decodes at once, the largest number first."""
    room = max(PIXELS_DECODED // math.prod(size), 1)
    return sorted({1, min(IMAGES_DECODED, per_device, room)}, reverse=True)


def chunks_encoded(max_chunks: int) -> int:
    """Returns the rows of the text encoders' program: at least a guided request's."""
    return max(CHUNKS_ENCODED, 2 * max_chunks)


class Flight(NamedTuple):
    """One evaluation on its way on the device."""

    variant: Variant
    jobs: list[tuple[Job, int]]  # And their rows in the results.
    previews: jax.Array
    finite: jax.Array


class Decoding(NamedTuple):
    """Images on their way to the host; jobs beyond the images are None."""

    jobs: list[Job | None]
    images: jax.Array
    finite: jax.Array


class Pool:
    """Slots for images of one size, divided among the devices of a mesh.

    Jobs take the first free slots, so that a small program serves few of them.
    """

    def __init__(self, pipeline: Pipeline, size: work.Size, num_slots: int, max_chunks: int, mesh: Mesh):
        """Plans the pool; `reset` allocates its arrays."""
        self.pipeline, self.size, self.mesh, self.max_chunks = pipeline, size, mesh, max_chunks
        self.per_device = num_slots // mesh.size
        self.waiting = FairQueue()
        self.jobs: list[Job | None] = [None] * num_slots
        self.step_s: dict[Variant, float] = {}  # Seconds of an evaluation.
        self.newest_step_s = 0.0
        # Slots in the order in which jobs take them: the first of every device, then the second, ...
        self.order = [device * self.per_device + k for k in range(self.per_device) for device in range(mesh.size)]
        self.decode_counts = decode_counts(size, self.per_device)
        self.variants = variants(self.per_device, max_chunks)
        encoders = len(pipeline.tokenizers.tokenizers)
        empty = pipeline.tokenize([""])
        self.empty_chunk = [rows[0, 0] for rows in empty]  # Ids and weights.
        self.chunk_length = empty.input_ids.shape[2] // encoders
        self.preview = GREY
        self.slots = None

    @property
    def running(self) -> list[Job]:
        """The jobs that have a slot."""
        return [job for job in self.jobs if job is not None]

    @property
    def busy(self) -> bool:
        """Whether the pool has anything to do."""
        return bool(self.running or self.waiting)

    @property
    def seconds_to_a_slot(self) -> float:
        """The time until the first of the running jobs is done, while all slots are taken."""
        evaluations = min((job.num_steps - job.step for job in self.running), default=1)
        return evaluations * (self.newest_step_s or max(self.step_s.values(), default=0.0))

    def reset(self) -> None:
        """Allocates empty slots."""
        config = self.pipeline.unet.merged().config
        factor = self.pipeline.vae_scale_factor
        shape = (len(self.jobs), self.size[0] // factor, self.size[1] // factor, config["in_channels"])
        text = jax.eval_shape(lambda: self._encode_chunks([]))
        text_shape = (self.max_chunks, *text.encoder_hidden_states.shape[1:])
        pooled = 0 if text.pooled is None else text.pooled.shape[-1]
        self.slots = programs.empty(self.mesh, shape, text_shape, pooled, self.pipeline.dtype)

    def release(self) -> None:
        """Frees the slots of jobs that are cancelled or have failed."""
        self.jobs = [None if job is not None and job.future.done() else job for job in self.jobs]

    def admit(self, time_s: float) -> list[tuple[int, Job]]:
        """Gives free slots to waiting jobs, as far as there are both; returns these slots and jobs."""
        new = []
        for slot in self.order:
            if self.jobs[slot] is None and self.waiting:
                self.jobs[slot] = job = self.waiting.pop()
                job.started_at = time_s
                new.append((slot, job))
        return new

    def place(self, new: Sequence[tuple[int, Job]]) -> None:
        """Dispatches prompts and noise of jobs into their slots, by as many calls as their chunks need."""
        if self.slots is None:
            self.reset()
        group, num_chunks = [], 0
        for slot, job in new:
            size = job.work.tokens.input_ids[..., 0].size
            if num_chunks + size > chunks_encoded(self.max_chunks):
                self.place_group(group)
                group, num_chunks = [], 0
            group.append((slot, job))
            num_chunks += size
        if group:
            self.place_group(group)

    def place_group(self, jobs: Sequence[tuple[int, Job]]) -> None:
        """Dispatches prompts and noise of jobs whose chunks one call encodes."""
        chunks = np.full((len(self.jobs), 2, self.max_chunks), -1, np.int32)
        seeds, scales = np.zeros(len(self.jobs), np.uint32), np.zeros(len(self.jobs), np.float32)
        rows = []
        for slot, job in jobs:
            tokens = job.work.tokens
            numbers = len(rows) + np.arange(tokens.input_ids[..., 0].size).reshape(tokens.input_ids.shape[:2])
            chunks[slot, :, : job.work.num_chunks] = numbers  # Without guidance both are the prompt.
            seeds[slot], scales[slot] = job.work.seed, job.work.init_noise_sigma
            rows += [pair for prompt in zip(*tokens, strict=True) for pair in zip(*prompt, strict=True)]
        text = self._encode_chunks(rows)
        self.slots = programs.place(self.mesh, self.slots, text, chunks, seeds, scales)

    def _encode_chunks(self, rows):
        """Returns the states of chunks, pairs of ids and weights, and of empty ones up to a fixed number."""
        rows = rows + [self.empty_chunk] * (chunks_encoded(self.max_chunks) - len(rows))
        ids, weights = (np.stack(arrays)[:, None] for arrays in zip(*rows, strict=True))  # (C, 1, EL)
        network = self.pipeline.text_encoders
        return drawing.encode(network.graph, network.params, *sharding.spread((ids, weights)))

    def denoise(self) -> Flight:
        """Dispatches one evaluation for every job, by the smallest program that serves them."""
        rows = np.zeros((len(self.jobs), self._num_columns), np.float32)
        busy = [(slot, job) for slot, job in enumerate(self.jobs) if job is not None]
        for slot, job in busy:
            rows[slot] = job.work.table[job.num_dispatched]
            job.num_dispatched += 1
        needed = Variant(
            max(slot % self.per_device for slot, _ in busy) + 1,
            any(job.work.guided for _, job in busy),
            max(job.work.num_chunks for _, job in busy),
        )
        variant = next(variant for variant in self.variants if variant.serves(needed))
        previews, finite = self.run(variant, rows)
        numbered = [(job, slot // self.per_device * variant.num_slots + slot % self.per_device) for slot, job in busy]
        return Flight(variant, numbered, previews, finite)

    @property
    def _num_columns(self) -> int:
        return len(work.COLUMNS) + len(self.pipeline.styles)

    def run(self, variant: Variant, rows: np.ndarray | None = None) -> tuple[jax.Array, jax.Array]:
        """Dispatches one evaluation; without rows, of empty slots."""
        if rows is None:
            rows = np.zeros((len(self.jobs), self._num_columns), np.float32)
        unet = self.pipeline.unet
        self.slots, previews, finite = programs.denoise(
            unet.graph, self.mesh, variant, self.size, unet.params, self.slots, rows, self.preview
        )
        return previews, finite

    def decode_finished(self) -> list[Decoding]:
        """Frees the slots of jobs whose last evaluation is dispatched, and dispatches their decoding."""
        finished: list[list] = [[] for _ in range(self.mesh.size)]
        for slot, job in enumerate(self.jobs):
            if job is not None and job.num_dispatched == job.num_steps:
                finished[slot // self.per_device].append((slot % self.per_device, job))
        decodings = []
        while most := max(map(len, finished)):
            count = next(count for count in self.decode_counts if count <= most)
            parts = [slots[:count] + [(0, None)] * (count - len(slots)) for slots in finished]
            finished = [slots[count:] for slots in finished]
            numbers, jobs = zip(*(pair for part in parts for pair in part), strict=True)
            decodings.append(Decoding(list(jobs), *self.decode(np.array(numbers, np.int32))))
        # Only now: a job whose program fails is still in its slot.
        self.jobs = [None if job is not None and job.num_dispatched == job.num_steps else job for job in self.jobs]
        return decodings

    def decode(self, numbers: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Dispatches the decoding of slots, numbered on their own devices."""
        vae = self.pipeline.vae
        images, finite = programs.decode(vae.graph, self.mesh, vae.params, self.slots.latents, numbers)
        images.copy_to_host_async()
        return images, finite
