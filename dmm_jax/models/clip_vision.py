"""CLIP's image encoder, a vision transformer (arXiv:2103.00020): pixels to the embedding that text is compared with.

A port of transformers' CLIPVisionModelWithProjection; the layers are the text encoder's, and every patch sees all.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from dmm_jax.models import config_json, layers
from dmm_jax.models.clip_text import ACTIVATIONS, IGNORED_FIELDS, CLIPEncoder
from dmm_jax.runtime.errors import UserError


class CLIPVisionOutput(NamedTuple):
    """The encoding of pictures, in the compute dtype."""

    last_hidden_state: Float[Array, "B L D"]  # The class token, then the patches row by row, before the last norm.
    pooled: Float[Array, "B D"]  # The class token's state after the last norm.
    image_embeds: Float[Array, "B P"]  # The same, projected; not of length 1.


class CLIPVisionEmbeddings(nnx.Module):
    """The class token and the patches, each with the embedding of its position."""

    def __init__(self, image_size: int, patch_size: int, num_channels: int, width: int, *, dtype, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(0.02)
        positions = (image_size // patch_size) ** 2 + 1
        self.dtype = dtype
        self.class_embedding = nnx.Param(init(rngs.params(), (width,), jnp.float32))
        self.patch_embedding = layers.Conv(
            num_channels,
            width,
            patch_size,
            stride=patch_size,
            padding="VALID",
            use_bias=False,
            dtype=dtype,
            rngs=rngs,
        )
        self.position_embedding = nnx.Embed(positions, width, dtype=dtype, embedding_init=init, rngs=rngs)

    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B L D"]:
        """Returns one token for the picture, then one per patch, row by row."""
        patches = rearrange(self.patch_embedding(images), "B h w D -> B (h w) D")
        first = jnp.broadcast_to(self.class_embedding[...].astype(self.dtype), (len(images), 1, patches.shape[-1]))
        tokens = jnp.concatenate([first, patches], axis=1)
        return tokens + self.position_embedding(jnp.arange(tokens.shape[1]))[None]


class CLIPVisionTransformer(nnx.Module):
    """Embeddings, norm, layers, norm: the part whose keys begin with `vision_model.`."""

    def __init__(
        self, image_size, patch_size, num_channels, num_layers: int, width: int, *layer_args, layer_norm_eps, **options
    ):
        self.embeddings = CLIPVisionEmbeddings(image_size, patch_size, num_channels, width, **options)
        self.pre_layrnorm = layers.LayerNorm(width, epsilon=layer_norm_eps, rngs=options["rngs"])  # Spelt as the key.
        self.encoder = CLIPEncoder(num_layers, width, *layer_args, layer_norm_eps, causal=False, **options)
        self.post_layernorm = layers.LayerNorm(width, epsilon=layer_norm_eps, rngs=options["rngs"])


class CLIPVisionModelWithProjection(nnx.Module):
    """The image encoder; arguments are the fields of transformers' CLIPVisionConfig, attributes a state dict's keys."""

    def __init__(
        self,
        hidden_size: int = 768,
        intermediate_size: int = 3072,
        projection_dim: int = 512,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_channels: int = 3,
        image_size: int = 224,
        patch_size: int = 32,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
        *,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds the encoder.

        Raises:
          ValueError: an activation that no CLIP has, or a width that the heads do not divide.
        """
        if hidden_act not in ACTIVATIONS:
            raise UserError(f"hidden_act must be one of {sorted(ACTIVATIONS)}; got {hidden_act!r}.")
        if hidden_size % num_attention_heads:
            raise UserError(
                f"hidden_size must be a multiple of num_attention_heads; got {hidden_size} and {num_attention_heads}."
            )
        self.image_size = image_size
        self.vision_model = CLIPVisionTransformer(
            image_size,
            patch_size,
            num_channels,
            num_hidden_layers,
            hidden_size,
            num_attention_heads,
            intermediate_size,
            hidden_act,
            layer_norm_eps=layer_norm_eps,
            dtype=dtype,
            rngs=rngs,
        )
        self.visual_projection = layers.Linear(hidden_size, projection_dim, use_bias=False, dtype=dtype, rngs=rngs)

    @classmethod
    def from_config(cls, config: Mapping, *, dtype=jnp.float32, rngs: nnx.Rngs) -> "CLIPVisionModelWithProjection":
        """Builds the encoder that a transformers config.json describes.

        Raises:
          ValueError: fields or values that this port does not compute; all are named.
        """
        fields = {name: value for name, value in config.items() if name not in IGNORED_FIELDS}
        return cls(**config_json.constructor_arguments(cls.__init__, fields, inert={}), dtype=dtype, rngs=rngs)

    def __call__(self, images: Float[Array, "B H W C"]) -> CLIPVisionOutput:
        """Encodes pictures whose channels have the mean and variance of CLIP's training.

        Raises:
          ValueError: the pictures are not of `image_size`, the only size that has position embeddings.
        """
        if images.shape[1:3] != (self.image_size, self.image_size):
            raise UserError(
                f"this CLIP takes pictures of {self.image_size} x {self.image_size} pixels; got {images.shape[2]} x "
                f"{images.shape[1]}. Resize and crop them."
            )
        tower = self.vision_model
        tokens = tower.embeddings(images)
        last = tower.encoder(tower.pre_layrnorm(tokens))[-1]
        pooled = tower.post_layernorm(last[:, 0])  # (B, D)
        return CLIPVisionOutput(last, pooled, self.visual_projection(pooled))
