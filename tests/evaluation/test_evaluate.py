"""`evaluate` turns a trained workdir into metrics.json and a report, and refuses bad input before any drawing."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from dmm_jax.checkpoints.formats import safetensors_io
from dmm_jax.checkpoints.merge_methods import METHODS
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.evaluation import evaluate as module
from dmm_jax.evaluation.options import Options
from dmm_jax.models.lpips_alex import LPIPS
from dmm_jax.runtime.progress import Progress
from dmm_jax.verbs import main as cli
from dmm_jax.world.shipped_checkpoints import CLASSIFIER, FOLDER
from dmm_jax.world.tokenizer import tokenizer_fields, write_tokenizer
from tests.evaluation.test_clip import write_clip
from tests.evaluation.test_samples import corner_network
from tests.models.torch_parity import abstract, draw, state_dict

FEW = ["--pairs", "2", "--batch-size", "4"]


@pytest.fixture
def workdir(trained, tmp_path, monkeypatch):
    """A copy of the tiny run that draws few pictures at a time."""
    monkeypatch.setattr(module, "NUM_MIXES", 2)
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def progresses(monkeypatch):
    """The Progress objects that evaluations make."""
    made = []
    monkeypatch.setattr(module, "Progress", lambda *arguments: made.append(Progress(*arguments)) or made[-1])
    return made


@pytest.fixture
def no_drawing(monkeypatch):
    """Fails a test that reaches the models."""
    monkeypatch.setattr(module, "ComparedModels", None)


def change(workdir, **changes):
    """Changes sections of a run's config."""
    config = json.loads((workdir / "config.json").read_text())
    for section, values in changes.items():
        config[section] |= values
    (workdir / "config.json").write_text(json.dumps(config))


def read_results(workdir):
    return json.loads((workdir / "report" / "metrics.json").read_text())


@pytest.fixture(scope="module")
def reported(trained, tmp_path_factory):
    """An evaluated run of a user without images: the teachers drew its prompts. The evaluation has its own prompts."""
    copy = shutil.copytree(trained, tmp_path_factory.mktemp("teachers") / "run")
    own, other = copy / "own.txt", copy / "other.txt"
    own.write_text("a large red circle\na small blue square\na large green star\n")
    other.write_text("a small blue square\na small green circle\n")
    change(copy, data={"kind": "prompts", "source": str(own), "num_examples": 0})
    arguments = ["--n", "3", "--prompts", str(other), "--negative-prompt", "a star"]
    assert cli.main(["evaluate", str(copy), *arguments, *FEW]) == 0
    return copy


def test_teacher_made_data_is_evaluated_with_other_prompts(reported):
    results = read_results(reported)
    settings = results["settings"]
    assert results["distance"] == "FD (shapes)" and results["n"] == 3
    assert settings["prompts"] == f"2 of {reported / 'other.txt'}, again and again for 3 pictures"
    assert settings["prompts trained on"] == "1 of 2" and settings["negative prompt"] == "a star"
    arguments = f"--prompts {reported / 'other.txt'} --negative-prompt 'a star' {' '.join(FEW)}"
    assert results["command"] == f"dmm-jax evaluate run --n 3 {arguments}"


def test_the_report_names_the_network_and_its_weights(workdir, monkeypatch, capsys):
    monkeypatch.setattr(module, "open_feature_network", lambda spec: corner_network())
    assert cli.main(["evaluate", str(workdir), "--n", "4", "--features", "inception:weights.safetensors", *FEW]) == 0
    page = capsys.readouterr().out.strip()
    results = read_results(workdir)
    kernel, settings = results["kernel"], results["settings"]
    assert (results["distance"], results["n"], kernel["distance"]) == ("FD (corners)", 4, "KD (corners)")
    assert settings["weights SHA-256"] == "0123" and "dpmpp_2m" in settings.values()
    assert results["command"].endswith(f"--n 4 --features inception:weights.safetensors {' '.join(FEW)}")
    assert settings["prompts trained on"].endswith(" of 4") and settings["negative prompt"] == "none"
    assert set(kernel["student"]) == set(kernel["floor"]) == set(results["styles"])
    text = open(page, encoding="utf-8").read()
    assert "FD (corners)" in text and "KD (corners)" in text


