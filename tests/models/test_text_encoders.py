"""The text encoders of Stable Diffusion 2 and XL condition UNets as diffusers' pipelines do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.abstract import abstract_model
from dmm_jax.models.text_encoders import TextEncoders
from dmm_jax.text.prompt_chunks import tokenize
from dmm_jax.text.tokenizer import Tokenizers
from dmm_jax.world.tokenizer import write_tokenizer
from tests import families
from tests.models.torch_parity import SCALES, TOLERANCE

PROMPTS = ["a large red circle", "a small blue star above a green square", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizers")
    for family, pads in families.PADS.items():
        for name, pad in pads.items():
            write_tokenizer(out / family / name, pad)
    return out


def scaled(encoder, scale):
    """Draws PyTorch's initial weights, times `scale`; embeddings of variance 1 would hide the layers' part."""
    import torch

    with torch.no_grad():
        for module in encoder.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for name, parameter in encoder.named_parameters():
            parameter.mul_(0.1 * scale if "embedding" in name else scale)


def with_weights_of(pipe, configs):
    """Returns our encoders with the weights of a pipeline's."""
    model = abstract_model(lambda rngs: TextEncoders(configs, rngs=rngs))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    for name in configs:
        tensors = {key: tensor.detach().numpy() for key, tensor in getattr(pipe, name).state_dict().items()}
        params[name] = jax.tree.map(jnp.asarray, naming.from_torch(params[name], tensors))
    return nnx.merge(nnx.split(model)[0], params)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("family", families.NAMES)
def test_the_conditioning_is_that_of_diffusers(family, scale, folder):
    transformers = pytest.importorskip("transformers")
    pipe = families.stock(family, seed=0)
    for name in families.TEXTS[family]:
        scaled(getattr(pipe, name), scale)
    for name in families.PADS[family]:
        setattr(pipe, name, transformers.CLIPTokenizer.from_pretrained(folder / family / name))
    tokenizers = Tokenizers.from_folders([folder / family / name for name in families.PADS[family]])
    model = with_weights_of(pipe, families.TEXTS[family])
    conditioning, none = model(jnp.asarray(tokenizers(PROMPTS))), model(jnp.asarray(tokenizers([None] * 3)))
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    prompts, negatives, pooled, negatives_pooled = [*pipe.encode_prompt(PROMPTS, **options), None, None][:4]
    assert families.error(conditioning.encoder_hidden_states, prompts) < TOLERANCE
    if family == "sd2":
        assert conditioning.pooled is None and families.error(none.encoder_hidden_states, negatives) < TOLERANCE
        return
    assert families.error(conditioning.pooled, pooled) < TOLERANCE
    for zeros, expected in ((none.encoder_hidden_states, negatives), (none.pooled, negatives_pooled)):
        np.testing.assert_array_equal(zeros, expected.detach().numpy())
        assert not np.asarray(zeros).any()


def emphasised(states, weights):
    """A1111's emphasis of one prompt's chunk, in PyTorch."""
    weighted = states * weights[:, None]
    return weighted * (states.mean() / weighted.mean())


@pytest.mark.parametrize("family", families.NAMES)
def test_weighted_chunks_are_those_of_transformers(family, folder):
    """Each chunk by transformers' encoders, then A1111's rule per encoder; the pooled state is the first chunk's."""
    torch = pytest.importorskip("torch")
    pipe = families.stock(family, seed=0)
    for name in families.TEXTS[family]:
        scaled(getattr(pipe, name), 1.7)
        for key, parameter in getattr(pipe, name).named_parameters():
            parameter.data += 0.2 * key.endswith("bias")  # Without a norm's bias the mean is 0, and cannot be restored.
    tokenizers = Tokenizers.from_folders([folder / family / name for name in families.PADS[family]])
    prompts = ["a (large:1.4) red circle BREAK [small] blue star", "a star"]
    tokens = tokenize(tokenizers, prompts, "a1111")
    text = with_weights_of(pipe, families.TEXTS[family]).encode_chunks(*map(jnp.asarray, tokens))
    ids, weights = map(torch.tensor, tokens)
    encoders = [getattr(pipe, name) for name in families.TEXTS[family]]
    for row in range(len(prompts)):
        chunks = []
        for number in range(2):
            own = [rows[row, number].chunk(len(encoders)) for rows in (ids, weights)]
            parts = zip(encoders, *own, strict=True)
            with torch.no_grad():
                outputs = [(encoder(its_ids[None], output_hidden_states=True), its) for encoder, its_ids, its in parts]
            states = [it.hidden_states[-2] if family == "sdxl" else it.last_hidden_state for it, _ in outputs]
            pairs = zip(states, outputs, strict=True)
            chunks.append(torch.cat([emphasised(state[0], its) for state, (_, its) in pairs], dim=-1))
            if family == "sdxl" and number == 0:
                assert families.error(text.pooled[row], outputs[1][0].text_embeds[0]) < TOLERANCE
        assert families.error(text.encoder_hidden_states[row], torch.cat(chunks)) < TOLERANCE


@pytest.mark.parametrize("zeros", [True, False])
def test_no_prompt_is_what_the_stock_pipeline_of_xl_makes_of_it(folder, zeros):
    transformers = pytest.importorskip("transformers")
    pipe, folders = families.stock("sdxl", seed=0), [folder / "sdxl" / name for name in families.PADS["sdxl"]]
    pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    for path in folders:
        setattr(pipe, path.name, transformers.CLIPTokenizer.from_pretrained(path))
    tokenizers = Tokenizers.from_folders(folders, zeros)
    none = with_weights_of(pipe, families.TEXTS["sdxl"])(jnp.asarray(tokenizers([None])))
    _, states, _, pooled = pipe.encode_prompt("a", device="cpu", do_classifier_free_guidance=True)
    for actual, desired in ((none.encoder_hidden_states, states), (none.pooled, pooled)):
        np.testing.assert_allclose(actual, desired.detach().numpy(), atol=TOLERANCE * float(desired.abs().max()))
    assert bool(states.any()) != zeros and len(np.unique(tokenizers(["", None]), axis=0)) == 1 + zeros


def test_each_encoder_reads_its_own_tokenizers_row(folder):
    tokenizers = Tokenizers.from_folders([folder / "sdxl" / name for name in families.PADS["sdxl"]])
    first, second = np.split(tokenizers(["a red circle"]), 2, axis=1)
    assert first[0, :5].tolist() == second[0, :5].tolist() and first[0, -1] == 580 and second[0, -1] == 0
    assert (tokenizers(["", None])[1] == -1).all() and (tokenizers(["", None])[0] >= 0).all()
