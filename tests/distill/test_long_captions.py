"""Captions of several chunks: what the student is trained on is what the pipeline conditions on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmm_jax.data import prepare
from dmm_jax.distill.objective import encode_prompts
from dmm_jax.distill.teacher_samples import prepare_cache
from dmm_jax.distillation import Distillation
from dmm_jax.pipeline import Pipeline
from dmm_jax.runtime import sharding
from dmm_jax.runtime.errors import UserError

CAPTIONS = ["a large red circle " + "on a very plain blue background " * 4, "a small star"]


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    """The config of a run whose captions may fill two chunks."""
    config = tiny[1].copy_and_resolve_references()
    config.data.num_chunks, config.data.cache = 2, str(tmp_path_factory.mktemp("long") / "cache")
    prepare_cache(config)
    return config


def test_training_conditions_on_all_chunks_of_a_caption(config):
    run = Distillation(config, mesh=sharding.make_mesh(devices=jax.devices()[:1]))
    batch = next(run.batches())
    pipeline = Pipeline.from_pretrained(config.base, prompt_grammar="plain")
    ids = pipeline.tokenizers(CAPTIONS, 2)
    assert batch.input_ids.shape[-1] == run.num_tokens == ids.shape[1] == 154
    text = encode_prompts(run.networks, run.objective, run.frozen.text_encoders, jnp.asarray(ids))
    expected = pipeline.encode_prompts(CAPTIONS, num_chunks=2)
    assert text.encoder_hidden_states.shape[1] == 154
    np.testing.assert_allclose(text.encoder_hidden_states, expected.encoder_hidden_states, atol=1e-5)
    trained = run.unpack(run.init()).trained
    errors = jax.eval_shape(run.gradients(trained), trained, run.teachers, run.frozen, batch, jnp.int32(0))[1]
    assert errors["score"].shape == (len(run.rows),)


def test_a_cache_of_other_chunks_is_refused(config):
    config = config.copy_and_resolve_references()
    config.data.num_chunks = 1
    with pytest.raises(UserError, match="num_tokens: expected 77, the cache has 154"):
        Distillation(config, mesh=sharding.make_mesh(devices=jax.devices()[:1]))
    with pytest.raises(UserError, match="num_tokens: expected 77, the cache has 154"):
        prepare_cache(config)


def test_cut_captions_are_counted_with_what_to_set(config):
    tokenizers = Pipeline.from_pretrained(config.base).tokenizers
    captions = prepare.CaptionTokens(tokenizers, 1)
    assert captions(CAPTIONS).shape == (2, 77)
    (line,) = captions.lines()
    assert line == "        1 captions cut after 75 tokens; data.num_chunks=2 would keep all of the longest"
    captions = prepare.CaptionTokens(tokenizers, 2)
    assert captions(CAPTIONS).shape == (2, 154) and captions.lines() == []
