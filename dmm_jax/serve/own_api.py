"""Our own interface, with everything that the engine can do: several styles, schedules, several seeds, progress."""

import dataclasses
import itertools
import json
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

import pydantic
from fastapi import APIRouter, Request

from dmm_jax.config.styles import NULL_STYLE, Style, is_schedule, parse_style, style_text
from dmm_jax.diffusion import solvers
from dmm_jax.diffusion.spacing import SPACINGS
from dmm_jax.serve import drawing, faults
from dmm_jax.serve.requests import AS_THE_MODEL, ImageRequest, Job
from dmm_jax.serve.service import Service, seeds_from

PREVIEW_S = 0.2  # A stream sends a preview of one image at most this often.
OTHER_NAMES = {
    "num_inference_steps": "steps", "cfg_scale": "guidance_scale", "sampler": "solver", "sampler_name": "solver",
    "style": "styles", "seed": "seeds", "prompts": "prompt", "model": "styles", "n": "num_images", "size": "width",
}  # fmt: skip
Mix = str | dict[str, float]
Start = float | tuple[float, float]


class DrawBody(pydantic.BaseModel):
    """The body of POST /api/draw: one image for every style and every seed."""

    model_config = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False, str_max_length=20_000)

    prompt: Annotated[str, pydantic.Field(strict=True)]
    negative_prompt: Annotated[str | None, pydantic.Field(description="null is not the same as '' for SDXL")] = None
    styles: Annotated[
        list[Mix | list[tuple[Start, Mix]] | None],
        pydantic.Field(
            min_length=1,
            max_length=64,
            description='each a name, a mix {"anime": 0.7, "photo": 0.3}, a schedule [[1000, "photo"], [600, "anime"]] '
            "or the text of one of these, as the command line takes it; null: the default",
        ),
    ] = [None]  # noqa: RUF012
    seeds: Annotated[list[int] | None, pydantic.Field(min_length=1, max_length=64)] = None
    num_images: Annotated[int, pydantic.Field(ge=1, le=64, description="random seeds, where `seeds` is absent")] = 1
    height: Annotated[int, pydantic.Field(ge=0, description="pixels; 0: the model's")] = 0
    width: Annotated[int, pydantic.Field(ge=0, description="pixels; 0: the model's")] = 0
    steps: Annotated[int | None, pydantic.Field(ge=1, description=AS_THE_MODEL)] = None
    guidance_scale: Annotated[float | None, pydantic.Field(description=AS_THE_MODEL)] = None
    guidance_rescale: Annotated[float | None, pydantic.Field(description=AS_THE_MODEL)] = None
    solver: Annotated[
        str | None, pydantic.Field(description=f"dpmpp_2m_karras, or A1111's name: DPM++ 2M Karras; {AS_THE_MODEL}")
    ] = None
    stream: Annotated[bool, pydantic.Field(description="progress and images as server-sent events")] = False
    previews: Annotated[bool, pydantic.Field(description="small images on the way, in a stream")] = True

    @pydantic.model_validator(mode="before")
    @classmethod
    def _knows_the_fields(cls, values: Any) -> Any:
        if isinstance(values, dict):
            faults.refuse_unknown_fields(values, list(cls.model_fields), OTHER_NAMES)
            values = {name: value for name, value in values.items() if value is not None}  # null: the default.
        return values


