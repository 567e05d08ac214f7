"""A stack of transformer blocks over the cells of a feature map."""

import jax
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from dmm_jax.kernels.shared_rows import per_prompt
from dmm_jax.models import layers
from dmm_jax.models.attention import BasicTransformerBlock

GROUP_NORM_EPSILON = 1e-6  # The UNet's other group norms have 1e-5.


class Transformer2DModel(nnx.Module):
    """Norm, projection in, blocks, projection out, residual. Stable Diffusion 1 projects by 1x1 convolutions."""

    def __init__(
        self,
        channels: int,
        context_width: int,
        num_heads: int,
        num_layers: int,
        *,
        use_linear_projection: bool,
        num_groups: int,
        implementation: str = "xla",
        looped: bool = False,
        dtype,
        rngs: nnx.Rngs,
    ):
        """Builds the transformer.

        Args:
          looped: whether the blocks run as a loop over their stacked parameters (`block_loops.stack_blocks`), so that
            a compiler meets one block. Then `transformer_blocks` is the structure of that block.
        """
        common = {"dtype": dtype, "rngs": rngs}
        self.norm = layers.GroupNorm(num_groups, channels, epsilon=GROUP_NORM_EPSILON, rngs=rngs)

        def projection():
            if use_linear_projection:
                return layers.Linear(channels, channels, **common)
            return layers.Conv(channels, channels, 1, **common)

        self.proj_in = projection()
        self.looped = looped
        blocks = [
            BasicTransformerBlock(channels, context_width, num_heads, implementation=implementation, **common)
            for _ in range(1 if looped else num_layers)
        ]
        self.transformer_blocks = blocks[0] if looped else nnx.List(blocks)
        self.proj_out = projection()

    def __call__(
        self,
        hidden: Float[Array, "B h w C"],
        states: Float[Array, "BP S D"],
        num_states: Int[Array, " BP"] | None = None,
        remat: bool = False,
    ) -> Float[Array, "BP h w C"]:
        """Returns the feature map after the blocks, one per prompt: P adjacent rows of `states` share a map.

        Args:
          num_states: the number of states of each prompt, if padding follows them.
          remat: whether the backward pass computes the blocks of a loop again, one by one; it keeps their inputs.
        """
        # A dense layer on (h, w, C) is the 1x1 convolution and the flattened projection alike.
        cells = self.proj_in(self.norm(hidden))
        tokens = rearrange(cells, "B h w C -> B (h w) C")
        if self.looped:
            graph, stacked = nnx.split(self.transformer_blocks)
            tokens = per_prompt(tokens, len(states))  # A loop's carry keeps its shape.
            block = lambda rows, one: (nnx.merge(graph, one)(rows, states, num_states), None)  # noqa: E731
            tokens, _ = jax.lax.scan(jax.checkpoint(block, prevent_cse=False) if remat else block, tokens, stacked)
        else:
            for block in self.transformer_blocks:
                tokens = block(tokens, states, num_states)
        return per_prompt(hidden, len(tokens)) + self.proj_out(tokens.reshape(-1, *hidden.shape[1:]))
