"""Trained factors of low rank next to the frozen layers of a UNet: W x + B A x (LoRA, arXiv:2106.09685).

A is the layer `lora_A` and B is `lora_B`, so their keys are those of PEFT and diffusers: "to_q.lora_A.weight". Both are
part of their layer: wherever it runs, in a loop or recomputed, they run.
"""

from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from dmm_jax.models import layers

DOWN, UP = "lora_A", "lora_B"
CONVOLVING = {"resnets", "downsamplers", "upsamplers"}


def add_factors(unet: nnx.Module, rank: int, conv_rank: int, rngs: nnx.Rngs) -> None:
    """Adds factors to layers of a UNet: A as PyTorch's initial weights, B too (`first_factors` has its zeros).

    Args:
      rank: of all layers of the transformers: projections of attention and feed-forward, in and out.
      conv_rank: of all layers of resnets, and of the convolutions that change the resolution. Rank 0 adds none, and a
        rank above a layer's full rank is reduced to it.
    """
    for path, layer in list(nnx.iter_graph(unet)):
        if isinstance(layer, (layers.Linear, layers.Conv)):
            layer_rank = rank if "attentions" in path else conv_rank if CONVOLVING & set(path) else 0
            if layer_rank:
                layer.lora_A, layer.lora_B = map(nnx.data, _factors(layer, layer_rank, rngs))


def _factors(layer, rank, rngs):
    width, options = layer.out_features, {"use_bias": False, "dtype": layer.dtype, "rngs": rngs}
    rank = min(rank, width, layer.kernel.size // width)
    if isinstance(layer, layers.Linear):
        return layers.Linear(layer.in_features, rank, **options), layers.Linear(rank, width, **options)
    return layer.narrowed(rank, **options), layers.Conv(rank, width, 1, **options)


def is_factor(path: Collection) -> bool:
    """Tells whether a parameter with this path of names is one of the factors."""
    return DOWN in path or UP in path


def split(params: Mapping, style: Collection[str], path: tuple = ()) -> tuple[dict, dict]:
    """Returns the trained parameters of a UNet with factors, and its frozen ones.

    Args:
      style: the names of the style table and its MLP, which are trained whole.
    """
    trained, frozen = {}, {}
    for name, value in params.items():
        inner = (*path, name)
        if inner[0] in style or is_factor(inner):
            trained[name] = value
        elif isinstance(value, Mapping):
            parts = split(value, style, inner)
            for tree, part in zip((trained, frozen), parts, strict=True):
                tree.update({name: part} if part else {})
        else:
            frozen[name] = value
    return trained, frozen


def joined(frozen: Mapping, trained: Mapping) -> dict:
    """Returns the parameters from which `split` made these two."""
    both = frozen.keys() & trained.keys()
    return {**frozen, **trained, **{name: joined(frozen[name], trained[name]) for name in both}}


def folded(params: Mapping) -> dict:
    """Returns the parameters of the UNet without factors: each kernel plus its A B, float32."""
    result = {
        name: folded(value) if isinstance(value, Mapping) else value
        for name, value in params.items()
        if not is_factor((name,))
    }
    if DOWN in params:
        down, up = params[DOWN]["kernel"], params[UP]["kernel"]
        up = up[0, 0] if up.ndim == 4 else up  # (r, O); of a loop (n, r, O).
        update = jnp.matmul(down, up, precision=jax.lax.Precision.HIGHEST)
        result["kernel"] = result["kernel"].astype(jnp.float32) + update
    return result
