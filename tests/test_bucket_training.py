"""Training on aspect-ratio buckets: every bucket has steps and validation, and a resumed run is exact."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from dmm_jax import train
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.data.cache import LatentCache
from dmm_jax.distill import incremental
from dmm_jax.distill.teacher_samples import prepare_cache
from dmm_jax.distill.teachers import BatchRow
from dmm_jax.distill.validation import fixed_inputs
from dmm_jax.distillation import Distillation
from dmm_jax.runtime.errors import UserError

SIZES = ((64, 64), (72, 56), (56, 72))  # Height and width.


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    """A config with images of three ratios of sides, prepared."""
    config = tiny[1].copy_and_resolve_references()
    folder = tmp_path_factory.mktemp("oblong")
    rng = np.random.default_rng(0)
    for number in range(48):
        height, width = SIZES[number % 3]
        pixels = rng.integers(0, 256, (2 * height, 2 * width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a large red circle")
    config.data.kind, config.data.source, config.data.num_examples = "images", str(folder), 0
    config.data.max_aspect_ratio, config.data.cache = 1.5, str(folder.parent / "oblong_cache")
    config.num_steps, config.validation_size = 6, 12
    prepare_cache(config)
    return config


def test_prepare_reports_the_images_of_each_bucket(config, capsys):
    prepare_cache(config)
    lines = capsys.readouterr().err.splitlines()
    assert [f"       16 of {height} x {width} pixels" in lines for height, width in SIZES] == [True] * 3


def test_validation_images_of_every_bucket_have_low_and_high_noise(config):
    _, held_out = LatentCache(config.data.cache).split(12, unit=2)
    base = open_checkpoint(config.base)
    inputs = fixed_inputs(held_out, [BatchRow("a", base, 0), BatchRow("b", base, 1)], 0, 1000)
    assert {part.latents.shape for part in inputs} == {(2, 4, h // 8, w // 8, 4) for h, w in SIZES}
    timesteps = np.concatenate([part.timesteps[0] for part in inputs])
    assert sorted(timesteps) == [int((k + 0.5) * 1000 / 12) for k in range(12)]
    assert all(np.ptp(part.timesteps[0]) > 300 for part in inputs)


@pytest.mark.slow
def test_a_resumed_run_on_buckets_equals_an_uninterrupted_one(config, tmp_path):
    config = config.copy_and_resolve_references()
    config.checkpoint_every = 4
    train.run(config, tmp_path / "run")
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    expected = {line["step"]: line["score"] for line in lines if "score" in line}
    assert sorted(expected) == list(range(1, 7))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")  # As if the run had been stopped after step 4.
    run = Distillation(config)
    state = run.restore(tmp_path / "run")
    for batch in run.batches(state.step, 6, state.samples_seen):
        state, metrics = run.step(state, batch)
        assert list(expected[state.step].values()) == np.asarray(metrics["score"]).tolist()
    assert state.step == 6


def test_a_cache_of_other_buckets_is_refused(config):
    config = config.copy_and_resolve_references()
    config.data.max_aspect_ratio = 1.0
    with pytest.raises(UserError, match="buckets: expected "):
        prepare_cache(config)


def test_teachers_draw_into_every_bucket(config, tmp_path):
    (tmp_path / "prompts.txt").write_text("a large red circle\na small star\n")
    config = config.copy_and_resolve_references()
    config.data.kind, config.data.source = "prompts", str(tmp_path / "prompts.txt")
    config.data.num_examples, config.data.cache = 12, str(tmp_path / "cache")
    config.sampling.batch_size = 4
    cache = prepare_cache(incremental.resolved(config))
    shapes = {cache[k]["latents"].shape for k in range(len(cache))}
    assert len(cache) == 12 and shapes == {(height // 8, width // 8, 4) for height, width in SIZES}
    assert all(cache[k]["time_ids"][:2].tolist() == cache[k]["time_ids"][4:].tolist() for k in range(12))
