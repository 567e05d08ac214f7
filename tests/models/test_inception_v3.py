"""The batch norm of Inception is PyTorch's; evaluation/test_published.py tests the whole network."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dmm_jax.models.inception_v3 import BatchNorm

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(6, 3), (2, 5, 4, 3)])
def test_batch_norm_is_pytorchs_in_inference(shape):
    norm, twin = BatchNorm(3, epsilon=1e-3), torch.nn.BatchNorm1d(3, eps=1e-3).eval()
    values = {"scale": "weight", "bias": "bias", "running_mean": "running_mean", "running_var": "running_var"}
    for name, torch_name in values.items():
        value = RNG.uniform(0.001, 2.0, 3).astype(np.float32)
        getattr(norm, name)[...] = value
        getattr(twin, torch_name).data = torch.from_numpy(value)
    hidden = RNG.normal(size=shape).astype(np.float32)
    with torch.no_grad():
        expected = twin(torch.from_numpy(hidden.reshape(-1, 3))).numpy().reshape(shape)
    np.testing.assert_allclose(norm(jnp.asarray(hidden)), expected, rtol=1e-5, atol=1e-5)
