"""Writes published.npz, the results of torch-fidelity 0.4.0 and clean-fid 0.1.35, for test_published.py.

    pip install torch torchvision torch-fidelity==0.4.0 clean-fid==0.1.35
    python -m tests.evaluation.make_fixture

Weights, pictures and features follow from seeds, so the file holds results alone, and the tests need neither package.
The weights are random: the published ones may not be passed on, and would prove no more.
"""

import hashlib
import pathlib
import tempfile

import numpy as np
from flax import nnx

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.abstract import abstract_model
from dmm_jax.models.inception_v3 import IMAGE_SIZE, InceptionV3

FILE = pathlib.Path(__file__).with_name("published.npz")
VERSIONS = {"torch-fidelity": "0.4.0", "clean-fid": "0.1.35"}
SIZES = ((64, 64), (512, 512), (768, 512), (299, 299), (300, 100))  # Height and width, before resizing to 299.
SHOWN = slice(None, None, 23)  # The rows and columns of clean-fid's pictures in the file.
KID = {"kid_subsets": 10, "kid_subset_size": 50}


def weights() -> dict[str, np.ndarray]:
    """Returns Inception's tensors by PyTorch's keys; no channel dies, and every batch norm has an effect."""
    state = nnx.to_pure_dict(nnx.state(abstract_model(lambda rngs: InceptionV3(rngs=rngs)), nnx.Param))
    shapes, rng, tensors = naming.torch_shapes(state), np.random.default_rng(0), {}
    for key in sorted(shapes):
        shape = shapes[key]
        if key.endswith(("running_var", "bn.weight")):
            tensors[key] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        else:
            scale = (2 / np.prod(shape[1:])) ** 0.5 if len(shape) == 4 else 0.1
            tensors[key] = (scale * rng.standard_normal(shape)).astype(np.float32)
    return tensors


def pictures(count: int, height: int, width: int) -> np.ndarray:
    """Returns pictures uint8 (count, height, width, 3)."""
    return np.random.default_rng(1).integers(0, 256, (count, height, width, 3)).astype(np.uint8)


def features(width: int, count: int, seed: int) -> np.ndarray:
    """Returns correlated features float32 (count, width) with different means and variances."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((count, width)) @ rng.standard_normal((width, width)) / width**0.5
    return (mixed + rng.uniform(0.0, 1.0, width)).astype(np.float32)


def digest(images: np.ndarray) -> str:
    """Returns a hash of all bits of float32 values."""
    return hashlib.sha256(np.ascontiguousarray(images, np.float32).tobytes()).hexdigest()


def sets() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns pairs of sets of features: more pictures than features, and fewer."""
    return {name: (features(256, n, 2), features(256, n + 20, 3)) for name, n in (("many", 400), ("few", 100))}


def _answers() -> dict[str, np.ndarray]:
    import torch
    from cleanfid.resize import build_resizer
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as resize
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    def channels_first(images):
        return torch.from_numpy(images).movedim(-1, 1)

    answers: dict[str, object] = dict(VERSIONS)
    for height, width in SIZES:
        images = pictures(1, height, width)
        resized = resize(channels_first(images).float(), size=(IMAGE_SIZE,) * 2, align_corners=False)
        answers[f"tf1 {height} {width}"] = digest(resized.movedim(1, -1).numpy())
        answers[f"clean {height} {width}"] = build_resizer("clean")(images[0])[SHOWN, SHOWN]
    state = {key: torch.from_numpy(array) for key, array in weights().items()}
    counts = {key.replace("running_mean", "num_batches_tracked") for key in state if key.endswith("running_mean")}
    with tempfile.NamedTemporaryFile(suffix=".pth") as file, torch.no_grad():
        torch.save(state | dict.fromkeys(counts, torch.tensor(0)), file.name)
        extractor = FeatureExtractorInceptionV3("", ["2048"], feature_extractor_weights_path=file.name).eval()
        answers["features"] = extractor(channels_first(pictures(2, 64, 80)))[0].numpy()
    for name, pair in sets().items():
        tensors = [torch.from_numpy(features) for features in pair]
        statistics = list(map(fid_features_to_statistics, tensors))
        answers[f"fid {name}"] = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
        polynomial = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_coef0": 1.0}
        options = KID | polynomial | {"kid_kernel_poly_gamma": None, "rng_seed": 2020, "verbose": False}
        kid = kid_features_to_metric(*tensors, **options)
        answers[f"kid {name}"] = [kid[KEY_METRIC_KID_MEAN], kid[KEY_METRIC_KID_STD]]
    return {name: np.asarray(value) for name, value in answers.items()}


if __name__ == "__main__":
    np.savez_compressed(FILE, **_answers())
    print(f"{FILE}: {FILE.stat().st_size} bytes")
