"""AUTOMATIC1111's web API: each style is a checkpoint."""

import dataclasses
import itertools
import json
import time
from typing import Any

from fastapi import APIRouter, Request

from dmm_jax.config.styles import parse_style, style_row, style_text
from dmm_jax.diffusion import solvers
from dmm_jax.diffusion.spacing import SPACINGS
from dmm_jax.runtime.errors import UserError
from dmm_jax.serve import drawing
from dmm_jax.serve.a1111_fields import SETTINGS_WITHOUT_EFFECT, Txt2ImgBody
from dmm_jax.serve.requests import ImageRequest, Job
from dmm_jax.serve.service import Service, client_of, seeds_from

VERSION = "dmm-jax"
EMPTY_LISTS = (
    "latent-upscale-modes", "hypernetworks", "face-restorers", "realesrgan-models", "prompt-styles", "sd-vae", "loras",
)  # fmt: skip


class A1111:
    """The state that A1111's clients expect: a chosen checkpoint, and the drawing that is under way."""

    def __init__(self, service: Service):
        self.service = service
        self.checkpoint = service.default_model
        self.active: dict[str, list[Job]] = {}  # The jobs of each client's requests.

    def checked(self, name: Any) -> str:
        """Returns a checkpoint's name, a style or a mix; raises UserError if there is none like it."""
        if not isinstance(name, str):
            raise UserError(f"sd_model_checkpoint is a style's name; there are: {', '.join(self.service.model_names)}.")
        name = name.removesuffix(f" [{self.service.model_hash}]")
        styles = self.service.engine.pipeline.styles
        if (style := self.service.style_of(name)) is not None:
            if not styles:
                raise UserError(f"there is no checkpoint {name!r}; there is: {self.service.model_names[0]}.")
            style_row(parse_style(style), styles)
        return name

    def options(self) -> dict:
        """Returns the options that a client can read."""
        return {
            "sd_model_checkpoint": self.checkpoint,
            "sd_checkpoint_hash": self.service.model_hash,
            "sd_vae": "Automatic",
            "CLIP_stop_at_last_layers": self.service.engine.pipeline.source.clip_skip,
            "samples_format": "png",
            "samples_save": False,
            "grid_save": False,
            "return_grid": False,
            "eta_noise_seed_delta": 0,
        }

    def apply(self, settings: dict[str, Any]) -> str:
        """Returns the checkpoint that settings choose; refuses every setting that differs from the server's."""
        own, checkpoint = self.options(), self.checkpoint
        for name, value in settings.items():
            if name == "sd_model_checkpoint":
                checkpoint = self.checkpoint if value in (None, "") else self.checked(value)
            elif name == "sd_vae" and value in (None, "", "None", "Automatic"):
                continue
            elif name not in SETTINGS_WITHOUT_EFFECT and (name not in own or value not in (None, own[name])):
                current = f"; here it is {own[name]!r}" if name in own else ""
                raise UserError(f"this server cannot change {name!r}{current}. It can change sd_model_checkpoint.")
        return checkpoint

    def requests(self, body: Txt2ImgBody) -> list[ImageRequest]:
        """Returns one request per image, batch after batch."""
        checkpoint = self.apply(body.override_settings)
        clip_skip = self.service.engine.pipeline.source.clip_skip
        if body.clip_skip not in (None, clip_skip):
            raise UserError(f"clip_skip is {clip_skip} here: choose it when the server starts.")
        style, pipeline = self.service.style_of(checkpoint), self.service.engine.pipeline
        template = ImageRequest(
            prompt=body.prompt,
            negative_prompt=body.negative_prompt,
            style=None if style is None else parse_style(style, pipeline.schedule.num_train_timesteps),
            height=body.height,
            width=body.width,
            num_inference_steps=body.steps,
            guidance_scale=body.cfg_scale,
            solver=body.solver(),
        )
        return [
            dataclasses.replace(template, seed=seed) for seed in seeds_from(body.seed, body.batch_size * body.n_iter)
        ]

    def jobs_of(self, request: Request) -> list[Job]:
        """Returns the jobs of the client that asks."""
        return self.active.get(client_of(request), [])


