"""`dmm-jax export`: what it refuses, and that an export that fails leaves nothing."""

import json
import os

import huggingface_hub
import numpy as np
import pytest
import yaml
from PIL import Image

from dmm_jax.checkpoints.formats import safetensors_io
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile
from dmm_jax.gallery.png import save_png
from dmm_jax.verbs import main as cli
from tests.gallery.pictures import parameters, pictures


def test_a_non_empty_output_folder_is_refused(failing, trained, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    error = failing("export", trained, tmp_path, "--format", "dmm")
    assert "not empty" in error and [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_stock_format_needs_a_known_style(failing, trained, tmp_path):
    arguments = ["export", trained, tmp_path / "o", "--format"]
    assert "give --style" in failing(*arguments, "diffusers")
    assert "did you mean 'left'" in failing(*arguments, "diffusers", "--style", "lift")
    assert not (tmp_path / "o").exists()


def test_an_unknown_format_is_refused_with_the_known_ones(failing, trained, tmp_path):
    assert "no format onnx. There are: dmm" in failing("export", trained, tmp_path / "o", "--format", "onnx")
    assert "did you mean single-file?" in failing("export", trained, tmp_path / "o", "--format", "dmm,single_file")
    assert not (tmp_path / "o").exists()


def test_formats_that_must_not_be_used_together_are_refused(failing, trained, tmp_path):
    for stock in ("single-file", "diffusers"):
        error = failing("export", trained, tmp_path / "o", f"--format=style-lora,{stock}", "--style=left")
        assert f"{stock} would hold the style already" in error and not (tmp_path / "o").exists()


def test_verify_needs_a_diffusers_folder_for_a_single_file(failing, trained, tmp_path):
    assert "add diffusers to --format" in failing(
        "export", trained, tmp_path / "o", "--format=single-file", "--style=left", "--verify"
    )


def test_a_mix_is_drawn_alike_from_all_three_formats(trained, tmp_path):
    out, mix = tmp_path / "out", "left=0.5,right=0.5"
    formats = ["--format", "dmm,diffusers,single-file", "--style", mix, "--dtype", "float32"]
    assert cli.main(["export", str(trained), str(out), *formats]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "diffusers", "dmm", "model.safetensors"]
    (tmp_path / "prompts.txt").write_text("a large red circle\n\na small blue star\n")

    def pictures(folder, model, *options):
        arguments = ["sample", str(out / model), "--prompts", str(tmp_path / "prompts.txt"), "--steps", "2"]
        assert cli.main([*arguments, "--batch-size", "4", "--out", str(tmp_path / folder), *options]) == 0
        return sorted((tmp_path / folder).glob("*_seed*.png"))

    from_dmm = pictures("a", "dmm", "--style", "left", "--style", mix)
    assert len(from_dmm) == 4 and (tmp_path / "a" / "grid.png").is_file()
    from_file = pictures("b", "model.safetensors", "--base", str(out / "diffusers"))
    mixed, folded = (np.asarray(Image.open(path), np.int32) for path in (from_dmm[1], from_file[0]))
    assert np.abs(mixed - folded).max() <= 1


@pytest.mark.parametrize("name", ["dmm", "diffusers", "single-file", "style-lora"])
def test_a_full_disk_leaves_nothing_of_an_export(failing, trained, tmp_path, name, monkeypatch):
    arguments = ["export", trained, tmp_path / "o", "--format", name, *(["--style", "left"] if name != "dmm" else [])]
    written, raw_bytes = [], safetensors_io.raw_bytes

    def full(array):
        written.append(array)
        if len(written) > (0 if name == "style-lora" else 100):
            raise OSError(28, "No space left on device")
        return raw_bytes(array)

    with monkeypatch.context() as patched:
        patched.setattr(safetensors_io, "raw_bytes", full)
        assert "No space left" in failing(*arguments)
    assert list(tmp_path.iterdir()) == []
    assert cli.main(list(map(str, arguments))) == 0  # The next one succeeds.


def test_a_style_lora_is_small_and_names_its_base(failing, trained, tmp_path):
    arguments = ["export", trained, tmp_path / "o", "--format", "style-lora"]
    assert "give --style" in failing(*arguments)
    arguments += ["--style", "left"]
    assert "got forge" in failing(*arguments, "--lora-for", "forge")
    assert "did you mean 'right'" in failing(*arguments, "--lora-base", "rigth")
    assert not (tmp_path / "o").exists()
    options = ["--lora-base", "right", "--lora-for", "comfyui,diffusers"]
    assert cli.main([str(argument) for argument in [*arguments, *options]]) == 0
    file = TensorFile(tmp_path / "o" / "style_lora.safetensors")
    metadata_bytes = file.path.stat().st_size - file.num_bytes  # The recipe included.
    assert metadata_bytes < 4000
    assert len(file) == 1 and '"style": "right=1.0"' in file.metadata["dmm_jax.lora_base"]
    assert len(TensorFile(tmp_path / "o" / "style_lora_diffusers.safetensors")) == 3


def test_a_dry_run_lists_the_files_of_each_spelling(trained, tmp_path, capsys):
    arguments = ["export", str(trained), str(tmp_path / "o"), "--format", "style-lora", "--style", "left"]
    options = ["--lora-for", "diffusers,a1111"]
    assert cli.main([*arguments, *options, "--dry-run"]) == 0
    planned = capsys.readouterr().out.splitlines()
    assert cli.main([*arguments, *options]) == 0
    assert planned == capsys.readouterr().out.splitlines() and len(planned) == 2


def test_a_dry_run_prints_the_paths_and_writes_nothing(trained, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["export", str(trained), str(out), "--format", "dmm,single-file", "--all-styles", "--dry-run"]
    assert cli.main(arguments) == 0 and not out.exists()
    assert capsys.readouterr().out.splitlines() == [
        str(out / name) for name in ("dmm", "left/model.safetensors", "right/model.safetensors")
    ]


def test_every_style_is_exported_under_its_name_with_words_and_pictures(trained, tmp_path):
    out, gallery = tmp_path / "out", tmp_path / "gallery"
    gallery.mkdir()
    save_png(gallery / "00000_seed1.png", pictures(1)[0], parameters(prompt="a | cat", styles="left"))
    arguments = ["--format", "single-file", "--all-styles", "--name", "mine", "--trigger", "left=ink, drawing"]
    arguments += ["--trigger", "right=oil"]
    assert cli.main(["export", str(trained), str(out), *arguments, "--examples", str(gallery)]) == 0
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert files == [
        f"{style}/{name}"
        for style in ("left", "right")
        for name in ("README.md", "examples/00.png", f"mine_{style}.safetensors")
    ]
    card = (out / "right" / "README.md").read_text()
    assert "`mine_right.safetensors` is a checkpoint for dmm_jax. ComfyUI" in card  # The tiny student is a toy.
    assert "| right | oil |" in card and "ink" not in card
    assert "| ![](examples/00.png) | left | a \\| cat |" in card
    assert yaml.safe_load(card.split("---\n")[1])["widget"][0]["output"] == {"url": "examples/00.png"}


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--all-styles", "--style=left"], "leave --style out"),
        (["--style=left", "--name=../x"], "--name is a file name"),
        (["--style=left", "--trigger=lift=a"], "a style of left, right"),
        (["--style=left", "--examples=nowhere"], "holds no pictures"),
        (["--style=left", "--push=name"], "--push is OWNER/NAME"),
    ],
)
def test_impossible_options_write_nothing(failing, trained, tmp_path, options, expected):
    error = failing("export", trained, tmp_path / "o", "--format=single-file", *options)
    assert expected in error and not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "formats, option, owners",
    [
        ("lora", "--vae=x", "dmm, diffusers, single-file"),
        ("style-lora,lora", "--vae=x", "dmm, diffusers, single-file"),
        ("lora,dmm", "--name=x", "single-file"),
        ("lora", "--all-styles", "diffusers, single-file, style-lora"),
        ("lora", "--lora-base=left", "style-lora"),
        ("dmm", "--lora-for=comfyui", "style-lora, lora"),
        ("style-lora", "--rank=8", "lora"),
        ("single-file", "--exact", "lora"),
        ("dmm", "--base=x", "lora"),
        ("dmm", "--style=left", "diffusers, single-file, style-lora, lora"),
        ("style-lora", "--verify", "dmm, diffusers, single-file"),
    ],
)
def test_an_option_that_no_format_uses_is_refused_before_anything_is_read(failing, tmp_path, formats, option, owners):
    error = failing("export", tmp_path / "nowhere", tmp_path / "o", f"--format={formats}", option)
    name = option.partition("=")[0]
    assert f"{name} has no effect on {formats.replace(',', ', ')}: it belongs to {owners}." in error
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("option", ["--style=left", "--keep=left", "--extra-style=x.safetensors"])
def test_a_stock_checkpoint_takes_no_option_about_styles(failing, tiny, tmp_path, option):
    base, teacher = list(tiny[0].values())[:2]
    error = failing("export", teacher, tmp_path / "o", "--format=lora", f"--base={base}", option)
    assert "a stock checkpoint without styles: leave --" in error and not (tmp_path / "o").exists()


