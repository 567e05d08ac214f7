"""The averages are those that their papers define, and obey the laws that follow from the definitions."""

import dataclasses
import pathlib

import numpy as np
import pytest

from dmm_jax.checkpoints import merge_methods as lib
from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.checkpoint import Component
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.merge_methods import Method, merge_networks
from dmm_jax.checkpoints.modelspec import Recipe
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.write import write_folder, write_single_file

RNG = np.random.default_rng(0)
BASE = RNG.standard_normal((5, 4), np.float32)
DELTAS = [RNG.standard_normal((5, 4), np.float32) for _ in range(3)]
TEACHERS = [BASE + delta for delta in DELTAS]
NAMES = ("a", "b", "c")


def ties_of_one_entry(entries, is_kept, weights):
    """Returns TIES' merged delta for one entry of each teacher, from Python numbers, branch by branch."""
    entries = [entry if keep else 0.0 for entry, keep in zip(entries, is_kept, strict=True)]
    total = sum(weight * entry for weight, entry in zip(weights, entries, strict=True))
    agreeing = [(weight, entry) for weight, entry in zip(weights, entries, strict=True) if entry * total > 0]
    return sum(w * e for w, e in agreeing) / sum(w for w, _ in agreeing) if agreeing else 0.0


@pytest.mark.parametrize("density", [0.2, 0.55, 1.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, 1.0)])
def test_ties_is_trim_elect_and_disjoint_mean(density, weights):
    number = int(np.ceil(density * 20))
    masks = [np.zeros(20, bool) for _ in DELTAS]
    for mask, delta in zip(masks, DELTAS, strict=True):
        mask[np.argsort(-np.abs(delta.ravel()))[:number]] = True
    flat = [delta.ravel().tolist() for delta in DELTAS]
    expected = [ties_of_one_entry([d[i] for d in flat], [mask[i] for mask in masks], weights) for i in range(20)]
    merged = Method("ties", weights, 0.7, density).merge(BASE, TEACHERS, NAMES, "key")
    np.testing.assert_allclose(merged, BASE + 0.7 * np.reshape(expected, (5, 4)), rtol=1e-5, atol=1e-6)


def test_average_and_task_arithmetic_are_their_sums():
    weights = (0.5, 2.0, 1.0)
    mean = (0.5 * TEACHERS[0] + 2.0 * TEACHERS[1] + TEACHERS[2]) / 3.5
    np.testing.assert_allclose(Method("average", weights).merge(BASE, TEACHERS, NAMES, "key"), mean, rtol=1e-5)
    moved = BASE + 0.3 * (0.5 * DELTAS[0] - 2.0 * DELTAS[1] + DELTAS[2])
    merged = Method("task_arithmetic", (0.5, -2.0, 1.0), 0.3).merge(BASE, TEACHERS, NAMES, "key")
    np.testing.assert_allclose(merged, moved, rtol=1e-5, atol=1e-6)


def test_the_average_of_one_teacher_is_the_teacher():
    merged = Method("average", (0.3,)).merge(BASE, TEACHERS[:1], NAMES[:1], "key")
    np.testing.assert_array_equal(merged, TEACHERS[0], strict=True)


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "dare"])
def test_scale_0_is_the_base(name):
    merged = Method(name, (1.0, 1.0, 1.0), 0.0, 0.5).merge(BASE, TEACHERS, NAMES, "key")
    np.testing.assert_array_equal(merged, BASE, strict=True)


def test_ties_of_equal_signs_and_density_1_is_the_mean_of_the_deltas():
    teachers = [BASE + np.abs(delta) for delta in DELTAS]
    merged = Method("ties", (1.0, 1.0, 1.0)).merge(BASE, teachers, NAMES, "key")
    np.testing.assert_allclose(merged, np.mean(teachers, axis=0), rtol=1e-5, atol=1e-6)


def test_trimming_keeps_the_largest_and_what_equals_them():
    delta = np.array([3.0, -1.0, 1.0, 0.5, 0.0], np.float32)
    np.testing.assert_array_equal(lib.trim(delta, 0.4), [3.0, -1.0, 1.0, 0.0, 0.0])
    np.testing.assert_array_equal(lib.trim(delta, 0.01), [3.0, 0.0, 0.0, 0.0, 0.0])
    np.testing.assert_array_equal(lib.trim(delta, 1.0), delta)


def test_dare_rescales_kept_entries_and_averages_to_the_delta():
    samples = np.stack([lib.drop(DELTAS[0], 0.25, seed, "teacher", "key") for seed in range(4000)])
    np.testing.assert_allclose(
        samples[samples != 0], np.broadcast_to(4 * DELTAS[0], samples.shape)[samples != 0], rtol=1e-6
    )
    # The mean's standard deviation is |delta| * sqrt(3 / 4000).
    assert (np.abs(samples.mean(0) - DELTAS[0]) < 5 * np.abs(DELTAS[0]) * (3 / 4000) ** 0.5).all()


def test_dares_mask_differs_by_seed_teacher_and_tensor_alone():
    def masks(*words):
        return lib.drop(np.ones((40, 5), np.float32), 0.5, *words) != 0

    first = masks(0, "a", "key")
    np.testing.assert_array_equal(first, masks(0, "a", "key"))
    for other in (masks(1, "a", "key"), masks(0, "b", "key"), masks(0, "a", "other")):
        assert 0.3 < np.mean(first == other) < 0.7


