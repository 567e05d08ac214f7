"""`evaluate` from a trained workdir to the numbers on disk, and what it streams."""

import dataclasses
import functools
import hashlib
import json
import shutil

import numpy as np
import pytest

from dmm_jax.checkpoints.formats import safetensors_io
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.evaluation import evaluate as module
from dmm_jax.evaluation import fidelity
from dmm_jax.evaluation.evaluate import measure
from dmm_jax.evaluation.frechet import Statistics, frechet_distance
from dmm_jax.evaluation.kid import kernel_inception_distance
from dmm_jax.evaluation.networks import FeatureNetwork, of_shapes_world
from dmm_jax.models.lpips_alex import LPIPS
from dmm_jax.verbs import main as cli
from dmm_jax.world.shipped_checkpoints import CLASSIFIER, FOLDER
from dmm_jax.world.tokenizer import tokenizer_fields, write_tokenizer
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
    found = measure(network(), batches, num_images=75, num_kept=32)
    assert found.kept.count == 75
    np.testing.assert_allclose(found.kept.covariance, np.cov(corners(IMAGES[:75]).T), rtol=1e-10)
    np.testing.assert_array_equal(found.features.rows, corners(IMAGES[:75]))
    np.testing.assert_array_equal(found.drawn.images, IMAGES[:32])
    np.testing.assert_array_equal(found.drawn.latents, LATENTS[:32])


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
    monkeypatch.setattr(module, "NUM_MIXES", 2)
    copy = shutil.copytree(trained, tmp_path / "run")
    change(copy, evaluation={"batch_size": 4, "num_pairs": 2})
    return copy


def change(workdir, **changes):
    """Changes a run's config, one part of it by name."""
    config = json.loads((workdir / "config.json").read_text())
    for part, values in changes.items():
        config[part] |= values
    (workdir / "config.json").write_text(json.dumps(config))


def told_by(workdir):
    return json.loads((workdir / "report" / "metrics.json").read_text())


@pytest.fixture(scope="module")
def reported(trained, tmp_path_factory):
    """A run as users have it who have no image: its prompts, of which two are new, were drawn by the teachers."""
    copy = shutil.copytree(trained, tmp_path_factory.mktemp("teachers") / "run")
    own, other = copy / "own.txt", copy / "other.txt"
    own.write_text("a large red circle\na small blue square\na large green star\n")
    other.write_text("a small blue square\na small green circle\n")
    change(copy, data={"source": "teachers", "prompts": str(own), "num_examples": 0})
    change(copy, evaluation={"batch_size": 4, "num_pairs": 2})
    assert cli.main(["evaluate", str(copy), "--n", "3", "--prompts", str(other), "--negative-prompt", "a star"]) == 0
    return copy


def test_teacher_made_data_can_be_evaluated_with_prompts_of_ones_own(reported):
    told = told_by(reported)
    assert told["distance"] == "FD (shapes)" and told["n"] == 3
    assert told["settings"]["prompts"] == f"2 of {reported / 'other.txt'}, again and again for 3 pictures"
    assert told["settings"]["prompts trained on"] == "1 of 2" and told["settings"]["negative prompt"] == "a star"
    assert told["command"].endswith(f"--prompts {reported / 'other.txt'} --negative-prompt 'a star'")


def test_prompts_seeds_and_negative_prompt_reach_the_sampler(monkeypatch):
    options, seen = module.config_lib.get_config().evaluation, []
    options.negative_prompt, options.num_pairs = "blurred", 2
    drawing = module.Drawing(network(), None, ["one", "two", "three"], options)
    monkeypatch.setattr(module, "draw", lambda *given, **named: seen.append((given, named)) or iter(()))
    drawing.batches(object.__new__(module.Pipeline), drawing._jobs("ink", 7, drawing.num_pairs))
    ((_, jobs, size), named) = seen[0]
    assert (jobs, size) == ([("one", "ink", 7), ("two", "ink", 8)], 50)
    assert named["negative_prompts"] == "blurred" and named["num_inference_steps"] == 25


