"""`python -m dmm_jax.evaluation.convert_inception PTH OUT`: the published Inception of FID as a safetensors file."""

import sys

from dmm_jax.evaluation import convert_weights, inception

if __name__ == "__main__":
    sys.exit(convert_weights.main(__doc__, {"PTH": inception.PUBLISHED[0]}))
