"""The text encoders of a checkpoint, one or SDXL's two, as one network: token ids to the UNet's conditioning.

Stable Diffusion 1 and 2 condition on the last hidden state after the final norm; a recipe for the second-to-last layer
has one layer fewer in the file. XL joins both encoders' states before the last layer, without the norm, and adds the
second encoder's pooled, projected state to the time embedding (arXiv:2307.01952, 2.1 and 2.2).
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from dmm_jax.models.clip_text import CLIPTextModel, CLIPTextModelWithProjection
from dmm_jax.text.tokenizer import NO_PROMPT

CLASSES = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
NUM_TIME_IDS = 6  # Original height and width, top and left of the crop, target height and width: all pixels.


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
        encoders = [getattr(self, name) for name in self.names]
        if len(encoders) == 1:
            return TextConditioning(encoders[0](input_ids).last_hidden_state, None)
        ids_of_each = jnp.split(jnp.maximum(input_ids, 0), len(encoders), axis=1)
        outputs = [encoder(ids) for encoder, ids in zip(encoders, ids_of_each, strict=True)]
        states = jnp.concatenate([output.hidden_states[-2] for output in outputs], axis=-1)
        prompted = (input_ids[:, :1] != NO_PROMPT).astype(states.dtype)  # (B, 1)
        return TextConditioning(states * prompted[:, :, None], outputs[-1].pooled * prompted)
