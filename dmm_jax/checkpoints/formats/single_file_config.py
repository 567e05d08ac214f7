"""Configs of single-file checkpoints: a network's keys and shapes alone determine its config.json.

Nothing depends on absolute sizes, so that the rules also recognise tiny checkpoints.
"""

import contextlib
import re
from collections.abc import Iterable, Mapping

from dmm_jax.checkpoints.architecture import SD1, SD2, SDXL, check_plain, sample_size
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats.single_file import CLASS_EMBEDDING, OPEN_CLIP
from dmm_jax.text.vocabulary import CLIP_VOCAB_SIZE

HEAD_SIZE = 64  # In every CLIP, and in every UNet that projects by dense layers (SD2, SDXL).
SD1_HEADS = 8  # In every UNet that projects by 1x1 convolutions.
NORM_GROUPS = 32

Shapes = Mapping[str, tuple[int, ...]]


def read_config(component: str, shapes: Shapes, prefix: str, where: str) -> dict:
    """Returns a network's config from its keys (without the prefix) and shapes.

    Args:
      prefix: see `single_file.PREFIXES`; tells OpenCLIP's layout from that of transformers.
      where: the file's name in errors.

    Raises:
      CheckpointError: the network is unknown, or is an inpainting or unCLIP model.
    """
    if component == "unet":
        return unet_config(shapes, where)
    if component == "vae":
        return vae_config(shapes, where)
    return text_config(shapes, where, open_clip=prefix in OPEN_CLIP)


