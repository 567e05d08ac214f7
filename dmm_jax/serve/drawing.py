"""From one HTTP request to its jobs, and from finished jobs to PNG files that carry their parameters."""

import asyncio
import base64
import contextlib
import dataclasses
import io
import time
from collections.abc import AsyncIterator, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dmm_jax.config.styles import style_text
from dmm_jax.gallery.png import Parameters, save_png
from dmm_jax.runtime.processes import say
from dmm_jax.serve.faults import Fault, not_ready
from dmm_jax.serve.requests import Draining, ImageRequest, Job
from dmm_jax.serve.service import Service, client_of

POLL_S = 0.05  # How often a stream looks at its jobs.
HEARTBEAT_S = 10.0  # A silent stream sends a comment this often, so that proxies keep it open.


@dataclasses.dataclass(frozen=True)
class Picture:
    """A finished image as a PNG file."""

    png: bytes
    parameters: Parameters

    @property
    def base64(self) -> str:
        """The file in base64, as all interfaces send it."""
        return base64.b64encode(self.png).decode()


async def submit(service: Service, request: Request, image_requests: Sequence[ImageRequest]) -> list[Job]:
    """Hands the images of one HTTP request to the engine, all or none.

    Raises:
      Fault: too many images, or the server is not ready.
      UserError: the engine refuses one of them, or its queue is full.
    """
    limit = service.settings.max_images
    if len(image_requests) > limit:
        raise Fault(400, "too_many_images", f"one request may ask for {limit} images; got {len(image_requests)}.")
    if not service.engine.ready:
        raise not_ready()
    client = client_of(request)

    def submit_all() -> list[Job]:
        jobs = []
        try:
            for image_request in image_requests:
                jobs.append(service.engine.submit(image_request, client))
        except Exception:
            cancel(jobs)
            raise
        return jobs

    return await asyncio.to_thread(submit_all)


def cancel(jobs: Sequence[Job]) -> None:
    """Cancels the jobs that are not done; their slots are free at the next step."""
    for job in jobs:
        if not job.future.done():
            job.cancel()


async def draw(
    service: Service, request: Request, jobs: Sequence[Job], may_cancel: bool = False
) -> list[Picture | None]:
    """Waits for jobs and returns their pictures; cancels all of them if the client goes away or one fails.

    Args:
      may_cancel: whether somebody else may cancel a job; its picture is None then.

    Raises:
      Exception: what the first job raised that failed.
    """
    start = time.perf_counter()
    departure = asyncio.ensure_future(_client_left(request))
    done = [asyncio.ensure_future(_done(job)) for job in jobs]
    try:
        while pending := [task for task in done if not task.done()]:
            await asyncio.wait([departure, *pending], return_when=asyncio.FIRST_COMPLETED)
            if departure.done():
                raise Fault(499, "client_left", "the client closed the connection.")
            failed = [job.future.exception() for job in jobs if job.future.done() and not job.future.cancelled()]
            for error in filter(None, failed):
                raise error
        if not may_cancel and any(job.future.cancelled() for job in jobs):
            raise Draining("the image was cancelled: the server is stopping.")
        pictures = [
            None if job.future.cancelled() else await picture_of(service, job, job.future.result()) for job in jobs
        ]
        log(service, request, jobs, time.perf_counter() - start)
        return pictures
    finally:
        cancel(jobs)
        for task in (departure, *done):
            task.cancel()


async def _done(job: Job) -> None:
    """Returns when a job is finished, has failed or is cancelled."""
    loop, event = asyncio.get_running_loop(), asyncio.Event()

    def wake(_) -> None:
        with contextlib.suppress(RuntimeError):  # The server has stopped and its loop is closed.
            loop.call_soon_threadsafe(event.set)

    job.future.add_done_callback(wake)
    await event.wait()


async def _client_left(request: Request) -> None:
    """Returns when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def picture_of(service: Service, job: Job, image: UInt8[np.ndarray, "H W 3"]) -> Picture:
    """Encodes a finished image, in a thread of its own."""
    parameters = parameters_of(service, job)

    def encode() -> bytes:
        file = io.BytesIO()
        save_png(file, image, parameters)
        return file.getvalue()

    return Picture(await asyncio.to_thread(encode), parameters)


def parameters_of(service: Service, job: Job) -> Parameters:
    """Returns everything that draws a job's image again."""
    request, pipeline = job.request, service.engine.pipeline
    return Parameters(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt or "",
        seed=request.seed,
        steps=request.num_inference_steps,
        solver=request.solver,
        guidance_scale=request.guidance_scale,
        width=request.width,
        height=request.height,
        model=pipeline.name,
        model_hash=service.model_hash,
        styles=request.style,
        guidance_rescale=request.guidance_rescale,
        clip_skip=pipeline.source.clip_skip,
        prompt_grammar=pipeline.prompt_grammar,
    )


async def preview_of(job: Job) -> str | None:
    """Returns a small PNG of a running job's clean image as it is foreseen now, in base64; None while it waits."""

    def encode() -> str | None:  # It may wait for the device.
        image = job.preview()
        if image is None:
            return None
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG", compress_level=1)
        return base64.b64encode(file.getvalue()).decode()

    return await asyncio.to_thread(encode)


async def changes(jobs: Sequence[Job]) -> AsyncIterator[int | None]:
    """Yields the index of a job that has moved on or is done, each done one once; None now and then if nothing moves.

    It ends when all jobs are done, and cancels them if the caller stops listening.
    """
    seen: dict[int, tuple] = {}
    quiet_since = time.monotonic()
    try:
        while True:
            for index, job in enumerate(jobs):
                state = (job.future.done(), job.step, job.queued_ahead)
                if seen.get(index, (False,))[0] or state == seen.get(index):
                    continue
                seen[index], quiet_since = state, time.monotonic()
                yield index
            if all(state[0] for state in seen.values()) and len(seen) == len(jobs):
                return
            if time.monotonic() - quiet_since > HEARTBEAT_S:
                quiet_since = time.monotonic()
                yield None
            await asyncio.sleep(POLL_S)
    finally:
        cancel(jobs)


class EventStream(Response):
    """Server-sent events; stops the source of events when the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str]):
        """Takes blocks of text from `event_text`."""
        super().__init__(headers={"X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends events until they end or the client goes away."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        sending = asyncio.ensure_future(self._send_all(send))
        departure = asyncio.ensure_future(_client_left(Request(scope, receive)))
        await asyncio.wait([sending, departure], return_when=asyncio.FIRST_COMPLETED)
        departure.cancel()
        if not sending.done():
            sending.cancel()
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await sending

    async def _send_all(self, send: Send) -> None:
        async with contextlib.aclosing(self.events) as events:
            async for text in events:
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def event_text(name: str, data: str) -> str:
    """Returns one server-sent event; an event without a name is a comment that keeps the connection open."""
    return f"event: {name}\ndata: {data}\n\n" if name else ": waiting\n\n"


def log(service: Service, request: Request, jobs: Sequence[Job], seconds: float) -> None:
    """Prints one line about a finished HTTP request; prompts only if the user asked for them."""
    first = jobs[0].request
    line = (
        f"{client_of(request)} {request.url.path}: {len(jobs)} x {first.width}x{first.height}, "
        f"{first.num_inference_steps} steps of {first.solver}, {style_text(first.style) or 'no style'}, {seconds:.1f} s"
    )
    if service.settings.log_prompts:
        line += "".join(f"\n  {prompt!r}" for prompt in dict.fromkeys(job.request.prompt for job in jobs))
    say(line)
