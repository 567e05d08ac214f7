"""Inception reads the user's weights, and only the published ones give FID and KID."""

import hashlib
import runpy

import numpy as np
import pytest
import torch
from flax import nnx

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.abstract import abstract_model
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats import safetensors_io
from dmm_jax.evaluation import inception
from dmm_jax.evaluation.convert_weights import convert
from dmm_jax.evaluation.feature_networks import open_feature_network
from dmm_jax.evaluation.published_weights import PublishedFile
from dmm_jax.models.inception_v3 import InceptionV3

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def tensors():
    """Zeros in the network's shapes, except the last layer's shift, which thus becomes the feature."""
    state = nnx.to_pure_dict(nnx.state(abstract_model(lambda rngs: InceptionV3(rngs=rngs)), nnx.Param))
    arrays = {key: np.zeros(shape, np.float32) for key, shape in naming.torch_shapes(state).items()}
    arrays["Mixed_7c.branch1x1.bn.bias"][:] = np.arange(320)
    return arrays


@pytest.fixture
def published(tensors, tmp_path, monkeypatch):
    """The converter's output, with the hash of its input patched in as the published one."""
    pth, out = tmp_path / "weights.pth", tmp_path / "weights.safetensors"
    counts = {"Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(7)}
    torch.save({key: torch.from_numpy(array) for key, array in tensors.items()} | counts, pth)
    sha256 = hashlib.sha256(pth.read_bytes()).hexdigest()
    monkeypatch.setattr(inception, "PUBLISHED", (PublishedFile("weights.pth", sha256),))
    convert([pth], out, inception.PUBLISHED)
    return out


def test_the_published_weights_make_fid(published):
    network = open_feature_network(f"inception:{published}")
    assert (network.distance_name, network.kernel_name) == ("FID", "KID")
    assert network.settings["weights SHA-256"] == hashlib.sha256(published.read_bytes()).hexdigest()
    clean = open_feature_network(f"clean-inception:{published}")
    assert (clean.distance_name, clean.kernel_name) == ("clean-FID", "clean-KID")
    assert "clean-fid" in clean.settings["resize"]


def test_features_keep_their_order_for_any_chunk_size(published, monkeypatch):
    monkeypatch.setattr(inception, "CHUNK_SIZE", 1)
    network = open_feature_network(f"clean-inception:{published}")
    features = network.features(RNG.integers(0, 256, (2, 16, 16, 3)).astype(np.uint8))
    assert features.shape == (2, 2048) and features.dtype == np.float32
    np.testing.assert_array_equal(features[:, :320], np.tile(np.arange(320), (2, 1)))


def test_changed_weights_are_not_fid_despite_their_metadata(published, tensors):
    metadata = safetensors_io.TensorFile(published).metadata
    other = published.with_name("other.safetensors")
    safetensors_io.save(other, tensors | {"fc.bias": np.ones(1008, np.float32)}, metadata)
    sha256 = hashlib.sha256(other.read_bytes()).hexdigest()
    assert (
        open_feature_network(f"inception:{other}").distance_name
        == f"FD (inception, unknown weights SHA-256 {sha256[:10]})"
    )
    assert (
        open_feature_network(f"inception:{other}").kernel_name
        == f"KD (inception, unknown weights SHA-256 {sha256[:10]})"
    )


def test_weights_of_another_file_are_not_fid(published, monkeypatch):
    monkeypatch.undo()
    assert open_feature_network(f"inception:{published}").distance_name.startswith(
        "FD (inception, unknown weights SHA-256 "
    )


def test_no_pickle_is_opened_except_the_published_file(tmp_path, tensors):
    pth = tmp_path / "other.pth"
    torch.save({"fc.bias": torch.zeros(3)}, pth)
    with pytest.raises(CheckpointError, match="only .safetensors files are opened"):
        open_feature_network(f"inception:{pth}")
    with pytest.raises(CheckpointError, match=r"has SHA-256 [0-9a-f]{64}; expected 6726825d0af5f729"):
        convert([pth], tmp_path / "out.safetensors", inception.PUBLISHED)
    assert not (tmp_path / "out.safetensors").exists()


def test_the_converters_errors_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["convert_inception.py", str(tmp_path / "none.pth"), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="1"):
        runpy.run_module("dmm_jax.evaluation.convert_inception", run_name="__main__")
    error = capsys.readouterr().err
    assert error.startswith("convert_inception: error: ") and error.count("\n") == 1


def test_another_networks_weights_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    safetensors_io.save(path, {"fc.bias": np.zeros(1000, np.float32)})
    with pytest.raises(CheckpointError, match=r"(?s)Inception of .*misshapen: fc.bias \(expected \(1008,\)"):
        open_feature_network(f"inception:{path}")


@pytest.mark.parametrize("spec", ["inception", "inception:", "clip:", "vgg:x.safetensors", ""])
def test_unknown_features_are_refused(spec):
    with pytest.raises(ValueError, match="use none, shapes .*inception:PATH, clean-inception:PATH, .*clip:PATH"):
        open_feature_network(spec)