@contextlib.contextmanager
def _known_architecture(network: str, where: str):
    """Turns a missing key or an impossible shape into a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except (KeyError, IndexError, ValueError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else "the shapes of its tensors fit no other"
        raise CheckpointError(
            f"{where}: the {network} is of no known architecture ({reason}). Known are Stable Diffusion 1, 2 and XL."
        ) from None


def unet_config(shapes: Shapes, where: str) -> dict:
    """Returns a UNet's config; raises CheckpointError for unknown, inpainting and unCLIP models."""
    with _known_architecture("UNet", where):
        in_channels = shapes["input_blocks.0.0.weight"][1]
        check_plain(in_channels, where)
        num_blocks = 1 + max(_numbers(shapes, r"input_blocks\.(\d{1,3})\."))
        downsamplers = sorted(_numbers(shapes, r"input_blocks\.(\d{1,3})\.0\.op\."))
        period = downsamplers[0] if downsamplers else num_blocks  # Blocks per level, see `single_file`.
        levels = range(len(downsamplers) + 1)
        first_down = [f"input_blocks.{1 + period * level}" for level in levels]
        first_up = [f"output_blocks.{period * level}" for level in levels]
        widths = [shapes[f"{place}.0.in_layers.2.weight"][0] for place in first_down]
        attention = {
            place: "CrossAttn" if f"{place}.1.norm.weight" in shapes else "" for place in (*first_down, *first_up)
        }
        layers = r"\.1\.transformer_blocks\.(\d{1,3})\."
        depths = [len(_numbers(shapes, re.escape(place) + layers)) for place in first_down]
        # A level without attention counts as 1, as in diffusers' configs; the last level has the middle block's depth.
        depths = [depth or 1 for depth in depths[:-1]]
        depths.append(len(_numbers(shapes, "middle_block" + layers)))
        linear = len(shapes["middle_block.1.proj_in.weight"]) == 2
        config = {
            "_class_name": "UNet2DConditionModel",
            "in_channels": in_channels,
            "out_channels": shapes["out.2.weight"][0],
            "block_out_channels": widths,
            "layers_per_block": period - 1,
            "down_block_types": [attention[place] + "DownBlock2D" for place in first_down],
            "up_block_types": [attention[place] + "UpBlock2D" for place in first_up],
            "cross_attention_dim": shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
            "transformer_layers_per_block": depths if set(depths) != {1} else 1,
            "attention_head_dim": [max(width // HEAD_SIZE, 1) for width in widths] if linear else SD1_HEADS,
            "use_linear_projection": linear,
            "norm_num_groups": NORM_GROUPS,
            "sample_size": sample_size(SD2 if linear else SD1),
        }
        if CLASS_EMBEDDING not in shapes:
            return config
        if attention[first_down[0]]:  # XL has no attention at its first level.
            raise CheckpointError(
                f"{where} is an unCLIP model, a Stable Diffusion 2 that is also conditioned on images: it cannot be "
                "merged with others. Use the plain model."
            )
        return config | {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": shapes[CLASS_EMBEDDING][1],
            "sample_size": sample_size(SDXL),
        }


def vae_config(shapes: Shapes, where: str) -> dict:
    """Returns a VAE's config; raises CheckpointError if the VAE is unknown."""
    with _known_architecture("VAE", where):
        levels = range(1 + max(_numbers(shapes, r"encoder\.down\.(\d{1,3})\.")))
        return {
            "_class_name": "AutoencoderKL",
            "in_channels": shapes["encoder.conv_in.weight"][1],
            "out_channels": shapes["decoder.conv_out.weight"][0],
            "latent_channels": shapes["post_quant_conv.weight"][0],
            "block_out_channels": [shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in levels],
            "down_block_types": ["DownEncoderBlock2D"] * len(levels),
            "up_block_types": ["UpDecoderBlock2D"] * len(levels),
            "layers_per_block": len(_numbers(shapes, r"encoder\.down\.0\.block\.(\d{1,3})\.")),
            "norm_num_groups": NORM_GROUPS,
            "act_fn": "silu",
            "scaling_factor": 0.18215,
        }


def text_config(shapes: Shapes, where: str, *, open_clip: bool = False) -> dict:
    """Returns a text encoder's config; raises CheckpointError if the encoder is unknown.

    Args:
      open_clip: whether the keys have OpenCLIP's layout; its encoders have another activation, and XL's a projection.
    """
    shapes = {key.removeprefix("text_model."): shape for key, shape in shapes.items()}
    # The projection of XL's second encoder: a bare matrix, or in some files a dense layer's weight, outputs first.
    linear = shapes.get("text_projection.weight")
    projection = shapes.get("text_projection", linear and linear[::-1]) if open_clip else None
    layers = r"transformer\.resblocks\.(\d{1,3})\." if open_clip else r"encoder\.layers\.(\d{1,3})\."
    tokens, positions, hidden = (
        ("token_embedding.weight", "positional_embedding", "transformer.resblocks.0.mlp.c_fc.weight")
        if open_clip
        else ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight",
              "encoder.layers.0.mlp.fc1.weight")
    )  # fmt: skip
    with _known_architecture("text encoder", where):
        vocab_size, width = shapes[tokens]
        end = min(vocab_size, CLIP_VOCAB_SIZE) - 1  # Rows past CLIP's own are tokens that somebody added.
        return {
            "architectures": ["CLIPTextModelWithProjection" if projection else "CLIPTextModel"],
            "model_type": "clip_text_model",
            "vocab_size": vocab_size,
            "hidden_size": width,
            "projection_dim": projection[1] if projection else width,
            "intermediate_size": shapes[hidden][0],
            "num_hidden_layers": 1 + max(_numbers(shapes, layers)),
            "num_attention_heads": max(width // HEAD_SIZE, 1),
            "max_position_embeddings": shapes[positions][0],
            "hidden_act": "gelu" if open_clip else "quick_gelu",
            "layer_norm_eps": 1e-5,
            "bos_token_id": end - 1,
            "eos_token_id": end,
            "pad_token_id": 0 if open_clip else end,
        }


def _numbers(keys: Iterable[str], pattern: str) -> set[int]:
    """Returns the numbers that the pattern's group matches in any key. No network counts to a thousand."""
    return {int(match.group(1)) for match in (re.match(pattern, key) for key in keys) if match}
