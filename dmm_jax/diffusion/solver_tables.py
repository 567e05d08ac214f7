"""The coefficients of every solver, for the recurrence at the top of `solvers`, in float64."""

import numpy as np

from dmm_jax.diffusion.schedule import NoiseSchedule
from dmm_jax.diffusion.spacing import fractional_levels, spaced, timesteps_of, whole_levels
from dmm_jax.runtime.errors import UserError

LCM_STEPS, LCM_TIMESTEP_SCALE, LCM_SIGMA_DATA = 50, 10.0, 0.5  # Those of every published LCM (arXiv:2310.04378).


def columns(solver: str, spacing: str, schedule: NoiseSchedule, num_inference_steps: int) -> dict[str, np.ndarray]:
    """Returns the columns of a plan that are not 0, and `init_noise_sigma`.

    Raises:
      UserError: more steps than noise levels, or a schedule that the solver cannot run on.
    """
    assert schedule.prediction_type in ("epsilon", "v_prediction"), schedule.prediction_type  # All solvers know these.
    if not 1 <= num_inference_steps <= schedule.num_train_timesteps:
        raise UserError(f"num_inference_steps must be 1 to {schedule.num_train_timesteps}; got {num_inference_steps}.")
    if schedule.clip_sample and solver in ("ddim", "heun", "lcm"):
        raise UserError(f"clip_sample is true: {solver} would clip latents to [-1, 1]. Set it to false in the config.")
    if solver == "lcm":
        return _lcm(schedule, num_inference_steps)
    if solver == "ddim" and not spacing:
        return _ddim(schedule, num_inference_steps)
    if solver in ("ddim", "dpmpp_2m", "dpmpp_2m_sde", "unipc"):
        timesteps, sigmas = whole_levels(spacing, schedule, num_inference_steps)
        make = {"ddim": _dpmpp_1, "dpmpp_2m": _dpmpp_2m, "dpmpp_2m_sde": _dpmpp_2m_sde, "unipc": _unipc}[solver]
        signal = 1.0 / np.sqrt(sigmas**2 + 1.0)
        c_skip, c_out = _x0_columns(sigmas, schedule.prediction_type, state_scale=signal)
        shared = dict(timesteps=timesteps, c_in=np.ones(len(sigmas)), c_skip=c_skip, c_out=c_out, init_noise_sigma=1.0)
        return shared | make(sigmas, signal)
    return _euler_family(solver, schedule, num_inference_steps, spacing)


def _ddim(schedule, num_steps):
    """Returns the columns of DDIM, eta 0. Without sigma, which is infinite at zero terminal SNR: it can start there."""
    timesteps = np.round(spaced(schedule.timestep_spacing or "leading", schedule, num_steps)).astype(int)
    alpha_bar = schedule.alpha_bars[timesteps]
    following = timesteps - schedule.num_train_timesteps // num_steps
    last = 1.0 if schedule.set_alpha_to_one else schedule.alpha_bars[0]
    next_alpha_bar = np.where(following >= 0, schedule.alpha_bars[np.maximum(following, 0)], last)
    c_skip, c_out = _alpha_bar_columns(alpha_bar, schedule.prediction_type, "ddim")
    keep = np.sqrt((1.0 - next_alpha_bar) / (1.0 - alpha_bar))
    return dict(
        timesteps=timesteps, c_in=np.ones(num_steps), c_skip=c_skip, c_out=c_out, keep=keep,
        pull=np.sqrt(next_alpha_bar) - keep * np.sqrt(alpha_bar), init_noise_sigma=1.0,
    )  # fmt: skip


def _alpha_bar_columns(alpha_bar, prediction_type, solver):
    """Returns c_skip and c_out for latents of variance 1."""
    if prediction_type == "v_prediction":
        return np.sqrt(alpha_bar), -np.sqrt(1.0 - alpha_bar)
    if alpha_bar[0] > 0.0:
        return alpha_bar**-0.5, -np.sqrt((1.0 - alpha_bar) / alpha_bar)
    raise UserError(
        f"at zero terminal SNR a predicted noise does not determine the image, so {solver} cannot start there: the "
        "model must predict v (prediction_type v_prediction); or use another solver."
    )


def _half_log_snr_steps(sigmas):
    """Returns the steps of -log(sigma), half the logarithm of the signal-to-noise ratio; the last leads to sigma 0."""
    return np.append(-np.diff(np.log(sigmas)), np.inf)


def _dpmpp_1(sigmas, signal):
    return _dpmpp_2m(sigmas, signal, order=1)  # DDIM on these noise levels.


