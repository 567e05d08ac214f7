"""Laws of LPIPS: it is PyTorch's, symmetric, and 0 for equal pictures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dmm_jax.checkpoints import naming
from dmm_jax.models.lpips_alex import CHANNELS, LPIPS
from tests.models.torch_parity import SCALES, TOLERANCE, abstract, draw, parameters, relative_error, state_dict

RNG = np.random.default_rng(0)
A, B = RNG.uniform(-1, 1, (2, 3, 40, 53, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    return draw(abstract(LPIPS))


def scaled(model, scale):
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf * scale, state))


def reference(tensors, a, b):
    """The `lpips` package's forward (0.1.4), layer by layer, on torchvision's AlexNet."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    tensors = {key: torch.from_numpy(array) for key, array in tensors.items()}

    def activations(images):
        hidden = torch.from_numpy(np.moveaxis(images, -1, 1).copy())
        shift, scale = (
            torch.tensor(values)[None, :, None, None] for values in ([-0.03, -0.088, -0.188], [0.458, 0.448, 0.45])
        )
        hidden, outputs = (hidden - shift) / scale, []
        for index, stride, padding, pooled in ((0, 4, 2, 0), (3, 1, 2, 1), (6, 1, 1, 1), (8, 1, 1, 0), (10, 1, 1, 0)):
            hidden = functional.max_pool2d(hidden, 3, 2) if pooled else hidden
            weight, bias = (tensors[f"features.{index}.{leaf}"] for leaf in ("weight", "bias"))
            hidden = functional.relu(functional.conv2d(hidden, weight, bias, stride, padding))
            outputs.append(hidden / (hidden.pow(2).sum(1, keepdim=True).sqrt() + 1e-10))
        return outputs

    pairs = enumerate(zip(activations(a), activations(b), strict=True))
    distances = (
        functional.conv2d((of_a - of_b) ** 2, tensors[f"lin{k}.model.1.weight"]).mean((1, 2, 3))
        for k, (of_a, of_b) in pairs
    )
    return sum(distances)


@pytest.mark.parametrize("scale", SCALES)
def test_distances_are_those_of_the_lpips_package(model, scale):
    lpips = scaled(model, scale)
    assert relative_error(lpips(jnp.asarray(A), jnp.asarray(B)), reference(state_dict(lpips), A, B)) < TOLERANCE


def test_the_keys_and_shapes_are_those_of_the_two_published_files(model):
    """torchvision's alexnet-owt without its classifier, and the five tensors of the package's alex.pth."""
    shapes = naming.torch_shapes(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    convolutions = {
        0: (64, 3, 11, 11),
        3: (192, 64, 5, 5),
        6: (384, 192, 3, 3),
        8: (256, 384, 3, 3),
        10: (256, 256, 3, 3),
    }
    expected = {f"features.{k}.weight": shape for k, shape in convolutions.items()}
    expected |= {f"features.{k}.bias": shape[:1] for k, shape in convolutions.items()}
    expected |= {f"lin{k}.model.1.weight": (1, channels, 1, 1) for k, channels in enumerate(CHANNELS)}
    assert shapes == expected and set(shapes) == set(parameters(model))


def test_a_picture_is_at_0_from_itself_and_order_does_not_matter(model):
    same, forth, back = (np.asarray(model(jnp.asarray(a), jnp.asarray(b))) for a, b in ((A, A), (A, B), (B, A)))
    np.testing.assert_array_equal(same, np.zeros(3))
    np.testing.assert_allclose(forth, back, rtol=1e-5)
    assert (forth != 0).all()


def test_small_pictures_are_refused(model):
    assert model(jnp.zeros((1, 31, 31, 3)), jnp.ones((1, 31, 31, 3))).shape == (1,)
    with pytest.raises(ValueError, match="needs pictures of 31 pixels a side; got 64 x 30"):
        model(jnp.zeros((1, 30, 64, 3)), jnp.zeros((1, 30, 64, 3)))
