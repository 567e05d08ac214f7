"""The networks of the emoji study at three sizes, Stable Diffusion 1's classes at 64 pixels, and their training."""

import dataclasses
from collections.abc import Mapping

from dmm_jax.studies.emoji_pictures import SIZE_PX
from dmm_jax.world.architecture import SCHEDULER_CONFIG, TEXT_CONFIG, UNET_CONFIG, VAE_CONFIG
from dmm_jax.world.training import Plan

STAGES = ("vae", "base", "teacher", "merge", "classifier")
_CROSS = {  # Attention to the words at the finer of two levels, as in the embedded world.
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}


@dataclasses.dataclass(frozen=True)
class Size:
    """The networks of one size, and the training of each stage of STAGES."""

    name: str
    vae: Mapping
    unet: Mapping
    text: Mapping
    plans: Mapping[str, Plan]
    rates: Mapping[str, float]  # Peak learning rates.
    classifier: tuple[int, ...]  # Channels of its convolutions.
    num_images: int  # Pictures per set, for the distances.
    num_inference_steps: int = 20

    def configs(self, tokenizer_fields: Mapping) -> dict[str, dict]:
        """Returns the contents of config.json by component, and of the scheduler's config.

        Args:
          tokenizer_fields: the fields of the text encoder that follow from the tokenizer.
        """
        width = self.text["hidden_size"]
        return {
            "unet": UNET_CONFIG | {"cross_attention_dim": width} | dict(self.unet),
            "vae": VAE_CONFIG | {"sample_size": SIZE_PX} | dict(self.vae),
            "text_encoder": TEXT_CONFIG | {"intermediate_size": 4 * width} | dict(self.text) | dict(tokenizer_fields),
            "scheduler": dict(SCHEDULER_CONFIG),
        }


def _plans(**sizes: tuple[int, int]) -> dict[str, Plan]:
    """Returns plans from (steps, batch size)."""
    return {name: Plan(*size) for name, size in sizes.items()}


SIZES = {
    size.name: size
    for size in (
        Size(  # Ships: student, VAE and text encoder have at most 25 MB in float16.
            "ship",
            vae={"block_out_channels": [64, 64, 96, 128]},
            unet=_CROSS | {"block_out_channels": [96, 192]},
            text={"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2},
            plans=_plans(
                vae=(20_000, 128),
                base=(24_000, 512),
                teacher=(2_500, 256),
                merge=(12_000, 420),
                classifier=(8_000, 256),
            ),
            rates={"vae": 1e-3, "base": 1e-3, "teacher": 3e-4, "merge": 5e-4, "classifier": 1e-3},
            classifier=(48, 96, 160, 224),
            num_images=2000,
        ),
        Size(  # About 60 million parameters.
            "large",
            vae={"block_out_channels": [64, 128, 256, 256]},
            unet=_CROSS | {"block_out_channels": [192, 384], "layers_per_block": 2},
            text={"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4},
            plans=_plans(
                vae=(30_000, 128),
                base=(60_000, 512),
                teacher=(5_000, 256),
                merge=(10_000, 420),
                classifier=(8_000, 256),
            ),
            rates={"vae": 5e-4, "base": 4e-4, "teacher": 1e-4, "merge": 2e-4, "classifier": 1e-3},
            classifier=(48, 96, 160, 224),
            num_images=2000,
        ),
        Size(  # For tests: every stage in seconds; its pictures show nothing.
            "tiny",
            vae={"block_out_channels": [32] * 4},
            unet={
                "block_out_channels": [64],
                "down_block_types": ["CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D"],
            },
            text={"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1},
            plans=_plans(vae=(3, 4), base=(3, 4), teacher=(2, 4), merge=(2, 21), classifier=(3, 4)),
            rates=dict.fromkeys(STAGES, 1e-3),
            classifier=(8, 8, 8, 8),
            num_images=4,
            num_inference_steps=2,
        ),
    )
}
