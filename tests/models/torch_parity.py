"""Compares our networks with PyTorch's: parameters by its keys, equal weights, errors relative to the maximum.

The naming rule is written here a second time, independent of the library's, so that a fault in either shows.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from dmm_jax.checkpoints.abstract import abstract_model

SCALES = (1.7, 0.3)  # Times PyTorch's initial weights: a wrong GELU shows at the first, a wrong epsilon at the second.
TOLERANCE = 1e-5  # Times the output's maximum.
LAST = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"} | {
    "class_embedding": "class_embedding"
}


def abstract(build, *args, **kwargs):
    """Builds a module whose parameters are shapes only; tests fill it with `load`."""
    return abstract_model(lambda rngs: build(*args, **kwargs, rngs=rngs))


def draw(module, seed=0):
    """Fills `module` with PyTorch's initial weights, in NumPy: a compiled draw of hundreds of tensors takes minutes."""
    rng, flat = np.random.default_rng(seed), flatten_dict(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    params = {path: jnp.asarray(_draw(rng, path, leaf.shape, flat), jnp.float32) for path, leaf in flat.items()}
    nnx.update(module, unflatten_dict(params))
    return module


def _draw(rng, path, shape, flat):
    if path[-1] == "embedding":
        return rng.standard_normal(shape)
    if (*path[:-1], "kernel") not in flat:
        return np.full(shape, path[-1] == "scale")
    limit = np.prod(flat[(*path[:-1], "kernel")].shape[:-1]) ** -0.5
    return rng.uniform(-limit, limit, shape)


def parameters(module):
    """Returns {PyTorch's key: (our path, our leaf)}."""
    flat = flatten_dict(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    return {".".join(map(str, (*path[:-1], LAST[path[-1]]))): (path, leaf) for path, leaf in flat.items()}


def ours_from_torch(path, array):
    return np.moveaxis(array, (0, 1), (-1, -2)) if path[-1] == "kernel" else array


def torch_from_ours(path, array):
    return np.moveaxis(array, (-1, -2), (0, 1)) if path[-1] == "kernel" else array


def torch_shapes(module):
    """Returns {PyTorch's key: PyTorch's shape}; no array is needed."""
    placeholder = {key: (path, np.broadcast_to(0, leaf.shape)) for key, (path, leaf) in parameters(module).items()}
    return {key: torch_from_ours(path, leaf).shape for key, (path, leaf) in placeholder.items()}


def state_dict(module):
    """Returns our parameters as PyTorch's state dict of NumPy arrays."""
    return {key: np.array(torch_from_ours(path, np.asarray(leaf))) for key, (path, leaf) in parameters(module).items()}


def load(module, twin):
    """Fills `module` with the weights of its PyTorch twin (or of a state dict), whose keys must be the same."""
    tensors, keys = twin if isinstance(twin, dict) else twin.state_dict(), parameters(module)
    assert set(keys) == set(tensors)
    params = {}
    for key, (path, leaf) in keys.items():
        params[path] = jnp.asarray(ours_from_torch(path, tensors[key].detach().numpy()))
        assert params[path].shape == leaf.shape, key
    nnx.update(module, unflatten_dict(params))
    return module


def scaled(twin, scale):
    """Multiplies all weights of a PyTorch module, and returns it."""
    import torch

    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(scale)
    return twin.eval()


def to_torch(array):
    """Returns a tensor; images and latents get their channels first."""
    import torch

    tensor = torch.from_numpy(np.array(array))
    return tensor.movedim(-1, 1) if tensor.ndim == 4 else tensor


def relative_error(output, expected):
    """Returns the greatest error over the greatest value; `theirs` is a tensor, channels first if it has four axes."""
    expected = expected.detach()
    expected = (expected.movedim(1, -1) if expected.ndim == 4 else expected).numpy()
    assert output.shape == expected.shape
    return np.abs(np.asarray(output) - expected).max() / np.abs(expected).max()


def normal(*shape, std=1.0, seed=0):
    return std * jax.random.normal(jax.random.key(seed), shape)
