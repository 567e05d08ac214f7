"""The decay of the student's average over steps: constant, or by a power function of the step (arXiv:2312.02696)."""

import numpy as np
import optax


def decay_schedule(config) -> optax.Schedule | None:
    """Returns the share of the old average that each update keeps, by the number of updates before it.

    Returns None if the run keeps no average.
    """
    if config.ema_width:
        power = power_of_width(config.ema_width)
        return lambda updates: (updates / (updates + 1.0)) ** (power + 1.0)
    return optax.constant_schedule(config.ema_decay) if config.ema_decay else None


def power_of_width(width: float) -> float:
    """Returns the power of the step by which the average weighs past weights.

    Args:
      width: the standard deviation of those weights over the steps, as a share of the number of steps.
    """
    # (power + 1) / ((power + 2)^2 (power + 3)) = width^2.
    return float(np.roots([1.0, 7.0, 16.0 - width**-2, 12.0 - width**-2]).real.max())