def _dpmpp_2m(sigmas, signal, order=2, stochastic=False):
    """Returns the columns of DPM-Solver++ (midpoint, first order at both ends), for the ODE or the SDE.

    With signal = alpha and noise = alpha sigma, and the previous x0 as memory:

        x' = (next noise / noise) decay x + x0_weight ((1 + extrapolation) x0 - extrapolation previous x0) + fresh n
    """
    noise_scale, steps = sigmas * signal, _half_log_snr_steps(sigmas)
    next_scale = np.append(noise_scale[1:], 0.0)
    decay = np.exp(-steps) if stochastic else np.ones(len(steps))
    x0_weight = np.append(signal[1:], 1.0) * -np.expm1(-(2.0 if stochastic else 1.0) * steps)
    extrapolation = np.zeros(len(sigmas))
    if order == 2:
        extrapolation[1:-1] = 0.5 * steps[1:-1] / steps[:-2]
    return dict(
        keep=next_scale / noise_scale * decay, pull=x0_weight * (1.0 + extrapolation),
        recall=-x0_weight * extrapolation, fresh=next_scale * np.sqrt(1.0 - decay**2), store_x0=np.ones(len(sigmas)),
    )  # fmt: skip


def _dpmpp_2m_sde(sigmas, signal):
    return _dpmpp_2m(sigmas, signal, stochastic=True)


def _unipc(sigmas, signal):
    """Returns UniPC of order 2 with B(h) = e^h - 1 (arXiv:2302.04867, alg. 5 to 8): it corrects each step by the next.

    The memory m is the corrected latents of the next evaluation, except for their share of its x0. So an evaluation
    first adds that share, and then predicts the next latents and their correction.
    """
    noise_scale, steps, count = sigmas * signal, _half_log_snr_steps(sigmas), len(sigmas)
    ratio = np.append(noise_scale[1:], 0.0) / noise_scale
    growth = np.append(signal[1:], 1.0) * np.expm1(-steps)
    inner = np.arange(1, count - 1)  # Steps of second order: all but the first and the last.
    slope, h = -steps[inner] / steps[inner - 1], -steps[inner]  # Multiplies the last x0 minus this one.
    phi_2 = np.expm1(h) / h - 1.0
    order_1, order_2 = phi_2 / np.expm1(h), 2.0 * (phi_2 / h - 0.5) / np.expm1(h)
    predicted, corrected, own = np.zeros(count), np.zeros(count), np.full(count, 0.5)
    predicted[inner] = 0.5 * slope
    weight = (order_1 - order_2) / (1.0 - 1.0 / slope)
    corrected[inner], own[inner] = weight * slope, order_1 - weight
    share = np.append(0.0, -growth[:-1] * own[:-1])  # The part of x0 in the corrected latents.
    is_first = np.arange(count) == 0
    return dict(
        keep=ratio * is_first, recall=ratio * ~is_first, pull=ratio * share - growth * (1.0 - predicted),
        recall_previous=-growth * predicted, store_latents=ratio * is_first, store_memory=ratio * ~is_first,
        store_x0=ratio * share - growth * (1.0 - corrected - own), store_previous=-growth * corrected,
    )  # fmt: skip


def _lcm(schedule, num_steps):
    """Returns the columns of LCM: it jumps to the clean latents, and adds fresh noise up to the next level."""
    if num_steps > LCM_STEPS:
        raise UserError(f"lcm has {LCM_STEPS} timesteps, so it takes 1 to {LCM_STEPS} steps; got {num_steps}.")
    stride = schedule.num_train_timesteps // LCM_STEPS
    own_timesteps = np.arange(LCM_STEPS, 0, -1) * stride - 1
    timesteps = own_timesteps[np.floor(np.linspace(0, LCM_STEPS, num_steps, endpoint=False)).astype(int)]
    alpha_bar = schedule.alpha_bars[timesteps]
    next_alpha_bar = np.append(alpha_bar[1:], 1.0)
    c_skip, c_out = _alpha_bar_columns(alpha_bar, schedule.prediction_type, "lcm")
    scaled = timesteps * LCM_TIMESTEP_SCALE
    skip = LCM_SIGMA_DATA**2 / (scaled**2 + LCM_SIGMA_DATA**2)  # The boundary condition of a consistency model.
    out = scaled / np.sqrt(scaled**2 + LCM_SIGMA_DATA**2)
    return dict(
        timesteps=timesteps, c_in=np.ones(num_steps), c_skip=c_skip, c_out=c_out, keep=np.sqrt(next_alpha_bar) * skip,
        pull=np.sqrt(next_alpha_bar) * out, fresh=np.sqrt(1.0 - next_alpha_bar), init_noise_sigma=1.0,
    )  # fmt: skip


