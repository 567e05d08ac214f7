"""Noise schedules: how much of an image is left at each of the training timesteps, as scheduler_config.json states it.

Tables are computed in float64 and shipped as float32 constants: within 1e-6 of PyTorch's, which are float32 throughout.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

BETA_SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "v_prediction")
SPACINGS = ("linspace", "leading", "trailing")


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """What a scheduler_config.json says about noise and timesteps; the solver is chosen elsewhere."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    rescale_betas_zero_snr: bool = False
    timestep_spacing: str | None = None  # None: not written in the config, so each solver's own default holds.
    steps_offset: int = 0
    set_alpha_to_one: bool = True

    def __post_init__(self):
        choices = {"beta_schedule": BETA_SCHEDULES, "prediction_type": PREDICTION_TYPES}
        choices["timestep_spacing"] = (None, *SPACINGS)
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}; got {getattr(self, name)!r}.")

    @classmethod
    def from_config(cls, config: Mapping) -> "NoiseSchedule":
        """Reads a parsed scheduler_config.json of any diffusers scheduler.

        Raises:
          ValueError: a schedule, prediction type or spacing that is not known, or betas listed one by one.
        """
        if config.get("trained_betas") is not None:
            raise ValueError("trained_betas is set: schedules listed one by one are not supported; use a named beta_schedule.")
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in config.items() if name in names})

    @functools.cached_property
    def alphas_cumprod(self) -> Float[np.ndarray, " num_timesteps"]:
        """The share of the signal's variance that is left at each timestep, float32 (DDPM, arXiv:2006.11239, eq. 4)."""
        return self._alphas_cumprod.astype(np.float32)

    @functools.cached_property
    def _alphas_cumprod(self):
        betas = self._betas()
        if self.rescale_betas_zero_snr:
            betas = rescale_to_zero_snr(betas)
        return np.cumprod(1.0 - betas)

    def _betas(self):
        n = self.num_train_timesteps
        if self.beta_schedule == "scaled_linear":
            return np.linspace(self.beta_start**0.5, self.beta_end**0.5, n) ** 2
        if self.beta_schedule == "linear":
            return np.linspace(self.beta_start, self.beta_end, n)
        level = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2  # arXiv:2102.09672, eq. 17.
        return np.minimum(1.0 - level[1:] / level[:-1], 0.999)

    @functools.cached_property
    def sigmas(self) -> Float[np.ndarray, " num_timesteps"]:
        """Noise over signal at each timestep, float64, ascending; at zero SNR the last one is cut at 2**12, as diffusers does."""
        alphas_cumprod = self._alphas_cumprod.copy()
        if self.rescale_betas_zero_snr:
            alphas_cumprod[-1] = 2.0**-24
        return np.sqrt((1.0 - alphas_cumprod) / alphas_cumprod)


def rescale_to_zero_snr(betas: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Shifts and scales sqrt(alphas_cumprod) so that no signal is left at the last timestep (arXiv:2305.08891, alg. 1)."""
    roots = np.sqrt(np.cumprod(1.0 - betas))
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    alphas_cumprod = roots**2
    return 1.0 - np.concatenate([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])


def add_noise(
    latents: Float[Array, "B h w C"],
    noise: Float[Array, "B h w C"],
    timesteps: Int[Array, " B"],
    alphas_cumprod: Float[Array, " num_timesteps"],
) -> Float[Array, "B h w C"]:
    """Diffuses clean latents to `timesteps` (DDPM, arXiv:2006.11239, eq. 4), in float32."""
    alpha_bar = alphas_cumprod[timesteps][:, None, None, None]  # (B, 1, 1, 1)
    return jnp.sqrt(alpha_bar) * latents + jnp.sqrt(1.0 - alpha_bar) * noise
