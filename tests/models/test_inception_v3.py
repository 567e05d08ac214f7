"""The Inception of FID beside a PyTorch twin written from the published network's description, with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.abstract import abstract_model
from dmm_jax.models.inception_v3 import InceptionV3
from dmm_jax.models.layers import BatchNorm

RNG = np.random.default_rng(0)
TOLERANCE = 1e-6  # Of the largest feature.
TRUNK = {
    "1a_3x3": (3, 32, 3, 2),
    "2a_3x3": (32, 32, 3),
    "2b_3x3": (32, 64, 3),
    "3b_1x1": (64, 80, 1),
    "4a_3x3": (80, 192, 3),
}
ONE, THREE, FIVE, ROW, COLUMN = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)


class Conv(torch.nn.Module):
    def __init__(self, fan_in, fan_out, size=ONE, stride=1, padding=None):
        super().__init__()
        size = (size, size) if isinstance(size, int) else size
        padding = tuple(one // 2 for one in size) if padding is None else padding
        self.conv = torch.nn.Conv2d(fan_in, fan_out, size, stride, padding, bias=False)
        self.bn = torch.nn.BatchNorm2d(fan_out, eps=1e-3)

    def forward(self, hidden):
        return F.relu(self.bn(self.conv(hidden)))


def mean_pool(hidden):
    return F.avg_pool2d(hidden, 3, 1, 1, count_include_pad=False)


def max_pool(hidden):
    return F.max_pool2d(hidden, 3, 1, 1)


def halving_pool(hidden):
    return F.max_pool2d(hidden, 3, 2)


class Block(torch.nn.Module):
    """Branches side by side: each a chain of layers by name, a pool, or a fork of two layers at its end."""

    def __init__(self, branches, layers):
        super().__init__()
        self.branches = branches
        for name, (fan_in, fan_out, *rest) in layers.items():
            setattr(self, name, Conv(fan_in, fan_out, *rest))

    def forward(self, hidden):
        found = []
        for branch in self.branches:
            ends = [hidden]
            for step in branch:
                names = step if isinstance(step, tuple) else (step,)
                ends = [name(ends[0]) if callable(name) else getattr(self, name)(ends[0]) for name in names]
            found += ends
        return torch.cat(found, 1)


DOUBLE = ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"]


def block_a(n, pool):
    layers = {
        "branch1x1": (n, 64), "branch5x5_1": (n, 48), "branch5x5_2": (48, 64, FIVE), DOUBLE[0]: (n, 64),
        DOUBLE[1]: (64, 96, THREE), DOUBLE[2]: (96, 96, THREE), "branch_pool": (n, pool),
    }  # fmt: skip
    return Block([["branch1x1"], ["branch5x5_1", "branch5x5_2"], DOUBLE, [mean_pool, "branch_pool"]], layers)


def block_b(n):
    layers = {
        "branch3x3": (n, 384, THREE, 2, 0), DOUBLE[0]: (n, 64), DOUBLE[1]: (64, 96, THREE),
        DOUBLE[2]: (96, 96, THREE, 2, 0),
    }  # fmt: skip
    return Block([["branch3x3"], DOUBLE, [halving_pool]], layers)


def block_c(n, c):
    seven, double = ([f"branch7x7{kind}_{k}" for k in range(1, last)] for kind, last in (("", 4), ("dbl", 6)))
    sizes = (
        [(n, c), (c, c, ROW), (c, 192, COLUMN)],
        [(n, c), (c, c, COLUMN), (c, c, ROW), (c, c, COLUMN), (c, 192, ROW)],
    )
    layers = dict(zip(seven + double, sizes[0] + sizes[1], strict=True))
    layers |= {"branch1x1": (n, 192), "branch_pool": (n, 192)}
    return Block([["branch1x1"], seven, double, [mean_pool, "branch_pool"]], layers)


def block_d(n):
    three, seven = ["branch3x3_1", "branch3x3_2"], [f"branch7x7x3_{k}" for k in range(1, 5)]
    sizes = [(n, 192), (192, 320, THREE, 2, 0), (n, 192), (192, 192, ROW), (192, 192, COLUMN), (192, 192, THREE, 2, 0)]
    return Block([three, seven, [halving_pool]], dict(zip(three + seven, sizes, strict=True)))


def block_e(n, pool):
    layers = {"branch1x1": (n, 320), "branch3x3_1": (n, 384), DOUBLE[0]: (n, 448), DOUBLE[1]: (448, 384, THREE)}
    layers |= {f"{name}a": (384, 384, (1, 3)) for name in ("branch3x3_2", DOUBLE[2])}
    layers |= {f"{name}b": (384, 384, (3, 1)) for name in ("branch3x3_2", DOUBLE[2])}
    forks = [(f"{name}a", f"{name}b") for name in ("branch3x3_2", DOUBLE[2])]
    branches = [["branch1x1"], ["branch3x3_1", forks[0]], [*DOUBLE[:2], forks[1]], [pool, "branch_pool"]]
    return Block(branches, layers | {"branch_pool": (n, 192)})


class Twin(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name, sizes in TRUNK.items():
            setattr(self, f"Conv2d_{name}", Conv(*sizes, **({} if name == "2b_3x3" else {"padding": 0})))
        blocks = [block_a(192, 32), block_a(256, 64), block_a(288, 64), block_b(288)]
        blocks += [block_c(768, width) for width in (128, 160, 160, 192)]
        blocks += [block_d(768), block_e(1280, mean_pool), block_e(2048, max_pool)]
        for name, block in zip("5b 5c 5d 6a 6b 6c 6d 6e 7a 7b 7c".split(), blocks, strict=True):
            setattr(self, f"Mixed_{name}", block)
        self.fc = torch.nn.Linear(2048, 1008)

    def forward(self, images):
        hidden = (images - 128) / 128
        for name, layer in self.named_children():
            if name in ("Conv2d_3b_1x1", "Mixed_5b"):
                hidden = F.max_pool2d(hidden, 3, 2)
            if name != "fc":
                hidden = layer(hidden)
        return hidden.mean((2, 3))


def random_state_dict():
    """Returns weights under which no channel dies, and statistics of the batch norms that are not the initial ones."""

    def drawn(key, shape):
        if key.endswith(("running_var", "bn.weight")):
            return RNG.uniform(0.5, 1.5, shape)
        return RNG.normal(size=shape) * (2 / np.prod(shape[1:]) if len(shape) == 4 else 0.01) ** 0.5

    tensors = {key: np.asarray(drawn(key, one.shape), np.float32) for key, one in Twin().state_dict().items()}
    return {key: array for key, array in tensors.items() if not key.endswith("num_batches_tracked")}


def test_features_are_the_twins():
    tensors, images = random_state_dict(), RNG.integers(0, 256, (2, 299, 299, 3)).astype(np.float32)
    twin = Twin().eval()
    twin.load_state_dict({key: torch.from_numpy(array) for key, array in tensors.items()}, strict=False)
    graph, state = nnx.split(abstract_model(lambda rngs: InceptionV3(rngs=rngs)), nnx.Param)
    params = naming.from_torch(nnx.to_pure_dict(state), tensors | {"Mixed_5b.branch1x1.bn.num_batches_tracked": 7})
    found = np.asarray(jax.jit(lambda params: nnx.merge(graph, params)(jnp.asarray(images)))(params))
    with torch.no_grad():
        expected = twin(torch.from_numpy(images).movedim(-1, 1)).numpy()
    assert (expected > 0).mean() > 0.5
    assert np.abs(found - expected).max() < TOLERANCE * np.abs(expected).max()
    assert {key: array.tobytes() for key, array in naming.to_torch(params).items()} == {
        key: array.tobytes() for key, array in tensors.items()
    }


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