def test_the_report_names_the_network_and_its_weights(workdir, monkeypatch, capsys):
    monkeypatch.setattr(module, "open_network", lambda spec: network())
    assert cli.main(["evaluate", str(workdir), "--n", "4", "--features", "inception:weights.safetensors"]) == 0
    page = capsys.readouterr().out.strip()
    told = told_by(workdir)
    assert (told["distance"], told["n"], told["kernel"]["distance"]) == ("FD (corners)", 4, "KD (corners)")
    assert told["settings"]["weights SHA-256"] == "0123" and "dpmpp_2m" in told["settings"].values()
    assert told["command"].endswith("--n 4 --features inception:weights.safetensors")
    assert told["settings"]["prompts trained on"].endswith(" of 4") and told["settings"]["negative prompt"] == "none"
    assert set(told["kernel"]["student"]) == set(told["kernel"]["floor"]) == set(told["styles"])
    text = open(page, encoding="utf-8").read()
    assert "FD (corners)" in text and "KD (corners)" in text


def test_the_floor_is_the_teachers_own_rounding_and_lies_far_below_other_noise(reported):
    told = told_by(reported)
    values = {what: np.array(list(one.values())) for what, one in told["fidelity"].items()}
    assert (values["latent MSE, floor"] > 0).all()
    assert (30 * values["latent MSE, floor"] < values["latent MSE, other noise"]).all()
    assert (values["PSNR (dB), floor"] > values["PSNR (dB), other noise"] + 10).all()
    assert told["pairs"] == 2 and told["settings"]["fidelity's floor"] == "the teacher in bfloat16 against float32"


def test_the_weights_of_every_network_that_draws_or_measures_are_told(reported, tiny):
    told, paths = told_by(reported), tiny[0]
    base, right = open_checkpoint(paths["base"]), open_checkpoint(paths["right"])
    assert told["weights"] == {
        "student": {"unet": open_checkpoint(reported).digest("unet")},
        "base": {name: base.digest(name) for name in ("unet", "text_encoder", "vae")},
        "teacher left": {"unet": open_checkpoint(paths["left"]).digest("unet")},
        "teacher right": {name: right.digest(name) for name in ("unet", "text_encoder")},
    }
    classifier = hashlib.sha256((FOLDER / CLASSIFIER).read_bytes()).hexdigest()
    assert told["settings"]["weights SHA-256"] == classifier
    assert base.digest("vae")[:16] in (reported / "report" / "index.html").read_text()


def test_each_weight_merge_is_a_row_of_its_own(workdir, monkeypatch):
    change(workdir, evaluation={"weight_merges": ["average", "ties"]})
    monkeypatch.setattr(module, "open_network", lambda spec: network(kernel=""))
    page = module.evaluate(workdir, 4, "inception:weights.safetensors")
    told = told_by(workdir)
    assert told["weight_merges"] == ["average", "ties"] and told["settings"]["ties"] == "scale 1, density 0.2"
    assert len({tuple(told[what]) for what in ("average", "ties", "base")}) == 3
    assert '<th scope="row">TIES' in page.read_text(encoding="utf-8")


def test_clip_and_lpips_add_their_measures(workdir, tmp_path):
    write_tokenizer(tmp_path / "clip")
    numbers = tokenizer_fields(tmp_path / "clip")
    write_clip(tmp_path / "clip", max_position_embeddings=77, **numbers)
    safetensors_io.save(tmp_path / "lpips.safetensors", state_dict(draw(abstract(LPIPS))))
    spec = ["--features", f"clip:{tmp_path / 'clip'}", "--clip", str(tmp_path / "clip")]
    spec += ["--lpips", str(tmp_path / "lpips.safetensors")]
    assert cli.main(["evaluate", str(workdir), "--n", "4", *spec]) == 0
    told = told_by(workdir)
    assert told["command"].endswith(" ".join(["--n 4", *spec]))
    assert told["distance"].startswith("MMD (unknown weights SHA-256 ") and "kernel" not in told
    assert np.min(told["matrix"]) > 0 and np.min(told["floor"]) > 0 and len(told["base"]) == 2
    scores = told["clip_score"]
    assert scores["name"] == told["distance"].replace("MMD", "CLIPScore")
    assert all(len(scores[what]) == 2 for what in ("teacher", "teacher_again", "student", "base", "average"))
    assert len(set(scores["base"])) == len(set(scores["average"])) == 1 and scores["teacher"] != scores["teacher_again"]
    measures = [what.split(" SHA-256")[0] for what in told["fidelity"]]
    assert measures[::3] == ["latent MSE", "PSNR (dB)", "LPIPS (alex, unknown weights"]
    assert all(set(values) == set(told["styles"]) for values in told["fidelity"].values())
    assert told["settings"]["CLIPScore's rule"] == "100 max(cos, 0), mean over the pictures"


