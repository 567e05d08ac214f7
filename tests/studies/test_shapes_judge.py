"""The judge's distance: the mean over disjoint parts."""

import numpy as np
import pytest

from dmm_jax.studies.shapes_judge import mean_distance


def test_mean_distance_averages_disjoint_parts():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 21, 3)).astype(np.float32)
    halves = [mean_distance(a[k : k + 10], b[k : k + 10], 10) for k in (0, 10)]
    assert mean_distance(a, b, 10) == pytest.approx(np.mean(halves))
    assert mean_distance(a, b, 21) != pytest.approx(np.mean(halves))
    assert mean_distance(a, a, 10) == pytest.approx(0.0, abs=1e-5)
