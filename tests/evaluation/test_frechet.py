"""Statistics and the Frechet distance keep their laws, and agree with NumPy and SciPy."""

import numpy as np
import pytest
import scipy.linalg

from dmm_jax.evaluation.frechet import Statistics, frechet_distance

RNG = np.random.default_rng(0)
A = RNG.normal(size=(400, 5)) @ RNG.normal(size=(5, 5)) + 3.0
B = RNG.normal(size=(300, 5)) @ RNG.normal(size=(5, 5))


def statistics(features) -> Statistics:
    return Statistics.empty(features.shape[1]).update(features)


def test_statistics_are_the_mean_and_the_unbiased_covariance():
    np.testing.assert_allclose(statistics(A).mean, A.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics(A).covariance, np.cov(A, rowvar=False), rtol=1e-11)
    assert statistics(A).count == 400


@pytest.mark.parametrize("chunk_size", [1, 7, 400])
def test_chunks_give_the_same_statistics(chunk_size):
    streamed = Statistics.empty(5)
    for start in range(0, 400, chunk_size):
        streamed = streamed.update(A[start : start + chunk_size])
    assert streamed.count == 400
    np.testing.assert_allclose(streamed.mean, statistics(A).mean, rtol=1e-12)
    np.testing.assert_allclose(streamed.covariance, statistics(A).covariance, rtol=1e-11)


def test_merged_statistics_are_those_of_the_union():
    merged = statistics(A).merge(statistics(B))
    both = statistics(np.concatenate([A, B]))
    assert merged.count == both.count
    np.testing.assert_allclose(merged.mean, both.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.covariance, both.covariance, rtol=1e-11)


def test_an_empty_set_changes_no_statistics():
    for same in (statistics(A).update(A[:0]), statistics(A).merge(Statistics.empty(5))):
        assert same.count == 400
        np.testing.assert_array_equal(same.covariance, statistics(A).covariance)


def test_covariance_survives_a_mean_far_from_zero():
    far = statistics(A[:200] + 1e8).merge(statistics(A[200:] + 1e8))
    np.testing.assert_allclose(far.covariance, statistics(A).covariance, rtol=1e-6)


def test_float32_features_are_summed_in_float64():
    features = A.astype(np.float32) + np.float32(1000.0)
    np.testing.assert_allclose(statistics(features).covariance, np.cov(features.astype(np.float64).T), rtol=1e-10)


def test_distance_of_diagonal_gaussians_has_its_closed_form():
    mean_a, mean_b, std_a, std_b = RNG.uniform(0.5, 2.0, (4, 6))
    a, b = (Statistics(11, mean, 10 * np.diag(std**2)) for mean, std in ((mean_a, std_a), (mean_b, std_b)))
    expected = np.sum((mean_a - mean_b) ** 2) + np.sum((std_a - std_b) ** 2)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_distance_agrees_with_scipys_matrix_root():
    a, b = statistics(A), statistics(B)
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2.0 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_distance_to_itself_is_zero_and_never_negative():
    assert 0.0 <= frechet_distance(statistics(A), statistics(A)) < 1e-10


def test_distance_of_a_shift_is_its_squared_length():
    shift = np.array([3.0, 4.0, 0.0, 0.0, 0.0])
    assert frechet_distance(statistics(A), statistics(A + shift)) == pytest.approx(25.0, rel=1e-10)


def test_distance_is_symmetric():
    a, b = statistics(A), statistics(B)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)


def test_rotating_the_features_does_not_change_the_distance():
    rotation, _ = np.linalg.qr(RNG.normal(size=(5, 5)))
    turned = frechet_distance(statistics(A @ rotation), statistics(B @ rotation))
    assert turned == pytest.approx(frechet_distance(statistics(A), statistics(B)), rel=1e-10)


def test_distance_scales_as_the_square_of_the_features():
    expected = 9.0 * frechet_distance(statistics(A), statistics(B))
    assert frechet_distance(statistics(3.0 * A), statistics(3.0 * B)) == pytest.approx(expected, rel=1e-10)


def test_distance_of_singular_covariances_is_finite():
    """Along a direction without variance, only the means count."""
    flat = A * np.array([1.0, 1.0, 1.0, 0.0, 0.0])
    lower = frechet_distance(statistics(flat[:, :3]), statistics(B[:, :3]))
    padded = np.concatenate([B[:, :3], np.full((300, 2), 2.0)], axis=1)
    assert frechet_distance(statistics(flat), statistics(padded)) == pytest.approx(lower + 8.0, rel=1e-7)


def test_distance_of_fewer_pictures_than_features_is_finite():
    """Rounding makes some of the zero eigenvalues negative."""
    few = [statistics(RNG.normal(size=(8, 32))) for _ in range(2)]
    root = scipy.linalg.sqrtm(few[0].covariance + 1e-14 * np.eye(32))
    cross = scipy.linalg.svdvals(root @ scipy.linalg.sqrtm(few[1].covariance + 1e-14 * np.eye(32))).sum()
    traces = np.trace(few[0].covariance) + np.trace(few[1].covariance)
    expected = np.sum((few[0].mean - few[1].mean) ** 2) + traces - 2.0 * cross
    assert frechet_distance(*few) == pytest.approx(expected, rel=1e-5)


def test_wrong_features_are_refused():
    with pytest.raises(ValueError, match="width 5; got 4"):
        Statistics.empty(5).update(A[:, :4])
    with pytest.raises(ValueError, match="1 of 3 features are not finite, the first in row 1"):
        Statistics.empty(5).update(A[:3] + np.array([[0.0], [np.nan], [0.0]]))
    with pytest.raises(ValueError, match="at least 2 features; got 1"):
        _ = statistics(A[:1]).covariance
    with pytest.raises(ValueError, match="differ in width: 5 and 4"):
        frechet_distance(statistics(A), statistics(B[:, :4]))