def _euler_family(solver, schedule, num_steps, spacing):
    """Returns the columns of the solvers whose latents are x0 + sigma noise, unscaled."""
    timesteps, sigmas = fractional_levels(spacing, schedule, num_steps)
    # diffusers adds the variance of the image to the noise's with "leading" alone.
    leads = schedule.timestep_spacing == "leading"
    init_noise_sigma = np.sqrt(sigmas[0] ** 2 + 1.0) if leads else sigmas[0]
    if solver == "dpmpp_sde":
        columns, middles = _dpmpp_sde(sigmas), np.sqrt(sigmas[:-1] * sigmas[1:])
        timesteps = _alternating(timesteps[:-1], timesteps_of(middles, schedule.sigmas), timesteps[-1])
        sigmas = _alternating(sigmas[:-1], middles, sigmas[-1])
    else:
        make = {"euler": _euler, "euler_ancestral": _euler_ancestral, "heun": _heun}[solver]
        rows, columns = make(sigmas, np.append(sigmas[1:], 0.0))
        timesteps, sigmas = timesteps[rows], sigmas[rows]
    c_skip, c_out = _x0_columns(sigmas, schedule.prediction_type, state_scale=1.0)
    c_in = 1.0 / np.sqrt(sigmas**2 + 1.0)
    named = dict(timesteps=timesteps, c_in=c_in, c_skip=c_skip, c_out=c_out, init_noise_sigma=init_noise_sigma)
    return named | columns


def _euler(sigmas, next_sigmas):
    ratio = next_sigmas / sigmas
    return np.arange(len(sigmas)), {"keep": ratio, "pull": 1.0 - ratio}


def _euler_ancestral(sigmas, next_sigmas):
    """Steps down to next_sigma^2 / sigma, and adds fresh noise up to next_sigma."""
    down = (next_sigmas / sigmas) ** 2
    return np.arange(len(sigmas)), {"keep": down, "pull": 1.0 - down, "fresh": next_sigmas * np.sqrt(1.0 - down)}


def _heun(sigmas, next_sigmas):
    """Averages the slopes at both ends of a step; the step to sigma 0 is Euler's.

    With slope(x, sigma) = (x - x0) / sigma:

        predict: x' = x + (next - sigma) slope(x, sigma);      m = x + (next - sigma) / 2 slope(x, sigma)
        correct: x'' = m + (next - sigma) / 2 slope(x', next)
    """
    num_steps, ratio = len(sigmas), next_sigmas / sigmas
    rows = np.repeat(np.arange(num_steps), 2)[1:]  # 0, 1, 1, 2, 2, ...: the noise level of each evaluation.
    predict, correct = slice(0, None, 2), slice(1, None, 2)
    columns = {name: np.zeros(2 * num_steps - 1) for name in ("keep", "pull", "recall", "store_latents", "store_x0")}
    columns["keep"][predict], columns["pull"][predict] = ratio, 1.0 - ratio
    columns["store_latents"][predict], columns["store_x0"][predict] = 0.5 + 0.5 * ratio, 0.5 - 0.5 * ratio
    half_step = 0.5 * (next_sigmas - sigmas)[:-1] / next_sigmas[:-1]
    columns["keep"][correct], columns["pull"][correct], columns["recall"][correct] = half_step, -half_step, 1.0
    return rows, columns


def _dpmpp_sde(sigmas):
    """Returns DPM-Solver++ for the stochastic equation in single steps: to the middle of a step, then the whole step.

    Both steps are ancestral, and their noise is one Brownian motion in sigma: the whole step's noise has that to the
    middle as its first part. The latents in the middle hold this part, so `keep` takes it from them.
    """
    high, low = sigmas[:-1], sigmas[1:]
    middle = np.sqrt(low * high)
    to_middle, to_low = (middle / high) ** 2, (low / high) ** 2  # The latents' share after an ancestral step down.
    noise_to_middle, noise_to_low = middle * np.sqrt(1.0 - to_middle), low * np.sqrt(1.0 - to_low)
    first, second = (np.sqrt(part / (high - low)) for part in (high - middle, middle - low))
    carried, zeros = noise_to_low * first / noise_to_middle, np.zeros(len(low))
    return dict(
        keep=_alternating(to_middle, carried, 0.0), pull=_alternating(1.0 - to_middle, 1.0 - to_low, 1.0),
        recall=_alternating(zeros, zeros + 1.0, 0.0), fresh=_alternating(noise_to_middle, noise_to_low * second, 0.0),
        store_latents=_alternating(to_low - carried * to_middle, zeros, 0.0),
        store_x0=_alternating(-carried * (1.0 - to_middle), zeros, 0.0),
    )  # fmt: skip


def _alternating(first, second, last):
    """Returns first[0], second[0], first[1], second[1], ..., last."""
    return np.append(np.stack([first, second], axis=1).ravel(), last)


def _x0_columns(sigmas, prediction_type, state_scale):
    """Returns c_skip and c_out for latents that are `state_scale` times (x0 + sigma noise)."""
    if prediction_type == "epsilon":
        return np.ones_like(sigmas) / state_scale, -sigmas
    signal = 1.0 / np.sqrt(sigmas**2 + 1.0)
    return signal**2 / state_scale, -sigmas * signal
