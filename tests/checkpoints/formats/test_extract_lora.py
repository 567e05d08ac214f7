"""The decomposition keeps what it says: the best rank, the stated share, and the difference itself at full rank."""

import numpy as np
import pytest

from dmm_jax.checkpoints.formats.extract_lora import Rank, low_rank, parse_rank
from dmm_jax.runtime.errors import UserError

RNG = np.random.default_rng(0)


def decaying(rows, columns):
    """Returns a random matrix whose singular values fall as 1 / k."""
    size = min(rows, columns)
    rows_basis, columns_basis = (np.linalg.qr(RNG.standard_normal((n, size)))[0] for n in (rows, columns))
    return ((rows_basis / np.arange(1, size + 1)) @ columns_basis.T).astype(np.float32)


def share_of(difference, factors):
    rest = difference - factors.up @ factors.down
    return 1 - np.square(rest, dtype=np.float64).sum() / np.square(difference, dtype=np.float64).sum()


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (64, 64), (4, 288)])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "randomised"])
def test_a_truncation_is_the_best_of_its_rank(shape, exact):
    difference, rank = decaying(*shape), 3
    factors, squared = low_rank(difference, Rank(rank=rank), exact)
    values = np.linalg.svd(difference.astype(np.float64), compute_uv=False)
    best = np.square(values[:rank]).sum() / np.square(values).sum()
    assert factors.up.shape == (shape[0], rank) and factors.down.shape == (rank, shape[1])
    assert share_of(difference, factors) == pytest.approx(best, abs=1e-6 if exact else 2e-3)
    assert squared / np.square(difference, dtype=np.float64).sum() == pytest.approx(
        share_of(difference, factors), abs=1e-5
    )


def test_exact_is_nearer_to_the_best_than_the_randomised_algorithm():
    difference = RNG.standard_normal((120, 300)).astype(np.float32)  # Its singular values hardly fall.
    values = np.square(np.linalg.svd(difference.astype(np.float64), compute_uv=False))
    best = values[:5].sum() / values.sum()
    exact, randomised = (share_of(difference, low_rank(difference, Rank(rank=5), it)[0]) for it in (True, False))
    assert exact == pytest.approx(best, abs=1e-7) and 1e-5 < best - randomised < 0.1 * best


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "randomised"])
@pytest.mark.parametrize("share", [0.5, 0.98, 1.0])
def test_an_automatic_rank_is_the_smallest_that_keeps_the_share(exact, share):
    difference = decaying(80, 200)
    factors, _ = low_rank(difference, Rank(share=share), exact)
    values = np.square(np.linalg.svd(difference.astype(np.float64), compute_uv=False))
    smallest = 1 + int(np.searchsorted(np.cumsum(values), share * values.sum() * (1 - 1e-7)))
    assert smallest <= len(factors.down) <= smallest + (0 if exact else 1)
    assert share_of(difference, factors) >= share - 1e-5


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "randomised"])
def test_a_difference_of_low_rank_needs_no_more(exact):
    difference = (RNG.standard_normal((60, 2)) @ RNG.standard_normal((2, 70))).astype(np.float32)
    factors, _ = low_rank(difference, Rank(rank=10), exact)
    assert len(factors.down) == 2
    np.testing.assert_allclose(factors.up @ factors.down, difference, atol=1e-5 * np.abs(difference).max())


def test_no_difference_has_rank_zero():
    factors, squared = low_rank(np.zeros((5, 7), np.float32), Rank(rank=4))
    assert factors.up.shape == (5, 0) and factors.down.shape == (0, 7) and squared == 0


def test_full_rank_is_the_difference_itself():
    difference = decaying(30, 50)
    factors, squared = low_rank(difference, Rank(rank=30))
    np.testing.assert_allclose(factors.up @ factors.down, difference, atol=1e-5 * np.abs(difference).max())


def test_both_factors_have_the_same_scale():
    factors, _ = low_rank(1e-4 * decaying(40, 90), Rank(rank=8))
    np.testing.assert_allclose(np.linalg.norm(factors.up, axis=0), np.linalg.norm(factors.down, axis=1), rtol=1e-3)


@pytest.mark.parametrize("text", ["0", "-3", "auto:0", "auto:1.5", "auto:nan", "auto:", "much", "1.5"])
def test_a_rank_that_means_nothing_is_an_error(text):
    with pytest.raises(UserError, match="--rank takes"):
        parse_rank(text)


def test_ranks_are_numbers_or_shares():
    assert parse_rank("8") == Rank(rank=8) and parse_rank("auto:0.98") == Rank(share=0.98)
