"""The emoji classifier: laws of its measures, its augmentation, and its file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dmm_jax.studies import emoji_classifier
from dmm_jax.studies.emoji_classifier import EmojiFeatures, backward_steps, largest_jump
from dmm_jax.world.training import params_of


def strip_of(shares) -> np.ndarray:
    """Returns the probabilities of three sets along a strip from the first set to the last."""
    shares = np.asarray(shares, np.float32)
    return np.stack([1.0 - shares, np.zeros_like(shares), shares], axis=1)


def test_an_even_strip_jumps_by_a_tenth_and_a_flip_by_one():
    even, flip = strip_of(np.linspace(0, 1, 11)), strip_of([0] * 6 + [1] * 5)
    assert largest_jump(even) == pytest.approx(0.1, abs=1e-6) and largest_jump(flip) == pytest.approx(1.0)
    assert backward_steps(even, 0, 2) == backward_steps(flip, 0, 2) == 0.0


def test_a_jump_through_a_third_set_counts():
    strip = strip_of([0, 0, 1, 1])
    strip[1] = [0.2, 0.8, 0.0]
    assert largest_jump(strip) == pytest.approx(1.0)  # The last set appears within one step.
    strip = strip_of([0, 0, 0, 0])
    strip[1] = [0.3, 0.7, 0.0]
    assert largest_jump(strip) == pytest.approx(0.7)


def test_backward_steps_count_both_ends_and_not_the_direction_of_the_strip():
    wavy = strip_of([0, 0.5, 0.3, 1])
    assert backward_steps(wavy, 0, 2) == pytest.approx(0.4)  # 0.2 of the first set, 0.2 of the last one.
    assert backward_steps(wavy[::-1], 2, 0) == pytest.approx(0.4)
    assert backward_steps(wavy, 2, 0) == pytest.approx(2.4)


def test_augmented_pictures_are_moved_by_at_most_four_pixels():
    corners = np.zeros((64, 64, 64, 3), np.float32)
    corners[:, 32, 32] = 9.0
    moved = np.asarray(emoji_classifier.augmented(jnp.asarray(corners), jax.random.key(0)))
    places = np.argwhere(moved.max(-1) > 5.0)[:, 1:]
    assert len(places) == 64 and np.abs(places - 32).max() == 4 and len({tuple(place) for place in places}) > 20


def test_a_saved_classifier_gives_the_same_answers(tmp_path):
    channels = (8, 8, 8, 8)
    graph, params = params_of(EmojiFeatures(channels, 3, 2, rngs=nnx.Rngs(0)))
    images = np.random.default_rng(0).integers(256, size=(2, 64, 64, 3), dtype=np.uint8)
    emoji_classifier.save(tmp_path / "c.safetensors", params, ["1f34e", "1f680", "1f41f"], ["round", "square"])
    classifier = emoji_classifier.load(tmp_path / "c.safetensors", channels)
    assert classifier.concepts == ("1f34e", "1f680", "1f41f") and classifier.sets == ("round", "square")
    outputs = classifier(images)
    model = nnx.merge(graph, params)
    features = model(jnp.asarray(images, jnp.float32) / 127.5 - 1.0)
    np.testing.assert_allclose(outputs["features"], features, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(outputs["set"], nnx.softmax(model.predict(features)["set"]), rtol=1e-4, atol=1e-5)
    assert outputs["concept"].sum(axis=1) == pytest.approx(1.0, abs=1e-5)
    assert emoji_classifier.accuracy(outputs["set"], outputs["set"].argmax(1)) == 1.0
    assert emoji_classifier.accuracy(outputs["set"], 1 - outputs["set"].argmax(1)) == 0.0
