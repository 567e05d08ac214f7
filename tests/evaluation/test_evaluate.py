"""`evaluate` from a trained workdir to the numbers on disk, and what it streams."""

import functools
import json
import shutil

import numpy as np
import pytest

from dmm_jax import cli
from dmm_jax.checkpoints import safetensors_io
from dmm_jax.demo.recipe import token_numbers
from dmm_jax.demo.words import write_tokenizer
from dmm_jax.evaluation import evaluate as module
from dmm_jax.evaluation import fidelity
from dmm_jax.evaluation.evaluate import measure
from dmm_jax.evaluation.frechet import Statistics, frechet_distance
from dmm_jax.evaluation.kid import kernel_inception_distance
from dmm_jax.evaluation.networks import FeatureNetwork
from dmm_jax.models.lpips_alex import LPIPS
from tests.evaluation.test_clip import write_clip
from tests.models.torch_parity import abstract, draw, state_dict

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (90, 4, 4, 3)).astype(np.uint8)
LATENTS = RNG.normal(size=(90, 1, 1, 4)).astype(np.float32)


def corners(images):
    return images[:, 0, 0].astype(np.float32)


def network(kernel="KD (corners)"):
    empty = functools.partial(Statistics.empty, 3)
    return FeatureNetwork(corners, "FD (corners)", empty, frechet_distance, kernel, {"weights SHA-256": "0123"})


@pytest.mark.parametrize("batch_size", [7, 40, 90])
def test_measuring_in_batches_counts_the_first_pictures_and_keeps_a_few(batch_size):
    batches = ((IMAGES[k : k + batch_size], LATENTS[k : k + batch_size]) for k in range(0, 90, batch_size))
    found = measure(network(), batches, num_images=75)
    assert found.kept.count == 75
    np.testing.assert_allclose(found.kept.covariance, np.cov(corners(IMAGES[:75]).T), rtol=1e-10)
    np.testing.assert_array_equal(found.features.rows, corners(IMAGES[:75]))
    np.testing.assert_array_equal(found.images, IMAGES[: module.NUM_PAIRS])
    np.testing.assert_array_equal(found.latents, LATENTS[: module.NUM_PAIRS])


def test_features_are_held_for_a_kernel_only():
    assert measure(network(kernel=""), iter([(IMAGES, LATENTS)]), 90).features.count == 0


@pytest.mark.parametrize("batch_size", [7, 90])
def test_the_score_is_the_mean_over_the_first_pictures_each_with_its_own_prompt(batch_size):
    batches = ((IMAGES[k : k + batch_size], LATENTS[k : k + batch_size]) for k in range(0, 90, batch_size))
    weights = RNG.uniform(size=90)

    def scorer(images, first):
        return images[:, 0, 0, 0] * weights[first : first + len(images)]

    found = measure(network(), batches, 75, scorer)
    assert found.score == pytest.approx((IMAGES[:75, 0, 0, 0] * weights[:75]).mean())
    assert measure(network(), iter([(IMAGES, LATENTS)]), 75).score is None


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


def test_clip_and_lpips_add_their_measures(workdir, tmp_path):
    write_tokenizer(tmp_path / "clip")
    numbers = token_numbers(tmp_path / "clip")
    write_clip(tmp_path / "clip", max_position_embeddings=77, **numbers)
    safetensors_io.save(tmp_path / "lpips.safetensors", state_dict(draw(abstract(LPIPS))))
    spec = ["--features", f"clip:{tmp_path / 'clip'}", "--clip", str(tmp_path / "clip")]
    spec += ["--lpips", str(tmp_path / "lpips.safetensors")]
    assert cli.main(["evaluate", str(workdir), "--n", "4", *spec]) == 0
    told = json.loads((workdir / "report" / "metrics.json").read_text())
    assert told["command"].endswith(" ".join(["--n 4", *spec]))
    assert told["distance"].startswith("CMMD (unknown weights SHA-256 ") and "kernel" not in told
    assert np.min(told["matrix"]) > 0 and np.min(told["floor"]) > 0 and len(told["base"]) == 2
    scores = told["clip_score"]
    assert scores["name"] == told["distance"].replace("CMMD", "CLIPScore")
    assert all(len(scores[what]) == 2 for what in ("teacher", "teacher_again", "student", "base", "average"))
    assert len(set(scores["base"])) == len(set(scores["average"])) == 1 and scores["teacher"] != scores["teacher_again"]
    measures = [what.split(" SHA-256")[0] for what in told["fidelity"]]
    assert measures[::2] == ["latent MSE", "PSNR (dB)", "LPIPS (alex, unknown weights"]
    assert all(set(values) == set(told["styles"]) for values in told["fidelity"].values())
    assert told["settings"]["CLIPScore's rule"] == "100 max(cos, 0), mean over the pictures"


def test_each_fidelity_has_its_floor_from_other_noise():
    own, same, again = (measure(network(), iter([(IMAGES[k : k + 30], LATENTS[k : k + 30])]), 30) for k in (0, 30, 60))
    found = module.paired_fidelity(own, same, again)
    assert found["latent MSE"] == pytest.approx(np.mean((LATENTS[:30] - LATENTS[30:60]) ** 2), rel=1e-5)
    assert found["latent MSE, floor"] == pytest.approx(np.mean((LATENTS[:30] - LATENTS[60:]) ** 2), rel=1e-5)
    assert found["PSNR (dB), floor"] == pytest.approx(np.median(fidelity.psnr(IMAGES[:30], IMAGES[60:])))


def test_lpips_compares_the_pairs_of_pictures(monkeypatch):
    own, same, again = (measure(network(), iter([(IMAGES[k : k + 30], LATENTS[k : k + 30])]), 30) for k in (0, 30, 60))
    monkeypatch.setattr(module.lpips, "distances", lambda network, a, b: a[:, 0, 0, 0].astype(float) - b[:, 0, 0, 0])
    found = module.paired_fidelity(own, same, again, module.lpips.Lpips(None, {}, "", True))
    for what, first in (("LPIPS (alex)", 30), ("LPIPS (alex), floor", 60)):
        pairs = IMAGES[:30, 0, 0, 0].astype(float) - IMAGES[first : first + 30, 0, 0, 0]
        assert found[what] == pytest.approx(pairs.mean())


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
