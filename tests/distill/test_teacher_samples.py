"""Laws of data that the teachers make: what follows from what, resuming, shares, and a training on it."""

import collections
import pathlib
import shutil

import numpy as np
import pytest

from dmm_jax import train
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.data.cache import partial_folder
from dmm_jax.data.prompts import Draws
from dmm_jax.distill import teacher_samples
from dmm_jax.distill.teacher_samples import prepare_cache
from dmm_jax.distillation import Distillation
from dmm_jax.pipeline import Pipeline
from dmm_jax.text.tokenizer import Tokenizers
from tests import families

PROMPTS = ["a large red circle", "a small blue star", "a green square"]
COUNT = 12


def as_samples(config, folder):
    """Returns a copy of a config that lets the teachers draw."""
    config = config.copy_and_resolve_references()
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    config.data.kind, config.data.source = "prompts", str(folder / "prompts.txt")
    config.data.num_examples, config.data.cache, config.seed = COUNT, str(folder / "cache"), 7
    config.sampling.num_inference_steps, config.sampling.guidance_scale = 2, 2.0
    config.sampling.batch_size = 4
    return config


@pytest.fixture
def config(tiny, tmp_path):
    return as_samples(tiny[1], tmp_path)


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """A config and the cache of it."""
    config = as_samples(tiny[1], tmp_path_factory.mktemp("made"))
    return config, prepare_cache(config)


def small_shards(monkeypatch, size):
    fill = teacher_samples.sample_prompts
    monkeypatch.setattr(teacher_samples, "sample_prompts", lambda *a, **k: fill(*a, **k, shard_size=size))


def contents(cache):
    return [
        (one["id"], one["latents"].tobytes(), one["input_ids"].tobytes())
        for one in map(cache.__getitem__, range(len(cache)))
    ]


def test_a_cached_latent_is_what_the_teachers_pipeline_draws(made):
    config, cache = made
    base, right = open_checkpoint(config.base), open_checkpoint(dict(config.teachers)["right"])
    assert right.has("text_encoder")  # Its own is asked, not the base's.
    pipeline = Pipeline.for_unet(base, base.unet_config, (), dtype="float32")
    pipeline = pipeline.with_unet(right.params("unet")).with_text_encoders(right.text_params(base))
    drawn = pipeline(
        [PROMPTS[1], PROMPTS[0], PROMPTS[2]], seeds=[8, 10, 12], output="latents",
        num_inference_steps=2, guidance_scale=2.0, height=64, width=64,
    )  # fmt: skip
    for k, latents in zip((1, 3, 5), drawn, strict=True):
        np.testing.assert_allclose(cache[k]["latents"], latents, rtol=1e-3, atol=1e-3)
    behind_the_base = pipeline.with_text_encoders(base.text_params())
    left = Pipeline.from_pretrained(dict(config.teachers)["left"], base=config.base)
    for other in (left, Pipeline.from_pretrained(config.base), behind_the_base):
        apart = other([PROMPTS[1]], seeds=[8], output="latents", num_inference_steps=2, guidance_scale=2.0)
        assert np.abs(apart[0] - drawn[0]).max() > 0.01


def test_records_hold_token_ids_and_sizes_in_the_order_of_draws(made):
    config, cache = made
    ids = Tokenizers.from_folders(open_checkpoint(config.base).tokenizer_folders)(PROMPTS)
    assert len(cache) == COUNT
    for k in range(COUNT):
        assert cache[k]["id"] == k
        assert cache[k]["time_ids"].tolist() == [64, 64, 0, 0, 64, 64]
        np.testing.assert_array_equal(cache[k]["input_ids"], ids[k % 3])


def test_the_same_config_makes_the_same_cache_whatever_the_shards(made, config, monkeypatch):
    small_shards(monkeypatch, 3)
    again = prepare_cache(config)
    assert len(again.header.shards) == 4
    assert contents(again) == contents(made[1])


