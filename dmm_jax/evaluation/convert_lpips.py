"""`python -m dmm_jax.evaluation.convert_lpips ALEXNET LINEAR OUT`: the published LPIPS as one safetensors file."""

import sys

from dmm_jax.evaluation import convert_weights, lpips

if __name__ == "__main__":
    files = dict(zip(("ALEXNET", "LINEAR"), lpips.PUBLISHED, strict=True))
    sys.exit(convert_weights.main(__doc__, files, lpips.OMITTED))
