"""Clip skip ends a text encoder early, as transformers' hidden states do; other parts of a checkpoint stay."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dmm_jax.checkpoints import provenance
from dmm_jax.checkpoints.abstract import abstract_model
from dmm_jax.checkpoints.checkpoint import Checkpoint, Component
from dmm_jax.checkpoints.clip_skip import METADATA_KEY, with_clip_skip
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.modelspec import Recipe, metadata
from dmm_jax.distill.teachers import encoder_rows
from dmm_jax.models.text_encoders import TextEncoders
from tests import families, worlds
from tests.models.test_text_encoders import scaled
from tests.models.torch_parity import SCALES, TOLERANCE

IDS = np.random.default_rng(0).integers(0, 579, (2, 77))


def sd1(tensors, unet=worlds.UNET):
    """A checkpoint in memory with a text encoder of three layers."""
    parts = {"unet": Component(unet, dict), "text_encoder": Component(dict(families.CLIP), lambda: tensors)}
    return Checkpoint(pathlib.Path("sd1"), "diffusers", parts, {}, None, None)


@pytest.mark.parametrize("scale", SCALES)
def test_states_are_those_of_transformers(scale):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(**families.CLIP)).eval()
    scaled(encoder, scale)
    checkpoint = sd1({key: tensor.detach().numpy() for key, tensor in encoder.state_dict().items()})
    graph, _ = nnx.split(abstract_model(lambda rngs: TextEncoders({"text_encoder": families.CLIP}, rngs=rngs)))
    with torch.no_grad():
        states = encoder(torch.tensor(IDS), output_hidden_states=True).hidden_states
        norm = getattr(encoder, "text_model", encoder).final_layer_norm
        for clip_skip in (1, 2, 3):
            params = with_clip_skip(checkpoint, clip_skip).params("text_encoder")
            result = nnx.merge(graph, {"text_encoder": jax.tree.map(jnp.asarray, params)})(
                jnp.asarray(IDS)
            ).encoder_hidden_states
            assert families.error(result, norm(states[-clip_skip])) < TOLERANCE


@pytest.fixture(scope="module")
def checkpoint():
    shapes = sd1({}).shapes("text_encoder")
    rng = np.random.default_rng(0)
    return sd1({key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()})


def test_only_outputs_of_skipped_layers_are_zero(checkpoint):
    before, after = checkpoint.tensors("text_encoder"), with_clip_skip(checkpoint, 2).tensors("text_encoder")
    changed = {key for key in before if not np.array_equal(before[key], after[key])}
    prefix = next(key for key in before if "fc2" in key).split("encoder.layers")[0] + "encoder.layers.2."
    names = [f"{name}.{leaf}" for name in ("self_attn.out_proj", "mlp.fc2") for leaf in ("weight", "bias")]
    assert changed == {prefix + name for name in names} and not any(after[key].any() for key in changed)


def test_clip_skip_is_part_of_digest_recipe_and_metadata(checkpoint):
    skipped = with_clip_skip(checkpoint, 2)
    assert skipped.digest("text_encoder") != checkpoint.digest("text_encoder")
    assert with_clip_skip(skipped, 2).digest("text_encoder") == skipped.digest("text_encoder")
    assert provenance.record(skipped, hashed=False)["clip_skip"] == 2
    assert "clip_skip" not in provenance.record(checkpoint, hashed=False)
    assert metadata(skipped, Recipe("x", [], None), "sgm")[METADATA_KEY] == "2"


def test_a_teacher_with_clip_skip_has_its_own_encoder(checkpoint):
    teachers = [checkpoint, with_clip_skip(checkpoint, 2), with_clip_skip(checkpoint, 2)]
    assert encoder_rows(checkpoint, teachers, shards=1)[0] == [-1, 0, 0]


@pytest.mark.parametrize("clip_skip", [0, 4])
def test_layers_that_do_not_exist_are_refused(checkpoint, clip_skip):
    with pytest.raises(CheckpointError, match=f"clip_skip must be 1 .* to 3; got {clip_skip}"):
        with_clip_skip(checkpoint, clip_skip)


@pytest.mark.parametrize("fields", [{"use_linear_projection": True}, {"addition_embed_type": "text_time"}])
def test_families_with_a_fixed_layer_are_refused(fields):
    with pytest.raises(CheckpointError, match="means nothing for sd1: stable-diffusion-(v2|xl)"):
        with_clip_skip(sd1({}, worlds.UNET | fields), 2)
