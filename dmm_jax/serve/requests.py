"""What a client asks the engine for, the job that it becomes, and the errors that it can meet."""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import UInt8

from dmm_jax.config.styles import Style
from dmm_jax.runtime.errors import UserError
from dmm_jax.serve.work import Work

AS_THE_MODEL = "default: as the run that made the model says, or else Pipeline's"


@dataclasses.dataclass(frozen=True)
class ImageRequest:
    """One image. The fields mean what `Pipeline`'s arguments do."""

    prompt: str
    negative_prompt: str | None = None
    style: Style = None  # A name, a mix or a schedule: `config.styles`.
    seed: int = 0
    height: int = 0  # Pixels; 0: the engine's default size.
    width: int = 0
    num_inference_steps: int | None = None  # This and the next three: None is as `Pipeline.sampling` says.
    guidance_scale: float | None = None
    guidance_rescale: float | None = None
    solver: str | None = None  # A name in `diffusion.solvers.SOLVERS`, or AUTOMATIC1111's.


class QueueFull(UserError):
    """As many requests wait as the engine holds."""

    def __init__(self, text: str, retry_after: float):
        """Takes the message and the seconds until a place is expected to be free."""
        super().__init__(text)
        self.retry_after = retry_after


class Draining(UserError):
    """The engine stops and takes no more requests."""


class NotFinite(UserError):
    """The latents or the pixels of this image hold NaN or infinity; other requests are not affected."""


class EngineFailed(RuntimeError):
    """A program failed on the device while this request ran; the engine continues with the next ones."""


class Job:
    """One request on its way to an image."""

    def __init__(self, request: ImageRequest, work: Work, client: str, queued_ahead: Callable[["Job"], int]):
        """Takes a request with every default filled in, its arrays, whose it is, and how the engine finds its place."""
        self.request, self.work, self.client = request, work, client
        self.future: concurrent.futures.Future = concurrent.futures.Future()  # Becomes uint8 (H, W, 3).
        self.step = 0  # Evaluations of the network that the device has finished.
        self.num_steps = len(work.table)  # Evaluations in all: some solvers take two per step.
        self.num_dispatched = 0  # Evaluations that the device has been asked for.
        self.accepted_at, self.started_at = time.monotonic(), None  # Seconds; it starts when it gets a slot.
        self.newest_preview: tuple[jax.Array, int] | None = None  # Previews of all slots, and this job's row.
        self._queued_ahead = queued_ahead

    def __repr__(self) -> str:
        return f"Job({self.step}/{self.num_steps}, {self.request.width}x{self.request.height})"

    @property
    def queued_ahead(self) -> int:
        """The number of waiting jobs that get a slot before this one; 0 once it has one."""
        return self._queued_ahead(self)

    def cancel(self) -> None:
        """Cancels the future. A waiting job leaves the queue; a running job's slot is free at the next step."""
        self.future.cancel()

    def preview(self) -> UInt8[np.ndarray, "h w 3"] | None:
        """Returns a small picture of the newest x0, one pixel per latent cell; None before the first evaluation."""
        if self.newest_preview is None:
            return None
        previews, row = self.newest_preview
        return np.asarray(previews)[row]
