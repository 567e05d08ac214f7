"""OpenAI's images API: a style or a mix of styles is the model."""

import dataclasses
import json
import re
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import pydantic
from fastapi import APIRouter, Request

from dmm_jax.config.styles import parse_style, style_row
from dmm_jax.runtime.errors import UserError
from dmm_jax.serve import drawing, faults
from dmm_jax.serve.requests import AS_THE_MODEL, ImageRequest, Job
from dmm_jax.serve.service import Service, seeds_from

_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
OTHER_NAMES = {
    "num_inference_steps": "steps", "cfg_scale": "guidance_scale", "num_images": "n", "sampler": "solver",
    "sampler_name": "solver", "width": "size", "height": "size", "batch_size": "n", "style": "model",
}  # fmt: skip


class ImagesBody(pydantic.BaseModel):
    """The body of POST /v1/images/generations. Fields after `user` are not OpenAI's."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, str_max_length=20_000)

    prompt: str
    model: Annotated[str | None, pydantic.Field(description="a style, or a mix: anime=0.7,photo=0.3")] = None
    n: Annotated[int, pydantic.Field(ge=1, description="images, each with its own seed")] = 1
    size: Annotated[str, pydantic.Field(description="auto, or WIDTHxHEIGHT")] = "auto"
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png"] = "png"
    background: Literal["auto", "opaque"] = "auto"
    quality: Annotated[Literal["auto", "standard"], pydantic.Field(description="use steps")] = "auto"
    moderation: Annotated[Literal["auto", "low"], pydantic.Field(description="nothing is moderated")] = "auto"
    stream: bool = False
    partial_images: Annotated[int, pydantic.Field(ge=0, le=3, description="previews in a stream")] = 0
    user: Annotated[str | None, pydantic.Field(description="not used")] = None
    negative_prompt: str | None = None
    seed: Annotated[int | None, pydantic.Field(description="the first image's; the next has seed + 1")] = None
    steps: Annotated[int | None, pydantic.Field(ge=1, description=AS_THE_MODEL)] = None
    guidance_scale: Annotated[float | None, pydantic.Field(description=AS_THE_MODEL)] = None
    guidance_rescale: Annotated[float | None, pydantic.Field(description=AS_THE_MODEL)] = None
    solver: Annotated[str | None, pydantic.Field(description=AS_THE_MODEL)] = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _knows_the_fields(cls, values: Any) -> Any:
        if isinstance(values, dict):
            faults.refuse_unknown_fields(values, list(cls.model_fields), OTHER_NAMES)
            values = {name: value for name, value in values.items() if value is not None}  # null: the default.
        return values

    @pydantic.field_validator("response_format", mode="before")
    @classmethod
    def _returns_no_addresses(cls, value: Any) -> Any:
        if value == "url":
            raise ValueError("this server keeps no files that an address could name: ask for b64_json.")
        return value


def router(service: Service) -> APIRouter:
    """Returns the addresses below /v1."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])
    created = int(time.time())

    def model(name: str) -> dict:
        return {"id": name, "object": "model", "created": created, "owned_by": service.engine.pipeline.name}

    @routes.get("/models")
    async def models() -> dict:
        """Lists the styles. A mix such as `anime=0.7,photo=0.3` is a model, too."""
        return {"object": "list", "data": [model(name) for name in service.model_names]}

    @routes.get("/models/{name}")
    async def one_model(name: str) -> dict:
        """Describes a style or a mix."""
        try:
            if name != service.engine.pipeline.name:
                style_row(parse_style(name), service.engine.pipeline.styles)
        except UserError as error:
            raise faults.Fault(404, "model_not_found", str(error), field="model") from error
        return model(name)

    @routes.post("/images/generations", response_model=None)
    async def generations(body: ImagesBody, request: Request) -> dict | drawing.EventStream:
        """Draws images; with `stream`, sends previews and then the image as server-sent events."""
        image_requests = _requests(service, body)
        jobs = await drawing.submit(service, request, image_requests)
        if body.stream:
            return drawing.EventStream(_events(service, request, jobs[0], body.partial_images))
        pictures = await drawing.draw(service, request, jobs)
        size = f"{jobs[0].request.width}x{jobs[0].request.height}"
        data = [{"b64_json": picture.base64, "seed": picture.parameters.seed} for picture in pictures if picture]
        return {"created": int(time.time()), "background": "opaque", "output_format": "png", "size": size, "data": data}

    return routes


def _requests(service: Service, body: ImagesBody) -> list[ImageRequest]:
    width, height = 0, 0
    if body.size != "auto":
        match = _SIZE.fullmatch(body.size)
        if not match:
            raise faults.Fault(
                400, "invalid_request", "size: write auto, or WIDTHxHEIGHT such as 512x512.", field="size"
            )
        width, height = map(int, match.groups())
    if body.n > service.settings.max_images:
        limit = service.settings.max_images
        raise faults.Fault(400, "too_many_images", f"n may be up to {limit}; got {body.n}.", field="n")
    if body.stream and body.n != 1:
        raise faults.Fault(400, "invalid_request", f"a stream has one image; got n = {body.n}.", field="n")
    if body.partial_images and not body.stream:
        raise faults.Fault(400, "invalid_request", "partial_images: set stream to true.", field="partial_images")
    style = service.style_of(body.model)
    template = ImageRequest(
        prompt=body.prompt,
        negative_prompt=body.negative_prompt,
        style=None if style is None else parse_style(style, service.engine.pipeline.schedule.num_train_timesteps),
        height=height,
        width=width,
        num_inference_steps=body.steps,
        guidance_scale=body.guidance_scale,
        guidance_rescale=body.guidance_rescale,
        solver=body.solver,
    )
    return [dataclasses.replace(template, seed=seed) for seed in seeds_from(body.seed, body.n)]


async def _events(service: Service, request: Request, job: Job, num_previews: int) -> AsyncIterator[str]:
    """Yields OpenAI's events: `num_previews` partial images, evenly spaced, and the finished one."""
    sent, start = 0, time.perf_counter()
    size = f"{job.request.width}x{job.request.height}"
    fields = {"size": size, "quality": "auto", "background": "opaque", "output_format": "png"}

    def event(kind: str, image: str, **others) -> str:
        name = f"image_generation.{kind}"
        values = {"type": name, "b64_json": image, "created_at": int(time.time())} | fields | others
        return drawing.event_text(name, json.dumps(values))

    async for index in drawing.changes([job]):
        due = sent < num_previews and job.step * (num_previews + 1) >= (sent + 1) * job.num_steps > 0
        if index is None:
            yield drawing.event_text("", "")
        elif due and not job.future.done() and (preview := await drawing.preview_of(job)):
            yield event("partial_image", preview, partial_image_index=sent)
            sent += 1
    try:
        picture = await drawing.picture_of(service, job, job.future.result(0))
        drawing.log(service, request, [job], time.perf_counter() - start)
        usage = {"total_tokens": 0, "input_tokens": 0, "output_tokens": 0}
        details = {"input_tokens_details": {"image_tokens": 0, "text_tokens": 0}}
        yield event("completed", picture.base64, usage=usage | details, seed=job.request.seed)
    except Exception as error:
        yield drawing.event_text("error", json.dumps(faults.body_of(faults.fault_of(error), request.url.path)))
