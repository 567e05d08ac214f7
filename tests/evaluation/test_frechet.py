import numpy as np
import pytest
import scipy.linalg

from dmm_jax.evaluation.frechet import Statistics, frechet_distance

RNG = np.random.default_rng(0)
ONE = RNG.normal(size=(400, 5)) @ RNG.normal(size=(5, 5)) + 3.0
OTHER = RNG.normal(size=(300, 5)) @ RNG.normal(size=(5, 5))


def statistics(features) -> Statistics:
    return Statistics.empty(features.shape[1]).update(features)


def test_statistics_are_the_mean_and_the_unbiased_covariance():
    np.testing.assert_allclose(statistics(ONE).mean, ONE.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics(ONE).covariance, np.cov(ONE, rowvar=False), rtol=1e-11)
    assert statistics(ONE).count == 400


@pytest.mark.parametrize("chunk_size", [1, 7, 400])
def test_streaming_equals_at_once(chunk_size):
    streamed = Statistics.empty(5)
    for start in range(0, 400, chunk_size):
        streamed = streamed.update(ONE[start : start + chunk_size])
    assert streamed.count == 400
    np.testing.assert_allclose(streamed.mean, statistics(ONE).mean, rtol=1e-12)
    np.testing.assert_allclose(streamed.covariance, statistics(ONE).covariance, rtol=1e-11)


def test_merging_equals_seeing_both():
    merged = statistics(ONE).merge(statistics(OTHER))
    both = statistics(np.concatenate([ONE, OTHER]))
    assert merged.count == both.count
    np.testing.assert_allclose(merged.mean, both.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.covariance, both.covariance, rtol=1e-11)


def test_nothing_changes_nothing():
    for same in (statistics(ONE).update(ONE[:0]), statistics(ONE).merge(Statistics.empty(5))):
        assert same.count == 400
        np.testing.assert_array_equal(same.covariance, statistics(ONE).covariance)


def test_covariance_survives_a_mean_far_from_zero():
    far = statistics(ONE[:200] + 1e8).merge(statistics(ONE[200:] + 1e8))
    np.testing.assert_allclose(far.covariance, statistics(ONE).covariance, rtol=1e-6)


def test_float32_features_are_summed_in_float64():
    features = ONE.astype(np.float32) + np.float32(1000.0)
    np.testing.assert_allclose(statistics(features).covariance, np.cov(features.astype(np.float64).T), rtol=1e-10)


def test_distance_of_diagonal_gaussians_has_its_closed_form():
    mean_a, mean_b, std_a, std_b = RNG.uniform(0.5, 2.0, (4, 6))
    a, b = (Statistics(11, mean, 10 * np.diag(std**2)) for mean, std in ((mean_a, std_a), (mean_b, std_b)))
    expected = np.sum((mean_a - mean_b) ** 2) + np.sum((std_a - std_b) ** 2)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_distance_agrees_with_scipys_matrix_root():
    a, b = statistics(ONE), statistics(OTHER)
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2.0 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_distance_to_itself_is_zero_and_never_negative():
    assert 0.0 <= frechet_distance(statistics(ONE), statistics(ONE)) < 1e-10


def test_distance_of_a_shift_is_its_squared_length():
    shift = np.array([3.0, 4.0, 0.0, 0.0, 0.0])
    assert frechet_distance(statistics(ONE), statistics(ONE + shift)) == pytest.approx(25.0, rel=1e-10)


def test_distance_is_symmetric():
    a, b = statistics(ONE), statistics(OTHER)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)


def test_rotating_the_features_does_not_change_the_distance():
    rotation, _ = np.linalg.qr(RNG.normal(size=(5, 5)))
    turned = frechet_distance(statistics(ONE @ rotation), statistics(OTHER @ rotation))
    assert turned == pytest.approx(frechet_distance(statistics(ONE), statistics(OTHER)), rel=1e-10)


def test_distance_scales_as_the_square_of_the_features():
    expected = 9.0 * frechet_distance(statistics(ONE), statistics(OTHER))
    assert frechet_distance(statistics(3.0 * ONE), statistics(3.0 * OTHER)) == pytest.approx(expected, rel=1e-10)


def test_distance_of_singular_covariances_is_finite():
    """Along a direction where neither set varies the distance is that of the means alone."""
    flat = ONE * np.array([1.0, 1.0, 1.0, 0.0, 0.0])
    lower = frechet_distance(statistics(flat[:, :3]), statistics(OTHER[:, :3]))
    padded = np.concatenate([OTHER[:, :3], np.full((300, 2), 2.0)], axis=1)
    assert frechet_distance(statistics(flat), statistics(padded)) == pytest.approx(lower + 8.0, rel=1e-7)


def test_distance_of_fewer_pictures_than_features_is_finite():
    """Rounding leaves some of the zero eigenvalues below zero."""
    few = [statistics(RNG.normal(size=(8, 32))) for _ in range(2)]
    root = scipy.linalg.sqrtm(few[0].covariance + 1e-14 * np.eye(32))
    cross = scipy.linalg.svdvals(root @ scipy.linalg.sqrtm(few[1].covariance + 1e-14 * np.eye(32))).sum()
    traces = sum(np.trace(one.covariance) for one in few)
    expected = np.sum((few[0].mean - few[1].mean) ** 2) + traces - 2.0 * cross
    assert frechet_distance(*few) == pytest.approx(expected, rel=1e-5)


def test_wrong_features_are_refused():
    with pytest.raises(ValueError, match="width 5; got 4"):
        Statistics.empty(5).update(ONE[:, :4])
    with pytest.raises(ValueError, match="1 of 3 features are not finite, the first in row 1"):
        Statistics.empty(5).update(ONE[:3] + np.array([[0.0], [np.nan], [0.0]]))
    with pytest.raises(ValueError, match="at least 2 features; got 1"):
        _ = statistics(ONE[:1]).covariance
    with pytest.raises(ValueError, match="differ in width: 5 and 4"):
        frechet_distance(statistics(ONE), statistics(OTHER[:, :4]))