def router(service: Service) -> APIRouter:
    """Returns the addresses below /sdapi/v1."""
    routes, state = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"]), A1111(service)

    @routes.post("/txt2img")
    async def txt2img(body: Txt2ImgBody, request: Request) -> dict:
        """Draws batch_size times n_iter images. After an interrupt, answers with those that are finished."""
        jobs = await drawing.submit(service, request, state.requests(body))
        mine = state.active.setdefault(client_of(request), [])
        mine.extend(jobs)
        try:
            pictures = await drawing.draw(service, request, jobs, may_cancel=True)
        finally:
            for job in jobs:
                mine.remove(job)
            if not mine:
                state.active.pop(client_of(request), None)
        finished = [picture for picture in pictures if picture]
        images = [picture.base64 for picture in finished] if body.send_images else []
        image = jobs[0].request  # With its defaults.
        parameters = body.model_dump() | {"width": image.width, "height": image.height, "sampler_name": body.sampler}
        return {"images": images, "parameters": parameters, "info": json.dumps(info(service, jobs, finished, body))}

    @routes.get("/progress")
    async def progress(request: Request, skip_current_image: bool = False) -> dict:
        """Tells how far the client's own images are, with a preview of the first."""
        return await progress_of(state.jobs_of(request), not skip_current_image)

    @routes.post("/interrupt")
    @routes.post("/skip")
    async def interrupt(request: Request) -> dict:
        """Cancels the client's own images."""
        drawing.cancel(state.jobs_of(request))
        return {}

    @routes.get("/sd-models")
    async def sd_models() -> list[dict]:
        """Lists the styles as checkpoints. A mix such as `anime=0.7,photo=0.3` can be chosen, too."""
        keys = {"hash": service.model_hash, "sha256": None, "config": None}
        return [{"title": name, "model_name": name, "filename": name} | keys for name in service.model_names]

    @routes.get("/options")
    async def options() -> dict:
        """Shows the options, among them the chosen checkpoint."""
        return state.options()

    @routes.post("/options")
    async def set_options(settings: dict[str, Any]) -> None:
        """Chooses the checkpoint for requests without override_settings.sd_model_checkpoint, of all clients."""
        state.checkpoint = state.apply(settings)

    _add_lists(routes, service)
    return routes


def _add_lists(routes: APIRouter, service: Service) -> None:
    @routes.get("/samplers")
    async def samplers() -> list[dict]:
        """Lists the samplers; each combines with every scheduler, except LCM."""
        return [{"name": label, "aliases": [name], "options": {}} for name, label in solvers.NAMES.items()]

    @routes.get("/schedulers")
    async def schedulers() -> list[dict]:
        """Lists the spacings of noise levels."""
        keys = {"aliases": None, "default_rho": -1, "need_inner_model": False}
        return [{"name": name or "automatic", "label": label or "Automatic"} | keys for name, label in SPACINGS.items()]

    @routes.get("/upscalers")
    async def upscalers() -> list[dict]:
        """Lists that there is none."""
        return [{"name": "None", "model_name": None, "model_path": None, "model_url": None, "scale": 4}]

    @routes.get("/scripts")
    async def scripts() -> dict:
        """Lists that there is none."""
        return {"txt2img": [], "img2img": []}

    @routes.get("/embeddings")
    async def embeddings() -> dict:
        """Lists the textual inversions that prompts may name."""
        return {"loaded": {name: {"step": None} for name in service.engine.pipeline.embeddings}, "skipped": {}}

    @routes.post("/refresh-checkpoints")
    async def refresh_checkpoints() -> None:
        """Does nothing: the styles are those of the resident model."""

    async def nothing() -> list:
        """Lists that there is none."""
        return []

    for name in EMPTY_LISTS:
        routes.add_api_route(f"/{name}", nothing, methods=["GET"], operation_id=f"list_{name}")


async def progress_of(jobs: list[Job], with_image: bool) -> dict:
    """Returns A1111's report on running jobs."""
    steps, all_steps = sum(job.step for job in jobs), sum(max(job.num_steps, 1) for job in jobs)
    done = sum(job.future.done() for job in jobs)
    running = next((job for job in jobs if job.step and not job.future.done()), None)
    return {
        "progress": min(steps / all_steps, 0.99) if jobs else 0.0,
        "eta_relative": 0.0,
        "state": {
            "skipped": False,
            "interrupted": any(job.future.cancelled() for job in jobs),
            "stopping_generation": False,
            "job": "txt2img" if jobs else "",
            "job_count": len(jobs),
            "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
            "job_no": done,
            "sampling_step": running.step if running else 0,
            "sampling_steps": running.num_steps if running else 0,
        },
        "current_image": await drawing.preview_of(running) if running and with_image else None,
        "textinfo": None,
    }


def info(service: Service, jobs: list[Job], pictures: list[drawing.Picture], body: Txt2ImgBody) -> dict:
    """Returns what A1111 sends as the text `info`, for the images that are finished."""
    request, parameters = jobs[0].request, [picture.parameters for picture in pictures]
    prompts = [each.prompt for each in parameters]
    return {
        "prompt": request.prompt,
        "all_prompts": prompts,
        "negative_prompt": request.negative_prompt or "",
        "all_negative_prompts": [each.negative_prompt for each in parameters],
        "seed": request.seed,
        "all_seeds": [each.seed for each in parameters],
        "subseed": 0,
        "all_subseeds": list(itertools.repeat(0, len(parameters))),
        "subseed_strength": 0,
        "width": request.width,
        "height": request.height,
        "sampler_name": solvers.a1111_name(solvers.canonical(request.solver)),
        "cfg_scale": request.guidance_scale,
        "steps": request.num_inference_steps,
        "batch_size": body.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": style_text(request.style) or service.engine.pipeline.name,
        "sd_model_hash": service.model_hash,
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": None,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": [each.a1111_text() for each in parameters],
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "clip_skip": service.engine.pipeline.source.clip_skip,
        "is_using_inpainting_conditioning": False,
        "version": VERSION,
    }