def test_the_fidelity_floor_is_rounding_far_below_other_noise(reported):
    results = read_results(reported)
    values = {measure: np.array(list(by_style.values())) for measure, by_style in results["fidelity"].items()}
    assert (values["latent MSE, floor"] > 0).all()
    assert (30 * values["latent MSE, floor"] < values["latent MSE, other noise"]).all()
    assert (values["PSNR (dB), floor"] > values["PSNR (dB), other noise"] + 10).all()
    assert results["pairs"] == 2
    assert results["settings"]["fidelity's floor"] == "the teacher in bfloat16 against float32"


def test_results_hold_the_digest_of_every_network(reported, tiny):
    results, paths = read_results(reported), tiny[0]
    base, right = open_checkpoint(paths["base"]), open_checkpoint(paths["right"])
    assert results["weights"] == {
        "student": {"unet": open_checkpoint(reported).digest("unet")},
        "base": {name: base.digest(name) for name in ("unet", "text_encoder", "vae")},
        "teacher left": {"unet": open_checkpoint(paths["left"]).digest("unet")},
        "teacher right": {name: right.digest(name) for name in ("unet", "text_encoder")},
    }
    classifier = hashlib.sha256((FOLDER / CLASSIFIER).read_bytes()).hexdigest()
    assert results["settings"]["weights SHA-256"] == classifier
    assert base.digest("vae")[:16] in (reported / "report" / "index.html").read_text()


def test_each_weight_merge_has_its_own_row(workdir, monkeypatch, progresses):
    monkeypatch.setattr(module, "open_feature_network", lambda spec: corner_network(kernel_name=""))
    options = {"num_pairs": 2, "batch_size": 4, "weight_merges": ("average", "ties")}
    evaluation = module.evaluate(workdir, Options(4, "inception:weights.safetensors", **options))
    results = evaluation.results
    assert results["weight_merges"] == ["average", "ties"] and results["settings"]["ties"] == "scale 1, density 0.2"
    assert len({tuple(results[model]) for model in ("average", "ties", "base")}) == 3
    assert '<th scope="row">TIES' in evaluation.page.read_text(encoding="utf-8")
    assert read_results(workdir) == json.loads(json.dumps(results))
    assert progresses[0].done == progresses[0].total  # Every picture was announced.


def test_clip_and_lpips_add_their_measures(workdir, tmp_path):
    write_tokenizer(tmp_path / "clip")
    write_clip(tmp_path / "clip", max_position_embeddings=77, **tokenizer_fields(tmp_path / "clip"))
    safetensors_io.save(tmp_path / "lpips.safetensors", state_dict(draw(abstract(LPIPS))))
    options = ["--features", f"clip:{tmp_path / 'clip'}", "--clip", str(tmp_path / "clip")]
    options += ["--lpips", str(tmp_path / "lpips.safetensors"), *FEW]
    assert cli.main(["evaluate", str(workdir), "--n", "4", *options]) == 0
    results = read_results(workdir)
    assert results["command"].endswith(" ".join(["--n 4", *options]))
    assert results["distance"].startswith("MMD (unknown weights SHA-256 ") and "kernel" not in results
    assert np.min(results["matrix"]) > 0 and np.min(results["floor"]) > 0 and len(results["base"]) == 2
    scores = results["clip_score"]
    assert scores["name"] == results["distance"].replace("MMD", "CLIPScore")
    assert all(len(scores[model]) == 2 for model in ("teacher", "teacher_again", "student", "base", "average"))
    assert len(set(scores["base"])) == len(set(scores["average"])) == 1 and scores["teacher"] != scores["teacher_again"]
    measures = [measure.split(" SHA-256")[0] for measure in results["fidelity"]]
    assert measures[::3] == ["latent MSE", "PSNR (dB)", "LPIPS (alex, unknown weights"]
    assert all(set(values) == set(results["styles"]) for values in results["fidelity"].values())
    assert results["settings"]["CLIPScore's rule"] == "100 max(cos, 0), mean over the pictures"