def pairs(first):
    return module.Drawn(IMAGES[first : first + 20], LATENTS[first : first + 20])


def test_each_fidelity_stands_between_its_floor_and_other_noise():
    found = module.paired_fidelity(pairs(0), pairs(20), pairs(40), pairs(60))
    for what, first in (("", 20), (", floor", 40), (", other noise", 60)):
        squares = np.mean((LATENTS[:20] - LATENTS[first : first + 20]) ** 2)
        assert found[f"latent MSE{what}"] == pytest.approx(squares, rel=1e-5)
        ratios = fidelity.psnr(IMAGES[:20], IMAGES[first : first + 20])
        assert found[f"PSNR (dB){what}"] == pytest.approx(np.median(ratios))


def test_lpips_compares_the_pairs_of_pictures(monkeypatch):
    monkeypatch.setattr(module.lpips, "distances", lambda network, a, b: a[:, 0, 0, 0].astype(float) - b[:, 0, 0, 0])
    found = module.paired_fidelity(*map(pairs, (0, 20, 40, 60)), module.lpips.Lpips(None, {}, "", True))
    for what, first in (("LPIPS (alex)", 20), ("LPIPS (alex), floor", 40), ("LPIPS (alex), other noise", 60)):
        difference = IMAGES[:20, 0, 0, 0].astype(float) - IMAGES[first : first + 20, 0, 0, 0]
        assert found[what] == pytest.approx(difference.mean())


def test_the_kernels_subsets_are_as_large_as_there_are_pictures():
    one, other = (measure(network(), iter([(part, LATENTS)]), 40) for part in (IMAGES[:40], IMAGES[40:80]))
    expected = kernel_inception_distance(corners(IMAGES[:40]), corners(IMAGES[40:80]), subset_size=40)
    assert module.kernel_distance(one, other) == expected._asdict()


@pytest.mark.parametrize("count", ["-3", "1"])
def test_a_number_that_gives_no_distance_is_refused_at_once(workdir, count, monkeypatch, capsys):
    monkeypatch.setattr(module, "Models", None)
    assert cli.main(["evaluate", str(workdir), "--n", count]) == 1
    assert f"evaluation.num_images must be at least 2; got {count}." in capsys.readouterr().err


@pytest.mark.parametrize(
    "damaged, said",
    [
        ('{"step": 1}\ngarbage\n{"step": 2}\n', "line 2 is no JSON"),
        ('{"step": 1}\n{"loss": 3}\n', "line 2: expected an object with a step"),
        (b"\xff\xfe", "is no text"),
    ],
)
def test_damaged_metrics_are_told_before_anything_is_drawn(workdir, damaged, said, monkeypatch):
    monkeypatch.setattr(module, "Models", None)
    (workdir / "metrics.jsonl").write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    with pytest.raises(ValueError, match=said):
        module.evaluate(workdir)


def test_a_report_that_cannot_be_written_is_told_before_anything_is_drawn(workdir, monkeypatch):
    monkeypatch.setattr(module, "Models", None)
    (workdir / "report").write_text("")
    with pytest.raises(ValueError, match="report is a file"):
        module.evaluate(workdir)
    (workdir / "report").unlink()
    monkeypatch.setattr(module.os, "access", lambda path, mode: path != workdir)  # Root may write everywhere.
    with pytest.raises(ValueError, match="no permission in .*run. Make it writable"):
        module.evaluate(workdir)


def test_the_embedded_worlds_distance_is_refused_for_other_worlds(workdir, monkeypatch):
    monkeypatch.setattr(module, "Models", None)
    monkeypatch.setattr(module, "of_shapes_world", lambda base: False)
    change(workdir, data={"source": "pictures"})
    with pytest.raises(ValueError, match="FD .shapes. is a distance of the embedded world's pictures"):
        module.evaluate(workdir)


def test_a_base_with_another_tokenizer_is_of_no_embedded_world(tiny, tmp_path):
    write_tokenizer(tmp_path, pad_token="!")
    base = open_checkpoint(tiny[0]["base"])
    assert of_shapes_world(base)
    assert not of_shapes_world(dataclasses.replace(base, tokenizer_folder=tmp_path))