@pytest.mark.parametrize("options", [["--format=single-file"], ["--format=lora", "--rank=2"]])
def test_a_file_as_output_becomes_that_file_alone(trained, tmp_path, capsys, options):
    out = tmp_path / "mine.safetensors"
    arguments = ["export", str(trained), str(out), "--style=left", *options]
    assert cli.main([*arguments, "--dry-run"]) == 0 and not list(tmp_path.iterdir())
    assert capsys.readouterr().out.splitlines() == [str(out)]
    assert cli.main(arguments) == 0 and list(tmp_path.iterdir()) == [out]
    assert TensorFile(out).metadata["modelspec.title"].endswith(": left")


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--format=dmm"], "is the name of one file, and this export writes dmm"),
        (["--format=lora"], "writes lora_left.safetensors, lora_right.safetensors"),
        (["--format=single-file", "--style=left", "--name=x"], "--name needs a folder"),
        (["--format=single-file", "--all-styles"], "--all-styles needs a folder"),
    ],
)
def test_a_file_as_output_is_refused_for_what_is_no_one_file(failing, trained, tmp_path, options, expected):
    assert expected in failing("export", trained, tmp_path / "mine.safetensors", *options)
    assert not list(tmp_path.iterdir())


def test_each_format_takes_its_own_options_and_its_metadata_names_no_other(trained, tiny, tmp_path):
    arguments = ["--format=dmm,style-lora", "--style=left", "--lora-base=right", f"--vae={tiny[0]['base']}"]
    assert cli.main(["export", str(trained), str(tmp_path / "o"), *arguments]) == 0
    recipes = {
        path.stem: json.loads(TensorFile(path).metadata["dmm_jax.recipe"])
        for path in (
            tmp_path / "o" / "dmm" / "unet" / "diffusion_pytorch_model.safetensors",
            tmp_path / "o" / "style_lora.safetensors",
        )
    }
    assert recipes["diffusion_pytorch_model"]["vae"] and "vae" not in recipes["style_lora"]


def test_an_export_is_pushed_when_asked_into_a_private_repository(trained, tmp_path, monkeypatch, capsys):
    calls = []

    class Interface:
        def create_repo(self, name, **options):
            calls.append((name, options))

        def upload_folder(self, folder_path, repo_id):
            calls.append((repo_id, sorted(os.listdir(folder_path))))
            return "https://hub/me/merged"

    monkeypatch.setattr(huggingface_hub, "HfApi", Interface)
    arguments = ["export", str(trained), str(tmp_path / "out"), "--format", "dmm", "--push", "me/merged"]
    assert cli.main(arguments) == 0
    assert calls[0] == ("me/merged", {"private": True, "exist_ok": True})
    assert calls[1][0] == "me/merged" and {"README.md", "unet", "model_index.json"} <= set(calls[1][1])
    assert capsys.readouterr().out.endswith("https://hub/me/merged\n")
