"""LPIPS reads the user's weights, and only the published ones have its plain name."""

import hashlib
import runpy

import jax.numpy as jnp
import numpy as np
import pytest

from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats import safetensors_io
from dmm_jax.evaluation import lpips
from dmm_jax.evaluation.convert_weights import convert
from dmm_jax.evaluation.published_weights import PublishedFile
from dmm_jax.models.lpips_alex import LPIPS
from tests.models.torch_parity import abstract, draw, state_dict

torch = pytest.importorskip("torch")

RNG = np.random.default_rng(0)
A, B = RNG.integers(0, 256, (2, 5, 33, 40, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def model():
    return draw(abstract(LPIPS))


@pytest.fixture
def pickles(model, tmp_path):
    """Files in the published form, AlexNet with its classifier, and a description of each."""
    tensors = {key: torch.from_numpy(array) for key, array in state_dict(model).items()}
    linear = {key: tensors.pop(key) for key in list(tensors) if key.startswith("lin")}
    paths = tmp_path / "alexnet.pth", tmp_path / "alex.pth"
    torch.save(tensors | {"classifier.1.weight": torch.zeros(4, 4)}, paths[0])
    torch.save(linear, paths[1])
    return paths, tuple(PublishedFile(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in paths)


@pytest.fixture
def published(pickles, tmp_path, monkeypatch):
    """The converter's output, with the hashes of its input patched in as the published ones."""
    monkeypatch.setattr(lpips, "PUBLISHED", pickles[1])
    convert(pickles[0], tmp_path / "lpips.safetensors", pickles[1], lpips.OMITTED)
    return tmp_path / "lpips.safetensors"


def test_the_converted_file_measures_as_the_network_does(published, model, monkeypatch):
    network = lpips.load(published)
    assert lpips.distance_name(network) == "LPIPS (alex)"
    assert lpips.settings(network)["LPIPS's weights SHA-256"] == hashlib.sha256(published.read_bytes()).hexdigest()
    expected = model(*(jnp.asarray(images) / 127.5 - 1.0 for images in (A, B)))
    monkeypatch.setattr(lpips, "CHUNK_SIZE", 3)
    np.testing.assert_allclose(lpips.distances(network, A, B), expected, rtol=1e-4)
    np.testing.assert_allclose(lpips.distances(network, A, A), np.zeros(5), atol=1e-12)


def test_changed_weights_lose_the_name_despite_their_metadata(published):
    file = safetensors_io.TensorFile(published)
    tensors = {key: np.array(array) for key, array in file.items()}
    tensors["lin0.model.1.weight"][0, 0] += 1.0
    other = published.with_name("other.safetensors")
    safetensors_io.save(other, tensors, file.metadata)
    sha256 = hashlib.sha256(other.read_bytes()).hexdigest()
    assert lpips.distance_name(lpips.load(other)) == f"LPIPS (alex, unknown weights SHA-256 {sha256[:10]})"


def test_weights_of_other_files_do_not_have_the_name(published, monkeypatch):
    monkeypatch.undo()
    assert lpips.distance_name(lpips.load(published)).startswith("LPIPS (alex, unknown weights SHA-256 ")


def test_no_pickle_is_opened_except_the_published_ones(pickles, tmp_path):
    (alexnet, linear), files = pickles
    with pytest.raises(CheckpointError, match="only .safetensors files are opened"):
        lpips.load(alexnet)
    with pytest.raises(CheckpointError, match=r"SHA-256 [0-9a-f]{64}; expected 7be5be791159472b.*torchvision"):
        convert((alexnet, linear), tmp_path / "out.safetensors", lpips.PUBLISHED)
    with pytest.raises(CheckpointError, match=r"expected df73285e35b22355.*lpips 0.1.4"):
        convert((alexnet, linear), tmp_path / "out.safetensors", (files[0], lpips.PUBLISHED[1]))
    assert not (tmp_path / "out.safetensors").exists()


def test_the_converters_errors_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["convert_lpips.py", *(str(tmp_path / name) for name in ("none", "none", "out"))])
    with pytest.raises(SystemExit, match="1"):
        runpy.run_module("dmm_jax.evaluation.convert_lpips", run_name="__main__")
    error = capsys.readouterr().err
    assert error.startswith("convert_lpips: error: ") and error.count("\n") == 1


def test_another_networks_weights_are_refused(tmp_path):
    safetensors_io.save(tmp_path / "other.safetensors", {"features.0.weight": np.zeros((64, 3, 3, 3), np.float32)})
    with pytest.raises(CheckpointError, match=r"(?s)LPIPS of .*misshapen: features.0.weight \(expected \(64, 3, 11"):
        lpips.load(tmp_path / "other.safetensors")
