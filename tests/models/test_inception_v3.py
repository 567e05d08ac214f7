"""The batch norm of Inception beside PyTorch's; the whole network's features are in evaluation/test_published.py."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dmm_jax.models.layers import BatchNorm

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(6, 3), (2, 5, 4, 3)])
def test_batch_norm_is_pytorchs_in_inference(shape):
    norm, twin = BatchNorm(3, epsilon=1e-3), torch.nn.BatchNorm1d(3, eps=1e-3).eval()
    values = {"scale": "weight", "bias": "bias", "running_mean": "running_mean", "running_var": "running_var"}
    for ours, theirs in values.items():
        drawn = RNG.uniform(0.001, 2.0, 3).astype(np.float32)
        getattr(norm, ours)[...] = drawn
        getattr(twin, theirs).data = torch.from_numpy(drawn)
    hidden = RNG.normal(size=shape).astype(np.float32)
    with torch.no_grad():
        expected = twin(torch.from_numpy(hidden.reshape(-1, 3))).numpy().reshape(shape)
    np.testing.assert_allclose(norm(jnp.asarray(hidden)), expected, rtol=1e-5, atol=1e-5)
