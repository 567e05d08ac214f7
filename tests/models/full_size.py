"""Compares a full-size UNet's forward pass with diffusers', in float32 on the same device. Needs both.

    XLA_PYTHON_CLIENT_PREALLOCATE=false python -m tests.models.full_size sdxl  # 40 GB; on a GPU some two minutes

The test suite leaves it out, for its memory and its time.
"""

import argparse
import json

import diffusers
import jax
import jax.numpy as jnp
import torch

from dmm_jax.models.text_encoders import NUM_TIME_IDS
from dmm_jax.models.unet_2d_condition import UNet2DConditionModel
from dmm_jax.world.random_checkpoints import SIZES
from tests.models.torch_parity import TOLERANCE, abstract, load, normal, relative_error, scaled, to_torch

TIMESTEPS, NUM_TOKENS = (20, 980), 77


def compare(size: str, scale: float) -> dict:
    """Returns the greatest error over the greatest value of the output, at a multiple of PyTorch's initial weights."""
    config = {name: value for name, value in SIZES[size]["unet"].items() if not name.startswith("_")}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    with device:
        twin = scaled(diffusers.UNet2DConditionModel(**config), scale)
    batch_size, side = len(TIMESTEPS), config["sample_size"]
    latents, states = normal(batch_size, side, side, 4), normal(batch_size, NUM_TOKENS, config["cross_attention_dim"])
    added = None
    if config.get("addition_time_embed_dim"):
        pooled = config["projection_class_embeddings_input_dim"] - NUM_TIME_IDS * config["addition_time_embed_dim"]
        time_ids = jnp.array([[8 * side, 8 * side, 0, 0, 8 * side, 8 * side]] * batch_size, jnp.float32)
        added = {"text_embeds": normal(batch_size, pooled, seed=2), "time_ids": time_ids}
    torch_added = added and {name: to_torch(value).to(device) for name, value in added.items()}
    with torch.no_grad():
        inputs = (to_torch(latents).to(device), torch.tensor(TIMESTEPS, device=device), to_torch(states).to(device))
        expected = twin(*inputs, added_cond_kwargs=torch_added).sample.cpu()
    model = load(abstract(UNet2DConditionModel.from_config, config), twin.cpu())
    with jax.default_matmul_precision("highest"):
        output = jax.jit(lambda model, *inputs: model(*inputs, added_cond=added).sample)(
            model, latents, jnp.array(TIMESTEPS), states
        )
    count = sum(parameter.numel() for parameter in twin.parameters())
    error = float(relative_error(output, expected))
    return {"size": size, "scale": scale, "parameters": count, "relative_error": error, "device": device.type}


def main() -> None:
    """Prints the error as JSON, and fails if it is too great."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=sorted(SIZES))
    parser.add_argument("--scale", type=float, default=1.0)
    args = parser.parse_args()
    comparison = compare(args.size, args.scale)
    print(json.dumps(comparison))
    assert comparison["relative_error"] < TOLERANCE


if __name__ == "__main__":
    main()
