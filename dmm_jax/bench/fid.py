"""`dmm-jax bench fid`: the FID of two sets of pictures, from pixels in memory to the distance."""

import time

import jax
import numpy as np
from flax import nnx

from dmm_jax.bench import networks as bench_networks
from dmm_jax.checkpoints.abstract import abstract_model
from dmm_jax.evaluation import feature_networks
from dmm_jax.evaluation.published_weights import Weights
from dmm_jax.evaluation.samples import measure as features_of
from dmm_jax.models.inception_v3 import InceptionV3
from dmm_jax.runtime import sharding

NUM_PICTURES, PICTURE_SIZE = 5000, 512  # Each of the two sets.
BATCH_SIZE = 500


def measure(num_pictures: int = NUM_PICTURES, side: int = PICTURE_SIZE) -> dict:
    """Times the features of both sets and their distance, compilation included."""
    graph, state = nnx.split(abstract_model(lambda rngs: InceptionV3(rngs=rngs)), nnx.Param)
    params = bench_networks.random_params(nnx.to_pure_dict(state), sharding.make_mesh(data=jax.device_count()))
    network = feature_networks.from_inception(Weights(graph, params, "random", published=False), "inception")
    noise = np.random.default_rng(0).integers(0, 256, (BATCH_SIZE, side, side, 3), np.uint8)

    def pictures(first):
        return ((noise ^ np.uint8(first + k), noise[:, :1]) for k in range(-(-num_pictures // BATCH_SIZE)))

    started = time.perf_counter()
    samples = [features_of(network, pictures(first), num_pictures) for first in (0, 128)]
    finished = time.perf_counter()
    network.distance(*(sample.summary for sample in samples))
    parts = {"features_s": finished - started, "distance_s": time.perf_counter() - finished}
    seconds = sum(parts.values())
    about = {"job": f"FID of 2 x {num_pictures} pictures of {side} px", "device": jax.devices()[0].device_kind}
    return about | {"step_s": seconds, "images_per_s": 2 * num_pictures / seconds, "batch": num_pictures} | parts
