"""`evaluate` from a trained workdir to the numbers on disk, and what it streams."""

import json
import shutil

import numpy as np
import pytest

from dmm_jax import cli
from dmm_jax.evaluation import evaluate as module
from dmm_jax.evaluation.evaluate import measure
from dmm_jax.evaluation.kid import kernel_inception_distance
from dmm_jax.evaluation.networks import FeatureNetwork

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (90, 4, 4, 3)).astype(np.uint8)
LATENTS = RNG.normal(size=(90, 1, 1, 4)).astype(np.float32)


def corners(images):
    return images[:, 0, 0].astype(np.float32)


def network(kernel="KD (corners)"):
    return FeatureNetwork(corners, 3, "FD (corners)", kernel, {"weights SHA-256": "0123"})


@pytest.mark.parametrize("batch_size", [7, 40, 90])
def test_measuring_in_batches_counts_the_first_pictures_and_keeps_a_few(batch_size):
    batches = ((IMAGES[k : k + batch_size], LATENTS[k : k + batch_size]) for k in range(0, 90, batch_size))
    found = measure(network(), batches, num_images=75)
    assert found.statistics.count == 75
    np.testing.assert_allclose(found.statistics.covariance, np.cov(corners(IMAGES[:75]).T), rtol=1e-10)
    np.testing.assert_array_equal(np.concatenate(found.features), corners(IMAGES[:75]))
    np.testing.assert_array_equal(found.images, IMAGES[: module.NUM_PAIRS])
    np.testing.assert_array_equal(found.latents, LATENTS[: module.NUM_PAIRS])


def test_features_are_held_for_a_kernel_only():
    assert measure(network(kernel=""), iter([(IMAGES, LATENTS)]), 90).features == []


@pytest.fixture
def workdir(trained, tmp_path, monkeypatch):
    """A copy of the tiny run in which little is drawn at a time."""
    for name in ("NUM_PAIRS", "NUM_SHOWN", "NUM_MIXES"):
        monkeypatch.setattr(module, name, 2)
    copy = shutil.copytree(trained, tmp_path / "run")
    config = json.loads((copy / "config.json").read_text())
    config["evaluation"]["batch_size"] = 4
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_the_report_names_the_network_and_its_weights(workdir, monkeypatch, capsys):
    monkeypatch.setattr(module, "open_network", lambda spec: network())
    assert cli.main(["evaluate", str(workdir), "--n", "4", "--features", "inception:weights.safetensors"]) == 0
    page = capsys.readouterr().out.strip()
    told = json.loads((workdir / "report" / "metrics.json").read_text())
    assert (told["distance"], told["n"], told["kernel"]["distance"]) == ("FD (corners)", 4, "KD (corners)")
    assert told["settings"]["weights SHA-256"] == "0123" and "dpmpp_2m" in told["settings"].values()
    assert told["command"].endswith("--n 4 --features inception:weights.safetensors")
    assert set(told["kernel"]["student"]) == set(told["kernel"]["floor"]) == set(told["styles"])
    text = open(page, encoding="utf-8").read()
    assert "FD (corners)" in text and "KD (corners)" in text


def test_each_weight_merge_is_a_row_of_its_own(workdir, monkeypatch):
    config = json.loads((workdir / "config.json").read_text())
    config["evaluation"]["weight_merges"] = ["average", "ties"]
    (workdir / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(module, "open_network", lambda spec: network(kernel=""))
    page = module.evaluate(workdir, 4, "inception:weights.safetensors")
    told = json.loads((workdir / "report" / "metrics.json").read_text())
    assert told["weight_merges"] == ["average", "ties"] and told["settings"]["ties"] == "scale 1, density 0.2"
    assert len({tuple(told[what]) for what in ("average", "ties", "base")}) == 3
    assert '<th scope="row">TIES' in page.read_text(encoding="utf-8")


def test_the_kernels_subsets_are_as_large_as_there_are_pictures():
    one, other = (measure(network(), iter([(part, LATENTS)]), 40) for part in (IMAGES[:40], IMAGES[40:80]))
    expected = kernel_inception_distance(corners(IMAGES[:40]), corners(IMAGES[40:80]), subset_size=40)
    assert module.kernel_distance(one, other) == expected._asdict()


def test_a_folders_captions_are_drawn_without_repetition_until_they_are_used_up(tmp_path):
    lines = [json.dumps({"file": f"{k}.png", "caption": f"caption {k}"}) for k in range(5)]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    for k in range(5):
        (tmp_path / f"{k}.png").write_bytes(b"")
    config = module.config_lib.get_config()
    config.data.source = str(tmp_path)
    prompts, told = module._prompts(config, 12)
    assert sorted(prompts[:5]) == [f"caption {k}" for k in range(5)] and prompts[5:10] == prompts[:5]
    assert len(prompts) == 12 and told.startswith("5 captions of")