def test_interrupted_work_resumes_after_the_last_complete_shard(made, config, monkeypatch):
    small_shards(monkeypatch, 4)
    call, seen = teacher_samples.TeacherSampler.__call__, []

    def failing(self, teacher, prompts, seeds, size):
        seen.append(min(seeds))
        if len(seen) == 4:  # Two teachers of the first shard, one of the second, and this.
            raise RuntimeError("power cut")
        return call(self, teacher, prompts, seeds, size)

    monkeypatch.setattr(teacher_samples.TeacherSampler, "__call__", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        prepare_cache(config)
    assert partial_folder(pathlib.Path(config.data.cache)).exists()
    seen.extend([None] * 10)
    cache = prepare_cache(config)
    assert min(seed for seed in seen[14:]) == config.seed + 4  # The first shard was not drawn again.
    assert contents(cache) == contents(made[1])


def test_a_batch_size_changes_nothing_but_rounding(made, config):
    config.sampling.batch_size = 3
    cache = prepare_cache(config)
    for k in range(COUNT):
        np.testing.assert_allclose(cache[k]["latents"], made[1][k]["latents"], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "num_prompts, num_teachers, count", [(3, 2, 10), (4, 2, 9), (4, 8, 70), (1, 3, 5), (6, 4, 24), (100, 8, 11)]
)
def test_teachers_and_prompts_get_even_shares(num_prompts, num_teachers, count):
    draws = Draws([str(k) for k in range(num_prompts)], num_teachers, count)
    everything = [draws[k] for k in range(count)]
    for group, size in (("teacher", num_teachers), ("prompt", num_prompts)):
        shares = collections.Counter(getattr(draw, group) for draw in everything)
        assert max(shares.values()) - (min(shares.values()) if len(shares) == size else 0) <= 1
    pairs = {(draw.prompt, draw.teacher) for draw in everything}
    assert len(pairs) == min(count, num_prompts * num_teachers)
    assert len({draw.seed for draw in everything}) == count


@pytest.mark.parametrize(
    "change, message",
    [
        ({"data.source": "a.txt"}, "no prompt file a.txt"),
        ({"data.source": ""}, "data.source is empty"),
        ({"sampling.solver": "eular"}, "did you mean 'euler'"),
        ({"sampling.num_inference_steps": 1001}, "must be 1 to 1000"),
        ({"sampling.batch_size": 0}, "at least 1; got 0"),
        ({"data.num_examples": -1}, "num_examples must not be negative"),
        ({"data.resolution": 60}, "Use 56"),
    ],
)
def test_unusable_configs_are_refused(config, change, message):
    config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=message):
        prepare_cache(config)


@pytest.mark.parametrize(
    "contents, message", [(b"", "holds no prompt"), (b" \n\n", "holds no prompt"), (b"a\n\xff", "not UTF-8 text"),
                       (b"a\n" + b"b" * 100_001, "line 2: more than 100000")],
)  # fmt: skip
def test_an_unusable_prompt_file_is_refused(config, tmp_path, contents, message):
    (tmp_path / "prompts.txt").write_bytes(contents)
    with pytest.raises(ValueError, match=message):
        prepare_cache(config)


def test_teachers_are_needed(config):
    config.teachers = ()
    with pytest.raises(ValueError, match="teachers is empty"):
        prepare_cache(config)


@pytest.mark.parametrize("change", ["teachers", "prompts", "solver", "guidance_scale", "seed", "num_examples", "dtype"])
def test_a_cache_that_other_things_made_is_refused(made, tmp_path, change):
    config = made[0].copy_and_resolve_references()
    if change == "teachers":
        config.teachers = config.teachers[::-1]
    elif change == "prompts":
        config.data.source = str(tmp_path / "other.txt")
        (tmp_path / "other.txt").write_text("a star")
    else:
        values = {"seed": 8, "data.num_examples": 11, "dtype": "bfloat16"}
        values |= {"sampling.solver": "euler", "sampling.guidance_scale": 3.0}
        name = next(name for name in values if name.endswith(change))
        config.update_from_flattened_dict({name: values[name]})
    with pytest.raises(ValueError, match="seed: expected 8" if change == "seed" else "source: expected 'teachers: "):
        prepare_cache(config)


def test_the_header_says_who_made_it_and_how(made):
    source = made[1].header.source
    assert all(part in source for part in ("left=", "right=", "prompts=", "solver=dpmpp_2m", "guidance_scale=2.0"))


def test_a_student_trains_on_teacher_samples_alone_or_after_images(made, tiny, trained, tmp_path):
    config = tiny[1].copy_and_resolve_references()
    config.data.cache, config.num_steps = made[0].data.cache, 2
    alone = train.run(config, tmp_path / "alone")
    assert alone["step"] == 2 and np.isfinite(alone["loss"])

    shutil.copytree(trained, tmp_path / "run")
    config.num_steps = 7
    second = train.run(config, tmp_path / "run")
    assert second["step"] == 7 and np.isfinite(second["loss"])


@pytest.mark.parametrize("family", families.NAMES)
def test_teachers_of_2_and_xl_draw_what_their_students_are_trained_on(family, tmp_path):
    config = as_samples(families.tiny_config(families.write_world(tmp_path, family), tmp_path / "cache"), tmp_path)
    cache = prepare_cache(config)
    base = open_checkpoint(config.base)
    assert cache.header.num_tokens == 77 * len(base.text_encoders)
    left = Pipeline.from_pretrained(dict(config.teachers)["left"])
    drawn = left(
        [PROMPTS[2]], seeds=[9], output="latents", num_inference_steps=2, guidance_scale=2.0, height=64, width=64
    )
    np.testing.assert_allclose(cache[2]["latents"], drawn[0], rtol=2e-3, atol=2e-3)
    if family == "sdxl":  # Networks are told the sizes of the pictures that the teachers draw.
        batch = next(Distillation(config).batches())
        assert np.unique(batch.time_ids.reshape(-1, 6), axis=0).tolist() == [[64, 64, 0, 0, 64, 64]]