def router(service: Service) -> APIRouter:
    """Returns the addresses below /api."""
    routes = APIRouter(prefix="/api", tags=["dmm-jax"])

    @routes.get("/model")
    async def model() -> dict:
        """Describes the model: its styles, sizes and solvers, how it draws by default, and the limits of a request."""
        pipeline, engine = service.engine.pipeline, service.engine
        return {
            "name": pipeline.name,
            "hash": service.model_hash,
            "styles": [name for name in pipeline.styles if name != NULL_STYLE],
            "has_null_style": NULL_STYLE in pipeline.styles,
            "sizes": [{"width": width, "height": height} for height, width in engine.sizes],
            "solvers": [{"name": name, "label": label} for name, label in solvers.NAMES.items()],
            "spacings": [{"name": name, "label": label or "as trained"} for name, label in SPACINGS.items()],
            "unspaced": list(solvers.UNSPACED),
            "num_train_timesteps": pipeline.schedule.num_train_timesteps,
            "limits": {"images": service.settings.max_images, "steps": engine.limits.max_steps},
            "needs_key": bool(service.settings.keys),
            "sampling": pipeline.sampling,
            "example_prompt": service.settings.example_prompt,
        }

    @routes.post("/draw", response_model=None)
    async def draw(body: DrawBody, request: Request) -> dict | drawing.EventStream:
        """Draws one image for every style and every seed, style after style; refuses all if one cannot be drawn.

        With `stream`, sends the events `start`, then `progress`, `image` or `failed` for each image, and `done`.
        """
        jobs = await drawing.submit(service, request, _requests(service, body))
        if body.stream:
            return drawing.EventStream(_events(service, request, jobs, body.previews))
        return {"images": [described(picture) for picture in await drawing.draw(service, request, jobs) if picture]}

    return routes


def _requests(service: Service, body: DrawBody) -> list[ImageRequest]:
    seeds = seeds_from(None, body.num_images) if body.seeds is None else body.seeds
    count, limit = len(seeds) * len(body.styles), service.settings.max_images
    if count > limit:
        message = f"{len(body.styles)} styles and {len(seeds)} seeds are {count} images; a request may have {limit}."
        raise faults.Fault(400, "too_many_images", message)
    template = ImageRequest(
        prompt=body.prompt,
        negative_prompt=body.negative_prompt,
        height=body.height,
        width=body.width,
        num_inference_steps=body.steps,
        guidance_scale=body.guidance_scale,
        guidance_rescale=body.guidance_rescale,
        solver=body.solver,
    )
    styles = [_style(style, service) for style in body.styles]
    return [dataclasses.replace(template, style=style, seed=seed) for style, seed in itertools.product(styles, seeds)]


def _style(style, service: Service) -> Style:
    if style is None or isinstance(style, str):
        text = service.style_of(style)
        return None if text is None else parse_style(text, service.engine.pipeline.schedule.num_train_timesteps)
    if isinstance(style, list) and not is_schedule(style):
        raise faults.Fault(422, "invalid_request", "styles: a schedule is not empty.", field="styles")
    return style


def described(picture: drawing.Picture) -> dict:
    """Returns a finished image as JSON: the PNG file in base64, and its parameters."""
    parameters = picture.parameters
    return {
        "png": picture.base64,
        "parameters": dataclasses.asdict(parameters),
        "style": style_text(parameters.styles),
        "text": parameters.a1111_text(),
    }


async def _events(service: Service, request: Request, jobs: list[Job], previews: bool) -> AsyncIterator[str]:
    start, shown = time.perf_counter(), [0.0] * len(jobs)
    names = [{"style": style_text(job.request.style), "seed": job.request.seed} for job in jobs]
    yield drawing.event_text("start", json.dumps({"images": names}))
    async for index in drawing.changes(jobs):
        if index is None:
            yield drawing.event_text("", "")
            continue
        job = jobs[index]
        if not job.future.done():
            values = {"step": job.step, "num_steps": job.num_steps, "queued_ahead": job.queued_ahead}
            is_due = previews and job.step and time.perf_counter() - shown[index] > PREVIEW_S
            if is_due and (preview := await drawing.preview_of(job)):
                shown[index], values["preview"] = time.perf_counter(), preview
            yield drawing.event_text("progress", json.dumps({"index": index} | values))
            continue
        try:
            picture = await drawing.picture_of(service, job, job.future.result(0))
            yield drawing.event_text("image", json.dumps({"index": index} | described(picture)))
        except Exception as error:
            body = faults.body_of(faults.fault_of(error), request.url.path)
            yield drawing.event_text("failed", json.dumps({"index": index} | body))
    drawing.log(service, request, jobs, time.perf_counter() - start)
    yield drawing.event_text("done", "{}")