@pytest.fixture(scope="module")
def base(folder):
    return open_checkpoint(folder)


def moved(base, seed):
    rng, tensors = np.random.default_rng(seed), base.tensors("unet")
    new = {key: tensors[key] + rng.normal(0, 0.1, tensors.shape(key)).astype(np.float32) for key in tensors}
    components = {"unet": Component(base.unet_config, lambda: new)}
    return dataclasses.replace(base, components=components, tokenizer_folder=None, path=pathlib.Path(f"teacher{seed}"))


@pytest.fixture(scope="module")
def teachers(base):
    return [moved(base, seed) for seed in range(3)]


WEIGHTS = (1.0, 2.0, 3.0)
ALL = [Method("average", WEIGHTS), Method("task_arithmetic", WEIGHTS, 0.3), Method("ties", WEIGHTS, 1.0, 0.3)]
ALL += [Method("dare", WEIGHTS, 0.4, 0.3, 5)]


@pytest.mark.parametrize("method", ALL, ids=lambda method: method.name)
def test_order_names_and_file_formats_of_teachers_do_not_matter(base, teachers, method, tmp_path):
    recipe = Recipe("teacher", [], None)
    written = [
        write_single_file(tmp_path / "x.safetensors", teachers[0], "float32", recipe),
        write_folder(tmp_path / "y", teachers[1], "float32", recipe),
        write_folder(tmp_path / "z", teachers[2], "float32", recipe, 100_000),
    ]
    order = [2, 0, 1]
    reordered = dataclasses.replace(method, weights=tuple(method.weights[i] for i in order))
    merged = merge_networks(base, [open_checkpoint(written[i]) for i in order], reordered).tensors("unet")
    expected = merge_networks(base, teachers, method).tensors("unet")
    assert all(np.array_equal(merged[key], expected[key]) for key in expected) and len(merged) == len(expected)
    assert not all(np.array_equal(expected[key], base.tensors("unet")[key]) for key in expected)


@pytest.mark.parametrize("method", ALL, ids=lambda method: method.name)
def test_every_merged_tensor_is_the_merge_of_the_teachers_tensors(base, teachers, method):
    merged = merge_networks(base, teachers, method).tensors("unet")
    hashes = [teacher.digest("unet") for teacher in teachers]
    for key in ("conv_in.weight", "conv_out.bias"):
        tensors = [teacher.tensors("unet")[key] for teacher in teachers]
        expected = method.merge(base.tensors("unet")[key], tensors, hashes, key)
        np.testing.assert_allclose(merged[key], expected, rtol=1e-5, atol=1e-6)


def test_everything_except_the_unet_is_the_bases(base, teachers):
    merged = merge_networks(base, teachers, ALL[0])
    assert merged.components["vae"] is base.components["vae"]
    assert merged.components["text_encoder"] is base.components["text_encoder"]
    assert merged.scheduler_config == base.scheduler_config and merged.tokenizer_folder == base.tokenizer_folder


def test_a_teacher_without_text_encoder_counts_with_the_bases(base, teachers):
    shifted = {key: base.tensors("text_encoder")[key] + np.float32(3.0) for key in base.tensors("text_encoder")}
    encoder = Component(base.config("text_encoder"), lambda: shifted)
    with_encoder = dataclasses.replace(teachers[0], components={**teachers[0].components, "text_encoder": encoder})
    merged = merge_networks(
        base, [with_encoder, *teachers[1:]], Method("average", (1.0, 1.0, 1.0)), ("unet", "text_encoder")
    )
    unet_alone = merge_networks(base, teachers, Method("average", (1.0, 1.0, 1.0)))
    for key, name in naming.spellings(base.tensors("text_encoder")).items():
        expected = base.tensors("text_encoder")[name] + np.float32(1.0)
        np.testing.assert_allclose(merged.tensors("text_encoder")[key], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(merged.tensors("unet")["conv_out.bias"], unet_alone.tensors("unet")["conv_out.bias"])


def test_merging_reads_only_the_tensor_that_is_asked_for(base, teachers, monkeypatch):
    calls = []
    merge = Method.merge
    monkeypatch.setattr(Method, "merge", lambda self, *args: calls.append(args[-1]) or merge(self, *args))
    merged = merge_networks(base, teachers, ALL[0]).tensors("unet")
    assert merged.shape("conv_in.weight") == base.tensors("unet").shape("conv_in.weight") and calls == []
    merged["conv_in.weight"]
    assert calls == ["conv_in.weight"]


def test_a_damaged_teacher_is_named_by_its_tensor(base, teachers):
    tensors = teachers[1].tensors("unet") | {"conv_out.bias": np.full(4, np.nan, np.float32)}
    damaged = dataclasses.replace(teachers[1], components={"unet": Component(base.unet_config, lambda: tensors)})
    merged = merge_networks(base, [teachers[0], damaged, teachers[2]], ALL[0]).tensors("unet")
    with pytest.raises(CheckpointError, match="unet of teacher1: NaN or infinity in conv_out.bias"):
        merged["conv_out.bias"]
