"""The classifier learns captions and styles; its features do not depend on how pictures are chunked."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.formats import safetensors_io
from dmm_jax.world import classifier as module
from dmm_jax.world.classifier import ShapeFeatures, canonical, features
from dmm_jax.world.scenes import RELATIONS, Content, parse_all, sample_content, sample_scenes

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (7, 64, 64, 3)).astype(np.uint8)
CONTENT = parse_all(
    [
        "a small red circle",
        "a large blue square above a small red star",
        "a small green star right of a large red circle",
    ]
)
STYLES = jnp.zeros((3, 5))


@pytest.fixture(scope="module")
def model() -> ShapeFeatures:
    return ShapeFeatures(style_dim=5, rngs=nnx.Rngs(0))


@pytest.fixture
def network(model):
    graph, state = nnx.split(model, nnx.Param)
    return graph, nnx.to_pure_dict(state)


def as_input(images) -> jax.Array:
    return jnp.asarray(images, jnp.float32) / 127.5 - 1.0


def same(a: Content, b: Content) -> bool:
    return all(np.array_equal(*ids) for ids in zip(a, b, strict=True))


def test_both_captions_of_one_picture_have_one_canonical_content():
    a = parse_all(["a small red star below a large blue square", "a large red circle left of a small green star"])
    b = parse_all(["a large blue square above a small red star", "a small green star right of a large red circle"])
    assert same(canonical(a), canonical(b))
    assert not same(a, b)


def test_canonical_keeps_single_shapes_and_its_own_results():
    once = canonical(sample_content(np.random.default_rng(1), 200))
    assert same(canonical(once), once)
    single = parse_all(["a small red star", "a large blue circle"])
    assert same(canonical(single), single)
    assert set(np.unique(once.relation_ids)) == {-1, RELATIONS.index("above"), RELATIONS.index("left of")}


def test_canonical_first_shape_is_above_or_to_the_left():
    scenes, _ = sample_scenes(np.random.default_rng(2), 300)
    pair = scenes.content.num_objects == 2
    swapped = np.asarray(canonical(scenes.content).colour_ids != scenes.content.colour_ids).any(axis=1)
    first, second = (np.where(swapped, scenes.centres[:, 1 - i].T, scenes.centres[:, i].T) for i in (0, 1))
    axis = np.where(canonical(scenes.content).relation_ids == RELATIONS.index("above"), 1, 0)
    nearer = np.take_along_axis(second - first, axis[None], axis=0)[0] > 0
    differ = scenes.content.colour_ids[:, 0] != scenes.content.colour_ids[:, 1]
    assert nearer[pair & differ].all()


def test_loss_without_knowledge_is_the_entropy_of_each_field(model):
    """With every head at zero: log 2 for the number, log 4 + log 6 + log 2 for a slot, log 4 for the relation."""
    graph, state = nnx.split(model, nnx.Param)
    heads = ("num_objects", "shapes", "colours", "sizes", "relation", "style")
    params = nnx.to_pure_dict(state)
    params |= {head: jax.tree.map(jnp.zeros_like, params[head]) for head in heads}
    loss = nnx.merge(graph, params).loss(as_input(IMAGES[:3]), CONTENT, STYLES + 0.5)
    assert float(loss) == pytest.approx(np.log(2 * 48 * 4) + 2.0 * 0.25, rel=1e-6)


def test_absent_shapes_teach_nothing(model):
    """A picture of one shape gives no gradient to the second slot or to the relation."""
    alone = jax.tree.map(lambda ids: ids[:1], CONTENT)
    grads = nnx.jit(nnx.grad(lambda model: model.loss(as_input(IMAGES[:1]), alone, STYLES[:1])))(model)
    for head in (grads.shapes, grads.colours, grads.sizes):
        slots = head.bias[...].reshape(2, -1)
        assert np.abs(slots[0]).max() > 0.0
        np.testing.assert_array_equal(slots[1], 0.0)
    np.testing.assert_array_equal(grads.relation.bias[...], 0.0)


def test_loss_is_lower_if_the_prediction_is_true(model):
    images = as_input(IMAGES[:3])
    predicted = model.predict(images)
    best = Content(
        predicted["num_objects"].argmax(-1) + 1,
        *(predicted[name].argmax(-1) for name in ("shape_ids", "colour_ids", "size_ids")),
        jnp.zeros(3, jnp.int32),
    )
    worst = best._replace(num_objects=3 - best.num_objects, shape_ids=predicted["shape_ids"].argmin(-1))
    losses = [model.loss(images, content, predicted["style"]) for content in (best, worst)]
    assert losses[0] < losses[1]
    off = model.loss(images, best, predicted["style"] + 1.0)
    assert float(off - losses[0]) == pytest.approx(2.0, rel=1e-5)


def test_loss_is_the_same_for_both_captions_of_a_picture(model):
    images, styles = as_input(IMAGES[:1]), STYLES[:1]
    texts = ("a large blue square above a small red star", "a small red star below a large blue square")
    losses = [float(model.loss(images, parse_all([text]), styles)) for text in texts]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    other = parse_all(["a small red star above a large blue square"])
    assert float(model.loss(images, other, styles)) != pytest.approx(losses[0], rel=1e-4)


def test_a_few_steps_of_training_lower_the_loss(network):
    graph, params = network
    images = as_input(RNG.integers(0, 256, (3, 64, 64, 3)))
    optimizer = optax.adam(3e-3)
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state):
        loss, grads = jax.value_and_grad(lambda params: nnx.merge(graph, params).loss(images, CONTENT, STYLES))(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    losses = []
    for _ in range(15):
        params, opt_state, loss = step(params, opt_state)
        losses.append(float(loss))
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("chunk_size", [3, 7, 16])
def test_features_do_not_depend_on_the_chunks(model, network, monkeypatch, chunk_size):
    monkeypatch.setattr(module, "CHUNK_SIZE", chunk_size)
    computed = features(*network, IMAGES)
    assert computed.dtype == np.float32 and computed.shape == (7, 32)
    np.testing.assert_allclose(computed, model(as_input(IMAGES)), atol=1e-5)


def test_features_of_no_pictures_are_none(network):
    assert features(*network, IMAGES[:0]).shape == (0, 32)


def test_features_have_both_signs_and_differ_between_pictures(network):
    computed = features(*network, IMAGES)
    assert computed.min() < 0.0 < computed.max()
    assert np.abs(computed[0] - computed[1]).max() > 1e-3


def test_a_file_gives_the_features_back(network, tmp_path):
    path = tmp_path / "classifier.safetensors"
    safetensors_io.save(path, naming.to_torch(network[1]), {})
    np.testing.assert_array_equal(features(*module.load(path), IMAGES), features(*network, IMAGES))


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    safetensors_io.save(path, {"weight": np.zeros(3, np.float32)}, {})
    with pytest.raises(ValueError, match="classifier of .*other.safetensors"):
        module.load(path)
