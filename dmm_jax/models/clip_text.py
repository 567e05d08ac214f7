"""CLIP's text encoder (arXiv:2103.00020): token ids to the states that condition the UNet; CLIP-L, OpenCLIP-H, -bigG.

A port of transformers' CLIPTextModel and CLIPTextModelWithProjection.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from dmm_jax.kernels.attention import attention
from dmm_jax.models import config_json, layers
from dmm_jax.runtime.errors import UserError

LEGACY_EOS_TOKEN_ID = 2  # Old configs hold it by mistake: the end token is the one with the largest id.
# Fields that some version of transformers writes for every network, or that concern training, the tokenizer or the
# generation of text; `dtype` is the file's.
IGNORED_FIELDS = frozenset(
    "architectures attention_dropout bos_token_id dropout dtype gradient_checkpointing initializer_factor "
    "initializer_range model_type pad_token_id tie_word_embeddings torch_dtype transformers_version use_cache "
    "add_cross_attention attn_implementation bad_words_ids begin_suppress_tokens chunk_size_feed_forward "
    "cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample early_stopping "
    "encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id "
    "forced_eos_token_id id2label is_decoder is_encoder_decoder label2id length_penalty max_length min_length "
    "name_or_path no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions "
    "output_hidden_states output_scores prefix problem_type pruned_heads remove_invalid_values repetition_penalty "
    "return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature "
    "tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torchscript typical_p use_bfloat16".split()
)


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns x * sigmoid(1.702 x), OpenAI's approximation of GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns GELU by the error function (JAX's default is the tanh approximation, 5e-4 away)."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


class CLIPTextOutput(NamedTuple):
    """The encoding of prompts, in the compute dtype."""

    last_hidden_state: Float[Array, "B L D"]  # After the final norm: Stable Diffusion 1 and 2 condition on it.
    hidden_states: tuple[Float[Array, "B L D"], ...]  # Embeddings, then each layer's output, before the final norm.
    pooled: Float[Array, "B P"]  # The final-norm state at the end token, projected if the model has a projection.


class CLIPTextEmbeddings(nnx.Module):
    """Token plus position embeddings."""

    def __init__(self, vocab_size: int, max_position_embeddings: int, width: int, *, dtype, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(0.02)
        self.token_embedding = nnx.Embed(vocab_size, width, dtype=dtype, embedding_init=init, rngs=rngs)
        self.position_embedding = nnx.Embed(max_position_embeddings, width, dtype=dtype, embedding_init=init, rngs=rngs)

    def __call__(self, input_ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Returns the embeddings of ids at positions 0, 1, ... (never a file's `position_ids`, often damaged floats).

        Raises:
          ValueError: more tokens than positions.
        """
        length, positions = input_ids.shape[1], self.position_embedding.num_embeddings
        if length > positions:
            raise UserError(f"input_ids hold {length} tokens; this text encoder has {positions} positions. Cut them.")
        return self.token_embedding(input_ids) + self.position_embedding(jnp.arange(length))[None]


class CLIPAttention(nnx.Module):
    """Multi-head self-attention; if `causal`, a token sees itself and those before it, else all."""

    def __init__(self, width: int, num_heads: int, *, causal: bool = True, dtype, rngs: nnx.Rngs):
        self.num_heads, self.causal = num_heads, causal
        self.q_proj = layers.Linear(width, width, dtype=dtype, rngs=rngs)
        self.k_proj = layers.Linear(width, width, dtype=dtype, rngs=rngs)
        self.v_proj = layers.Linear(width, width, dtype=dtype, rngs=rngs)
        self.out_proj = layers.Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Returns the attended values, without a padding mask, as CLIP was trained."""
        query, key, value = (
            rearrange(project(hidden), "B L (N K) -> B L N K", N=self.num_heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = attention(query, key, value, is_causal=self.causal)
        return self.out_proj(rearrange(attended, "B L N K -> B L (N K)"))


class CLIPMLP(nnx.Module):
    """Two dense layers with an activation between them."""

    def __init__(self, width: int, intermediate_size: int, hidden_act: str, *, dtype, rngs: nnx.Rngs):
        self.hidden_act = hidden_act
        self.fc1 = layers.Linear(width, intermediate_size, dtype=dtype, rngs=rngs)
        self.fc2 = layers.Linear(intermediate_size, width, dtype=dtype, rngs=rngs)

    def __call__(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Returns fc2(activation(fc1(hidden)))."""
        return self.fc2(ACTIVATIONS[self.hidden_act](self.fc1(hidden)))


class CLIPEncoderLayer(nnx.Module):
    """A pre-norm transformer layer."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        intermediate_size: int,
        hidden_act: str,
        layer_norm_eps: float,
        *,
        causal: bool = True,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.layer_norm1 = layers.LayerNorm(width, epsilon=layer_norm_eps, rngs=rngs)
        self.self_attn = CLIPAttention(width, num_heads, causal=causal, dtype=dtype, rngs=rngs)
        self.layer_norm2 = layers.LayerNorm(width, epsilon=layer_norm_eps, rngs=rngs)
        self.mlp = CLIPMLP(width, intermediate_size, hidden_act, dtype=dtype, rngs=rngs)

    def __call__(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Returns the residual stream after attention and MLP."""
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))
        return hidden + self.mlp(self.layer_norm2(hidden))


