"""The text encoders of a checkpoint, one or SDXL's two, as one network: token ids to the UNet's conditioning.

Stable Diffusion 1 and 2 condition on the last hidden state after the final norm; a recipe for the second-to-last layer
has one layer fewer in the file. XL joins both encoders' states before the last layer, without the norm, and adds the
second encoder's pooled, projected state to the time embedding (arXiv:2307.01952, 2.1 and 2.2).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from dmm_jax.models.clip_text import CLIPTextModel, CLIPTextModelWithProjection
from dmm_jax.runtime.errors import UserError
from dmm_jax.text.prompt_chunks import emphasise
from dmm_jax.text.tokenizer import NO_PROMPT, Tokenizer

CLASSES = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
NUM_TIME_IDS = 6  # Original height and width, top and left of the crop, target height and width: all pixels.


def token_tables(params: Mapping) -> dict[str, Array]:
    """Returns the tables of the encoders' token embeddings, (rows, D), by encoder."""
    return {name: tree["text_model"]["embeddings"]["token_embedding"]["embedding"] for name, tree in params.items()}


def with_rows(params: Mapping, rows: Mapping[str, Sequence]) -> dict:
    """Returns the encoders' parameters with more rows (k, D) after those of their token tables, by encoder."""

    def extended(path, leaf):
        is_table = path[-2].key == "token_embedding"
        return np.concatenate([leaf, *(np.asarray(row, leaf.dtype) for row in rows[path[0].key])]) if is_table else leaf

    return jax.tree.map_with_path(extended, dict(params))


def embedding_ids(params: Mapping, embeddings: Mapping[str, int]) -> list[dict[str, range]]:
    """Returns, for each encoder, the ids of embeddings by name and <name> in lower case: the last rows of its table.

    Args:
      embeddings: {name: number of vectors}, in the order of the rows.
    """
    ends = np.cumsum([0, *embeddings.values()]).tolist()
    places = dict(zip(map(str.lower, embeddings), zip(ends[:-1], ends[1:], strict=True), strict=True))
    places = {f"<{name.strip('<>')}>": place for name, place in places.items()} | places
    return [
        {name: range(first + start, first + end) for name, (start, end) in places.items()}
        for first in (len(table) - ends[-1] for table in token_tables(params).values())
    ]


def check_rows(params: Mapping, tokenizers: Sequence[Tokenizer], input_ids: Int[np.ndarray, "B K EL"]) -> None:
    """Raises UserError if an encoder's table lacks a row for an id: it would read as NaN."""
    tables = token_tables(params).values()
    for tokenizer, table, ids in zip(tokenizers, tables, np.split(input_ids, len(tables), axis=2), strict=True):
        if ids.max(initial=0) >= len(table):
            raise UserError(
                f"the text encoder has no row for the token {tokenizer.token(int(ids.max()))!r} (id {ids.max()}, "
                f"{len(table)} rows): the tokenizer belongs to another checkpoint. Give the base that both belong to."
            )


class TextConditioning(NamedTuple):
    """The UNet's conditioning, in the compute dtype."""

    encoder_hidden_states: Float[Array, "B L D"]
    pooled: Float[Array, "B P"] | None  # None except for XL.

    def added_cond(self, time_ids: Num[Array, "B 6"] | None) -> dict[str, Array] | None:
        """Returns the UNet's `added_cond`: XL's pooled states and sizes, else None."""
        return None if self.pooled is None else {"text_embeds": self.pooled, "time_ids": time_ids}


class TextEncoders(nnx.Module):
    """One text encoder or two; attributes are the names of their folders in a checkpoint."""

    def __init__(self, configs: Mapping[str, Mapping], *, dtype=jnp.float32, rngs: nnx.Rngs):
        """Builds the encoders that {"text_encoder": config.json, and perhaps "text_encoder_2"} describe.

        Raises:
          ValueError: fields or values that the port does not compute; all are named.
        """
        self.names = tuple(configs)
        for name, config in configs.items():
            setattr(self, name, CLASSES[name].from_config(config, dtype=dtype, rngs=rngs))

    def __call__(self, input_ids: Int[Array, "B EL"]) -> TextConditioning:
        """Encodes token ids: rows join the ids of every encoder's tokenizer.

        For XL a row of -1 stands for a missing prompt and gives zeros: diffusers' `force_zeros_for_empty_prompt`.

        Raises:
          ValueError: more tokens than an encoder has positions.
        """
        states, pooled = self._encode(input_ids)
        return self._joined(input_ids, states, pooled)

    def encode_chunks(
        self, input_ids: Int[Array, "B K EL"], weights: Float[Array, "B K EL"] | None = None
    ) -> TextConditioning:
        """Encodes prompts of K chunks: states (B, K L, D), and the pooled state of the first chunk.

        With `weights`, each encoder's states of each chunk have their emphasis, and their own mean restored; the pooled
        state has no weights.

        Raises:
          ValueError: more tokens than an encoder has positions.
        """
        num_chunks = input_ids.shape[1]
        ids = rearrange(input_ids, "B K L -> (B K) L")
        states, pooled = self._encode(ids)
        if weights is not None:
            of_each = jnp.split(rearrange(weights, "B K L -> (B K) L"), len(states), axis=1)
            states = [emphasise(*pair) for pair in zip(states, of_each, strict=True)]
        text = self._joined(ids, states, pooled)
        states = rearrange(text.encoder_hidden_states, "(B K) L D -> B (K L) D", K=num_chunks)
        return TextConditioning(states, None if text.pooled is None else text.pooled[::num_chunks])

    def _encode(self, input_ids):
        """Returns the states of every encoder, and the last one's pooled state for XL, else None."""
        encoders = [getattr(self, name) for name in self.names]
        if len(encoders) == 1:
            return [encoders[0](input_ids).last_hidden_state], None
        ids_of_each = jnp.split(jnp.maximum(input_ids, 0), len(encoders), axis=1)
        outputs = [encoder(ids) for encoder, ids in zip(encoders, ids_of_each, strict=True)]
        return [output.hidden_states[-2] for output in outputs], outputs[-1].pooled

    def _joined(self, input_ids, states, pooled) -> TextConditioning:
        """Joins the states of all encoders; XL's are zeros for rows without a prompt."""
        if pooled is None:
            return TextConditioning(states[0], None)
        states = jnp.concatenate(states, axis=-1)
        prompted = (input_ids[:, :1] != NO_PROMPT).astype(states.dtype)  # (B, 1)
        return TextConditioning(states * prompted[:, :, None], pooled * prompted)