@pytest.mark.parametrize("count", ["-3", "1"])
def test_too_few_pictures_for_a_distance_are_refused(workdir, count, no_drawing, capsys):
    assert cli.main(["evaluate", str(workdir), "--n", count]) == 1
    assert f"--n must be a whole number of at least 2; got {count}." in capsys.readouterr().err


@pytest.mark.parametrize(
    "damaged, message",
    [
        (b'{"step": 1}\ngarbage\n{"step": 2}\n', "line 2 .* JSON"),
        (b'{"step": 1}\n{"loss": 3}\n', "line 2: expected an object with a step"),
        (b"\xff\xfe", "is not UTF-8 text"),
    ],
)
def test_damaged_training_metrics_are_refused(workdir, damaged, message, no_drawing):
    (workdir / "metrics.jsonl").write_bytes(damaged)
    with pytest.raises(ValueError, match=message):
        module.evaluate(workdir)


def test_a_report_folder_that_cannot_be_written_is_refused(workdir, no_drawing, monkeypatch):
    shutil.rmtree(workdir / "report")
    (workdir / "report").write_text("")
    with pytest.raises(ValueError, match="report is a file"):
        module.evaluate(workdir)
    (workdir / "report").unlink()
    monkeypatch.setattr(module.os, "access", lambda path, mode: path != workdir)  # Root may write everywhere.
    with pytest.raises(ValueError, match="no permission in .*run. Make it writable"):
        module.evaluate(workdir)


def test_the_embedded_worlds_distance_is_refused_for_other_worlds(workdir, no_drawing, monkeypatch):
    monkeypatch.setattr(module, "draws_shapes_world", lambda base: False)
    change(workdir, data={"kind": "images", "source": "pictures"})
    with pytest.raises(ValueError, match="FD .shapes. is a distance of the embedded world's pictures"):
        module.evaluate(workdir, Options(features="shapes"))
    with pytest.raises(ValueError, match="CLIPScore is measured on the pictures of --features"):
        module.evaluate(workdir, Options(clip_folder="clip"))


def test_pairs_of_pictures_are_compared_without_any_network(reported, workdir, monkeypatch, progresses, capsys):
    (workdir / "samples" / "gallery").mkdir(parents=True)
    (workdir / "samples" / "gallery" / "index.html").write_text("")
    monkeypatch.setattr(module, "draws_shapes_world", lambda base: False)
    prompts = reported / "other.txt"
    change(workdir, data={"kind": "images", "source": "pictures"})
    arguments = ["--prompts", str(prompts), "--negative-prompt", "a star"]
    assert cli.main(["evaluate", str(workdir), *arguments, *FEW]) == 0
    assert progresses[0].done == progresses[0].total
    assert f"Drawing {progresses[0].total} images with 3 models\n" in capsys.readouterr().err
    results = read_results(workdir)
    assert "matrix" not in results and results["fidelity"] == read_results(reported)["fidelity"]
    assert results["command"] == f"dmm-jax evaluate run --prompts {prompts} --negative-prompt 'a star' {' '.join(FEW)}"
    page = (workdir / "report" / "index.html").read_text()
    assert "Paired fidelity" in page and "pair_00_00.png" in page and "FD" not in page
    assert '<a href="../samples/gallery/index.html">gallery gallery</a>' in page


@pytest.mark.parametrize("count, is_many", [(2000, True), (200, False)])
def test_a_cpu_is_advised_to_draw_fewer_pictures(count, is_many, capsys):
    total = module.num_drawn(Options(count), 3, has_network=True)
    assert total == 3 * (3 * count + 2 * 32) + 2 * count + module.NUM_MIXES
    module._say_amount(total, 6, has_network=True)
    amount, *advice = capsys.readouterr().err.splitlines()
    assert amount == f"Drawing {total:,d} images with 6 models" and bool(advice) == is_many


@pytest.mark.parametrize("merges", [(), ("ties",), ("average", "soup"), ("average", "average")])
def test_weight_merges_are_the_average_and_others_that_there_are(merges):
    with pytest.raises(ValueError, match="must hold average, and each of average, task_arithmetic, ties, dare"):
        Options(weight_merges=merges)
    assert Options(weight_merges=tuple(METHODS)).command("run").endswith("--merges average,task_arithmetic,ties,dare")