class CLIPEncoder(nnx.Module):
    """The stack of layers."""

    def __init__(self, num_layers: int, *layer_args, **options):
        self.layers = nnx.List([CLIPEncoderLayer(*layer_args, **options) for _ in range(num_layers)])

    def __call__(self, hidden: Float[Array, "B L D"]) -> tuple[Float[Array, "B L D"], ...]:
        """Returns the input and then the output of every layer.

        The layers run as a loop, so that a compiler meets one of them. Stacking their parameters costs one copy.
        """
        graphs, params = zip(*map(nnx.split, self.layers), strict=True)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)

        def run(hidden, layer):
            hidden = nnx.merge(graphs[0], layer)(hidden)
            return hidden, hidden

        _, states = jax.lax.scan(run, hidden, stacked)
        return hidden, *states


class CLIPTextTransformer(nnx.Module):
    """Embeddings, layers and final norm: the part whose keys begin with `text_model.`."""

    def __init__(
        self, vocab_size: int, positions: int, num_layers: int, width: int, *layer_args, layer_norm_eps, dtype, rngs
    ):
        self.embeddings = CLIPTextEmbeddings(vocab_size, positions, width, dtype=dtype, rngs=rngs)
        self.encoder = CLIPEncoder(num_layers, width, *layer_args, layer_norm_eps, dtype=dtype, rngs=rngs)
        # NNX's own form, which returns float32: ours multiplies in another order and would change the last bit.
        float32 = {"dtype": jnp.float32, "param_dtype": jnp.float32}
        self.final_layer_norm = nnx.LayerNorm(
            width, epsilon=layer_norm_eps, use_fast_variance=False, **float32, rngs=rngs
        )


class CLIPTextModel(nnx.Module):
    """The text encoder; arguments are the fields of transformers' CLIPTextConfig.

    Attributes are the keys of a state dict with the prefix `text_model.` (transformers 5.6 and later drop it).
    """

    def __init__(
        self,
        vocab_size: int = 49408,
        hidden_size: int = 512,
        intermediate_size: int = 2048,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 8,
        max_position_embeddings: int = 77,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
        eos_token_id: int = 49407,
        projection_dim: int = 512,
        *,
        with_projection: bool = False,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds the encoder, with `text_projection` (no bias, to `projection_dim`) if `with_projection`.

        Raises:
          ValueError: an activation that no CLIP has, no layer, or a width that the heads do not divide.
        """
        if hidden_act not in ACTIVATIONS:
            raise UserError(f"hidden_act must be one of {sorted(ACTIVATIONS)}; got {hidden_act!r}.")
        if num_hidden_layers < 1:
            raise UserError(f"num_hidden_layers must be 1 or more; got {num_hidden_layers}.")
        if hidden_size % num_attention_heads:
            raise UserError(
                f"hidden_size must be a multiple of num_attention_heads; got {hidden_size} and {num_attention_heads}."
            )
        self.eos_token_id = eos_token_id
        self.text_model = CLIPTextTransformer(
            vocab_size,
            max_position_embeddings,
            num_hidden_layers,
            hidden_size,
            num_attention_heads,
            intermediate_size,
            hidden_act,
            layer_norm_eps=layer_norm_eps,
            dtype=dtype,
            rngs=rngs,
        )
        if with_projection:
            self.text_projection = layers.Linear(hidden_size, projection_dim, use_bias=False, dtype=dtype, rngs=rngs)

    @classmethod
    def from_config(
        cls, config: Mapping, *, with_projection: bool | None = None, dtype=jnp.float32, rngs: nnx.Rngs
    ) -> "CLIPTextModel":
        """Builds the encoder that a transformers config.json describes.

        Args:
          config: the parsed file.
          with_projection: None decides by the config's `architectures`.

        Raises:
          ValueError: fields or values that this port does not compute; all are named.
        """
        if with_projection is None:
            with_projection = "CLIPTextModelWithProjection" in (config.get("architectures") or ())
        fields = {name: value for name, value in config.items() if name not in IGNORED_FIELDS}
        arguments = config_json.constructor_arguments(cls.__init__, fields, inert={})
        return cls(**arguments, with_projection=with_projection, dtype=dtype, rngs=rngs)

    def __call__(self, input_ids: Int[Array, "B L"]) -> CLIPTextOutput:
        """Encodes token ids.

        Raises:
          ValueError: more tokens than the encoder has positions.
        """
        hidden_states = self.text_model.encoder(self.text_model.embeddings(input_ids))
        last = self.text_model.final_layer_norm(hidden_states[-1]).astype(hidden_states[-1].dtype)
        pooled = jnp.take_along_axis(last, self._end_of_text(input_ids)[:, None, None], axis=1)[:, 0]  # (B, D)
        if hasattr(self, "text_projection"):
            pooled = self.text_projection(pooled)
        return CLIPTextOutput(last, hidden_states, pooled)

    def _end_of_text(self, input_ids: Int[Array, "B L"]) -> Int[Array, " B"]:
        if self.eos_token_id == LEGACY_EOS_TOKEN_ID:
            own = input_ids < self.text_model.embeddings.token_embedding.num_embeddings  # Rows of embeddings follow.
            return jnp.argmax(jnp.where(own, input_ids, 0), axis=1)
        return jnp.argmax(input_ids == self.eos_token_id, axis=1)  # The first: padding may be end tokens too.


class CLIPTextModelWithProjection(CLIPTextModel):
    """The same with `text_projection`, whatever the config's `architectures` say: SDXL's second encoder."""

    @classmethod
    def from_config(cls, config: Mapping, *, dtype=jnp.float32, rngs: nnx.Rngs) -> "CLIPTextModel":
        """Builds the encoder that a transformers config.json describes; raises as `CLIPTextModel.from_config`."""
        return CLIPTextModel.from_config(config, with_projection=True, dtype=dtype, rngs=rngs)
