"""Noise schedules: the signal and noise at each training timestep, as a scheduler_config.json defines them.

Tables are computed in float64 and returned as float32 constants: within 2e-6 of PyTorch's, computed in float32.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dmm_jax.runtime.errors import UserError

BETA_SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "v_prediction")
SPACINGS = ("linspace", "leading", "trailing")
MAX_TIMESTEPS = 10_000  # Ten times those of any published model.
# The defaults of diffusers' schedulers for absent fields; the defaults of NoiseSchedule are Stable Diffusion's.
DIFFUSERS_DEFAULTS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
# Fields that change the result, each with the values under which they do not.
INERT = {
    "trained_betas": (None,), "sigma_min": (None,), "sigma_max": (None,), "lambda_min_clipped": (None, -np.inf),
    "thresholding": (None, False), "use_flow_sigmas": (None, False), "final_sigmas_type": (None, "zero"),
    "interpolation_type": (None, "linear"), "timestep_type": (None, "discrete"),
}  # fmt: skip
OTHER_FAMILIES = ("FlowMatch", "EDM")
SPACING_FIELDS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}
FLAGS = ("rescale_betas_zero_snr", "set_alpha_to_one", "clip_sample", *SPACING_FIELDS)
UNFOLLOWED = ("use_lu_lambdas",)  # Noise levels of sampling that no solver here has; the model can be used without.
# The stock schedulers that read rescale_betas_zero_snr; PNDM and several more ignore it.
RESCALING_SCHEDULERS = (
    "DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler", "LCMScheduler", "TCDScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
EXPORTED = {"_class_name": "DDIMScheduler", "_diffusers_version": "0.42.1", "clip_sample": False}


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """The noise and the timesteps of a scheduler_config.json; the solver is chosen separately."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    rescale_betas_zero_snr: bool = False
    timestep_spacing: str | None = None  # None: absent from the file; each solver has its own default.
    steps_offset: int = 0  # Added to every timestep of the spacing "leading".
    set_alpha_to_one: bool = True  # DDIM ends at alpha_bar 1; False: at that of timestep 0.
    clip_sample: bool = False  # To [-1, 1] at every step, for pixels. Solvers that would do so refuse it.
    # The spacing of the solvers whose schedulers in diffusers have these fields.
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    source: Mapping | None = dataclasses.field(default=None, repr=False, compare=False)  # The config that was read.

    def __post_init__(self):
        _check_fields(vars(self))

    @classmethod
    def from_config(cls, config: Mapping) -> "NoiseSchedule":
        """Reads the config of any diffusers scheduler, as `OtherScheduler.from_config(config)` does.

        Values that the saving scheduler only defaulted to do not count (PNDM's "leading" is one): each solver has its
        own default. One rule differs: diffusers' DDIM clips to [-1, 1] unless the file forbids it, which would ruin
        latents; here only a file that asks for it clips.

        Raises:
          ValueError: an unknown schedule, prediction type or spacing, or a field that changes the noise levels in a way
            that is not supported.
        """
        family = str(config.get("_class_name") or "")
        if family.startswith(OTHER_FAMILIES):
            raise UserError(f"{family} does not diffuse by betas; expected the config of a DDPM-like scheduler.")
        defaulted = config.get("_use_default_values") or ()
        if not isinstance(defaulted, (list, tuple)):
            raise UserError(f"_use_default_values must be a list of fields; got {defaulted!r}.")
        written = {name: value for name, value in config.items() if name not in (*defaulted, "_use_default_values")}
        refused = [name for name, values in INERT.items() if written.get(name) not in values]
        if refused:
            fields = ", ".join(f"{name}={written[name]!r}" for name in refused)
            raise UserError(
                f"the scheduler config has unsupported fields: {fields}. Unset them to use the model without."
            )
        names = {field.name for field in dataclasses.fields(cls)} - {"source"}
        names -= {name for name in FLAGS if written.get(name) is None}
        fields = DIFFUSERS_DEFAULTS | {name: value for name, value in written.items() if name in names}
        _check_fields(fields)
        return cls(**fields, source=written)

    def to_config(self) -> dict:
        """Returns the contents of a scheduler_config.json: the one that was read, with the fields replaced since."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "source"}
        if self.source is None:
            config = EXPORTED | fields
            config = {
                name: v for name, v in config.items() if v or name not in SPACING_FIELDS
            }  # DDIM has none of them.
        else:
            read = NoiseSchedule.from_config(self.source)
            config = dict(self.source) | {name: value for name, value in fields.items() if value != getattr(read, name)}
        if self.rescale_betas_zero_snr and config.get("_class_name") not in RESCALING_SCHEDULERS:
            config["_class_name"] = EXPORTED["_class_name"]
        if self.timestep_spacing is None:
            config.pop("timestep_spacing", None)
        return config

    @property
    def named_spacing(self) -> str:
        """The name of the spacing that the config asks for (`spacing.SPACINGS`), or ""."""
        return next((name for field, name in SPACING_FIELDS.items() if getattr(self, field)), "")

    @functools.cached_property
    def alphas_cumprod(self) -> Float[np.ndarray, " num_timesteps"]:
        """The signal's share of the variance at each timestep, float32 (DDPM, arXiv:2006.11239, eq. 4)."""
        return self.alpha_bars.astype(np.float32)

    @functools.cached_property
    def alpha_bars(self) -> Float[np.ndarray, " num_timesteps"]:
        """`alphas_cumprod` in float64; the last value is exactly 0 at zero terminal SNR."""
        betas = self._betas()
        return np.cumprod(1.0 - (rescale_to_zero_snr(betas) if self.rescale_betas_zero_snr else betas))

    @functools.cached_property
    def sigmas(self) -> Float[np.ndarray, " num_timesteps"]:
        """Noise over signal at each timestep, float64, ascending; an infinite last one becomes diffusers' 4096."""
        alpha_bars = self.alpha_bars.copy()
        if self.rescale_betas_zero_snr:
            alpha_bars[-1] = 2.0**-24
        return np.sqrt((1.0 - alpha_bars) / alpha_bars)

    def _betas(self):
        n = self.num_train_timesteps
        if self.beta_schedule == "scaled_linear":
            return np.linspace(self.beta_start**0.5, self.beta_end**0.5, n) ** 2
        if self.beta_schedule == "linear":
            return np.linspace(self.beta_start, self.beta_end, n)
        level = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2  # arXiv:2102.09672, eq. 17.
        return np.minimum(1.0 - level[1:] / level[:-1], 0.999)


