"""KID and CMMD equal their definitions as sums over pairs, and keep their laws."""

import numpy as np
import pytest

from dmm_jax.evaluation import kernel_distances
from dmm_jax.evaluation.kernel_distances import cmmd, kernel_inception_distance

RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(30, 5)).astype(np.float32), (RNG.normal(size=(24, 5)) + 0.5).astype(np.float32)


def pair_sum(a, b, kernel, same):
    return sum(kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(b) if not (same and i == j))


def cubic(x, y):
    return (float(np.dot(x.astype(np.float64), y.astype(np.float64))) / len(x) + 1.0) ** 3


def test_kid_is_the_unbiased_sum_over_pairs_of_the_same_subsets():
    """The subsets are torch-fidelity's: in turn from each set, with one legacy generator."""
    rng, expected = np.random.RandomState(2020), []
    for _ in range(3):
        a, b = (features[rng.choice(len(features), 8, replace=False)] for features in (A, B))
        within = sum(pair_sum(each, each, cubic, same=True) for each in (a, b)) / (8 * 7)
        expected.append(within - 2.0 * pair_sum(a, b, cubic, same=False) / 64)
    kid = kernel_inception_distance(A, B, num_subsets=3, subset_size=8)
    assert kid.mean == pytest.approx(np.mean(expected), rel=1e-12)
    assert kid.std == pytest.approx(np.std(expected), rel=1e-9)


def test_kid_within_one_distribution_is_zero_in_the_mean():
    sets = RNG.normal(size=(2, 4000, 4))
    kid = kernel_inception_distance(*sets, num_subsets=100, subset_size=40)
    assert abs(kid.mean) < 4 * kid.std / 10
    assert kernel_inception_distance(sets[0], sets[1] + 1.0, 100, 40).mean > 10 * kid.std


def test_cmmd_is_the_biased_sum_over_pairs():
    a, b = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (A, B))

    def gaussian(x, y):
        return np.exp(-np.sum((x.astype(np.float64) - y.astype(np.float64)) ** 2) / 200.0)

    means = [pair_sum(*pair, gaussian, same=False) / (len(pair[0]) * len(pair[1])) for pair in ((a, a), (b, b), (a, b))]
    assert cmmd(a, b) == pytest.approx(1000.0 * (means[0] + means[1] - 2.0 * means[2]), rel=1e-9)
    assert cmmd(a, a) == pytest.approx(0.0, abs=1e-9)


def test_cmmd_does_not_depend_on_the_chunk_size(monkeypatch):
    a, b = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (A, B))
    expected = cmmd(a, b)
    monkeypatch.setattr(kernel_distances, "ROWS_AT_ONCE", 7)
    assert cmmd(a, b) == pytest.approx(expected, rel=1e-9)


def test_wrong_features_are_refused():
    with pytest.raises(ValueError, match="differ in width: 5 and 4"):
        kernel_inception_distance(A, B[:, :4], 1, 8)
    with pytest.raises(ValueError, match="from 2 to 24 features.*got 25"):
        kernel_inception_distance(A, B, 1, 25)
    with pytest.raises(ValueError, match="length 1; got 30"):
        cmmd(A, B)
