"""`python -m tests.serve.devices_program`: a student like Stable Diffusion XL on four devices, two slots on each.

`test_devices` runs it with fake devices; it prints the largest difference from the pipeline's images, in 1/255.
"""

import jax
import numpy as np

from tests.serve.students import drawn_alone, request, small_pipeline, started

XL_ONE_LEVEL = {
    "block_out_channels": [64], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"],
    "transformer_layers_per_block": [1], "attention_head_dim": [2],
}  # fmt: skip


def main() -> None:
    """Sends more requests than there are slots, some without a negative prompt, and compares three of them."""
    pipeline = small_pipeline("tiny_xl", **XL_ONE_LEVEL)
    engine = started(pipeline, num_slots=8)
    prompts = ["a large red circle", "a star BREAK a green square"]
    jobs = [
        engine.submit(request(prompts[k % 2], seed=k, negative_prompt=[None, "", "blur"][k % 3], num_inference_steps=k))
        for k in range(1, 12)
    ]
    images = [job.future.result(120.0) for job in jobs]
    places = [engine.pools[(64, 64)].slots.latents.sharding.num_devices, jax.local_device_count()]
    engine.stop()
    pairs = [(images[k], drawn_alone(pipeline, jobs[k].request)) for k in (1, 4, 10)]
    print(places, max(int(np.abs(image.astype(int) - expected).max()) for image, expected in pairs))


if __name__ == "__main__":
    main()