def _check_fields(fields: Mapping) -> None:
    """Raises UserError if a field has the wrong type or is out of range; missing fields have their defaults."""
    fields = {field.name: field.default for field in dataclasses.fields(NoiseSchedule)} | dict(fields)
    choices = {"beta_schedule": BETA_SCHEDULES, "prediction_type": PREDICTION_TYPES}
    choices["timestep_spacing"] = (None, *SPACINGS)
    for name, allowed in choices.items():
        if fields[name] not in allowed:
            raise UserError(f"{name} must be one of {', '.join(map(str, allowed))}; got {fields[name]!r:.100}.")
    for name in ("num_train_timesteps", "steps_offset"):
        if type(fields[name]) is not int:
            raise UserError(f"{name} must be a whole number; got {fields[name]!r:.100}.")
    for name in FLAGS:
        if type(fields[name]) is not bool:
            raise UserError(f"{name} must be true or false; got {fields[name]!r:.100}.")
    count, betas = fields["num_train_timesteps"], (fields["beta_start"], fields["beta_end"])
    numeric = all(type(beta) in (int, float) for beta in betas)
    if not 0 <= fields["steps_offset"] < MAX_TIMESTEPS:
        raise UserError(f"steps_offset must be from 0 to {MAX_TIMESTEPS - 1}; got {str(fields['steps_offset'])[:100]}.")
    if not (2 <= count <= MAX_TIMESTEPS and numeric and 0.0 < betas[0] <= betas[1] < 1.0):
        raise UserError(
            f"a schedule needs 2 to {MAX_TIMESTEPS} timesteps and 0 < beta_start <= beta_end < 1; got "
            f"{count} timesteps, betas from {betas[0]!r:.100} to {betas[1]!r:.100}."
        )


def rescale_to_zero_snr(betas: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Returns betas with no signal at the last timestep and the same first beta (arXiv:2305.08891, alg. 1)."""
    roots = np.sqrt(np.cumprod(1.0 - betas))
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    alpha_bars = roots**2
    return 1.0 - np.concatenate([alpha_bars[:1], alpha_bars[1:] / alpha_bars[:-1]])


def add_noise(
    latents: Float[Array, "B h w C"],
    noise: Float[Array, "B h w C"],
    timesteps: Int[Array, " B"],
    alphas_cumprod: Float[Array, " num_timesteps"],
) -> Float[Array, "B h w C"]:
    """Diffuses clean latents to `timesteps` (DDPM, arXiv:2006.11239, eq. 4), in float32."""
    alpha_bar = alphas_cumprod.astype(jnp.float32)[timesteps][:, None, None, None]  # (B, 1, 1, 1)
    return jnp.sqrt(alpha_bar) * latents + jnp.sqrt(1.0 - alpha_bar) * noise
