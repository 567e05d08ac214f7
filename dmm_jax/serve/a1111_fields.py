"""The body of AUTOMATIC1111's txt2img, and which of its many fields this server can follow.

A field that asks for something else than its neutral value, and that this server does not do, is refused by its name.
"""

from typing import Annotated, Any

import pydantic

from dmm_jax.diffusion import solvers
from dmm_jax.serve import faults

MAX_NAMES = 64
# {field: the values that ask for nothing}
NEUTRAL: dict[str, tuple] = {
    "styles": (None, []),
    "subseed_strength": (None, 0),
    "seed_resize_from_h": (None, 0, -1),
    "seed_resize_from_w": (None, 0, -1),
    "restore_faces": (None, False),
    "tiling": (None, False),
    "s_min_uncond": (None, 0),
    "s_churn": (None, 0),
    "s_tmin": (None, 0),
    "s_tmax": (None, 0),
    "s_noise": (None, 1),
    "refiner_checkpoint": (None, "", "None"),
    "firstpass_image": (None, ""),
    "enable_hr": (None, False),
    "script_name": (None, "", "None"),
    "script_args": (None, []),
    "infotext": (None, ""),
    "disable_extra_networks": (None, False, True),
}
HINTS = {  # {field: what to send instead}
    "styles": "These styles are A1111's stored prompts. A style of the model is a checkpoint here: send it as "
    "override_settings.sd_model_checkpoint.",
}
# These matter only to a feature that NEUTRAL switches off, or to files that A1111 would write on its own disk.
WITHOUT_EFFECT = (
    "subseed", "denoising_strength", "refiner_switch_at", "firstphase_width", "firstphase_height", "hr_scale",
    "hr_upscaler", "hr_second_pass_steps", "hr_resize_x", "hr_resize_y", "hr_checkpoint_name", "hr_sampler_name",
    "hr_scheduler", "hr_prompt", "hr_negative_prompt", "hr_additional_modules", "do_not_save_samples",
    "do_not_save_grid", "save_images", "comments", "override_settings_restore_afterwards", "force_task_id",
)  # fmt: skip
SETTINGS_WITHOUT_EFFECT = ("samples_save", "grid_save", "save_images_add_number", "return_grid", "samples_format")
OTHER_NAMES = {
    "guidance_scale": "cfg_scale",
    "solver": "sampler_name",
    "num_inference_steps": "steps",
    "n": "batch_size",
}


class Txt2ImgBody(pydantic.BaseModel):
    """The body of POST /sdapi/v1/txt2img."""

    model_config = pydantic.ConfigDict(extra="allow", allow_inf_nan=False, str_max_length=20_000)

    prompt: str = ""
    negative_prompt: str = ""
    seed: Annotated[int, pydantic.Field(description="-1: a random one")] = -1
    batch_size: Annotated[int, pydantic.Field(ge=1, le=MAX_NAMES)] = 1
    n_iter: Annotated[int, pydantic.Field(ge=1, le=MAX_NAMES)] = 1
    steps: Annotated[int, pydantic.Field(ge=1)] = 50
    cfg_scale: float = 7.0
    width: Annotated[int, pydantic.Field(ge=0, description="default: the model's")] = 0
    height: Annotated[int, pydantic.Field(ge=0, description="default: the model's")] = 0
    sampler_name: str | None = None
    sampler_index: Annotated[str | None, pydantic.Field(description="an older name of sampler_name")] = None
    scheduler: str | None = None
    eta: float | None = None
    clip_skip: int | None = None
    send_images: bool = True
    override_settings: dict[str, Any] = {}  # noqa: RUF012
    alwayson_scripts: dict[str, Any] = {}  # noqa: RUF012

    @pydantic.model_validator(mode="before")
    @classmethod
    def _asks_for_nothing_else(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        fields = list(cls.model_fields)
        others = {name: value for name, value in values.items() if name not in fields and name not in WITHOUT_EFFECT}
        faults.refuse_unknown_fields([name for name in others if name not in NEUTRAL], fields, OTHER_NAMES)
        wrong = [name for name, value in others.items() if not _is_one_of(value, NEUTRAL[name])]
        if wrong:
            hints = "".join(f" {HINTS[name]}" for name in wrong if name in HINTS)
            raise ValueError(f"this server does not do {', '.join(sorted(wrong))}: leave it out.{hints}")
        return {name: value for name, value in values.items() if name in fields and value is not None}

    @pydantic.field_validator("alwayson_scripts")
    @classmethod
    def _runs_no_script(cls, value: dict) -> dict:
        """Refuses scripts; clients that know an extension send it switched off: {"args": [False]}."""
        active = [name for name, script in value.items() if not _is_off(script)]
        if active:
            raise ValueError(f"this server runs no scripts; got {', '.join(map(repr, active[:5]))}: leave them out.")
        return value

    @property
    def sampler(self) -> str:
        """The sampler's name as the client writes it, or A1111's default."""
        return self.sampler_name or self.sampler_index or "Euler"

    def solver(self) -> str:
        """Returns the solver that sampler and scheduler name, such as "dpmpp_2m_karras".

        Raises:
          UserError: there is no such sampler.
          ValueError: the sampler has another eta here.
        """
        sampler = self.sampler
        name = solvers.canonical(sampler)
        scheduler = (self.scheduler or "automatic").lower()
        if scheduler not in ("automatic", "none", ""):
            combined = f"{solvers.NAMES[solvers.SOLVERS[name][0]]} {scheduler.replace('align_your_steps', 'ays')}"
            name = solvers.canonical(combined)
        method = solvers.SOLVERS[name][0]
        own_eta = 0.0 if method == "ddim" else 1.0
        if method in ("ddim", *solvers.STOCHASTIC) and self.eta not in (None, own_eta):
            raise faults.Fault(422, "invalid_request", f"eta: {sampler} has {own_eta:g} here.", field="eta")
        return name


def _is_one_of(value, neutral: tuple) -> bool:
    """Tells whether a value is neutral; JSON's true is not 1."""
    return any(isinstance(value, bool) == isinstance(other, bool) and value == other for other in neutral)


def _is_off(script) -> bool:
    args = script.get("args") if isinstance(script, dict) else None
    return args == [] or isinstance(args, list) and args[:1] == [False] and not any(map(bool, args))
