"""Exported folders carry a card and the licences of all parents; neither says more than it is told to."""

import json
import pathlib
import shutil

import pytest
import yaml

from dmm_jax import cli, model_card
from dmm_jax import config as config_lib
from dmm_jax.checkpoints import licenses
from dmm_jax.checkpoints.inspect import inspect, render
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.safetensors_io import TensorFile, save
from dmm_jax.export import export_workdir

PARENTS = {
    name: {"file": f"{name}.safetensors", "unet_sha256": 64 * "a", "license": "openrail"} for name in ("base", "anime")
}
MEASURED = {
    "styles": ["anime"], "matrix": [[2.0]], "floor": [1.0], "base": [9.0], "average": [5.0], "n": 50,
    "weight_merges": ["average"], "distance": "FID",
    "settings": {"num_inference_steps": 5, "guidance_scale": 2.0, "solver": "ddim"},
}  # fmt: skip


def head(text):
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def card(title="one", styles=("anime",), parents=PARENTS, license="openrail", measured=None, has_grid=False):
    return model_card.card("dmm", title, styles, "stable-diffusion-v1", parents, license, measured, has_grid)


@pytest.mark.parametrize(
    "license, read",
    [
        ("openrail++", {"license": "openrail++"}),
        ('a: "b"\nc; d', {"license": "other", "license_name": 'a: "b"\nc; d'}),
        ("", {"license": "other", "license_name": "unknown"}),
    ],
)
def test_the_head_is_yaml_that_hubs_read(license, read):
    said = head(card(license=license))
    assert said | read == said and "merge" in said["tags"]
    assert (said["pipeline_tag"], said["library_name"]) == ("text-to-image", "diffusers")


def test_the_card_lists_parents_measures_and_the_grid():
    text = card(measured=MEASURED, has_grid=True)
    assert "| anime | anime.safetensors | aaaaaaaaaa | openrail |" in text and "(grid.png)" in text
    assert "| anime | 2.00 | 1.00 | 9.00 | 5.00 |" in text and "50 pictures a style" in text
    assert "anime.safetensors" not in card(parents={}) and "| anime |" in card(parents={})


def test_names_do_not_break_out_of_the_card():
    name = "x | y](javascript:a) <script> `z`\n# heading"
    lines = card(title=name, styles=[name], parents={}).splitlines()
    assert "# heading" not in lines and not any("<script>" in line for line in lines if "styles=" not in line)
    (row,) = [line for line in lines if line.startswith("| x")]
    assert row.replace("\\|", "").count("|") == 2 and "](" not in row


@pytest.fixture(scope="module")
def copied(trained, tmp_path_factory):
    """A copy of the tiny run that was told two licences."""
    copy = shutil.copytree(trained, tmp_path_factory.mktemp("copied") / "run")
    config = json.loads((copy / "config.json").read_text())
    config["licenses"] = ["base=openrail", "left=faipl-1.0-sd"]
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_an_export_names_the_licences_of_all_parents(copied, tmp_path):
    out = tmp_path / "out"
    assert cli.main(["export", str(copied), str(out), "--format", "dmm,single-file", "--style", "left"]) == 0
    together = "openrail; faipl-1.0-sd; unknown"
    for path in (out / "dmm", out / "model.safetensors"):
        assert open_checkpoint(path).license == together
    text = (out / "dmm" / "README.md").read_text()
    assert head(text)["license_name"] == together and "faipl\\-1.0\\-sd" in text
    report = inspect([out / "dmm"])
    assert report["checkpoints"][0]["license"] == together and f"licence: {together}" in render(report)
    again = export_workdir(out / "dmm", tmp_path / "again", ["dmm"])[0]
    assert open_checkpoint(again).license == together


def test_without_the_recipe_nothing_tells_of_the_parents(copied, tmp_path):
    out = tmp_path / "out"
    arguments = ["export", str(copied), str(out), "--format", "dmm,diffusers,single-file", "--style", "left"]
    assert cli.main([*arguments, "--no-recipe"]) == 0
    config = config_lib.load(copied)
    parents = [open_checkpoint(path) for path in (config.base, *(path for _, path in config.teachers))]
    secrets = {word for one in parents for word in (one.digest("unet"), one.digest("unet")[:10], str(one.path))}
    files = [path for path in pathlib.Path(out).rglob("*") if path.is_file()]
    said = [path.read_text() for path in files if path.suffix in (".json", ".md", ".txt")]
    said += [json.dumps(TensorFile(path).metadata) for path in files if path.suffix == ".safetensors"]
    assert len(said) > 10 and not any(secret in text for text in said for secret in secrets)


def test_the_licence_is_the_files_then_the_cards(tmp_path):
    assert licenses.stated({licenses.MODELSPEC: "mit"}, tmp_path) == "mit"
    assert licenses.stated({}, tmp_path) == ""
    (tmp_path / "README.md").write_text("---\ntags: [a]\nlicense: 'openrail++'\n---\n# x\nlicense: no\n")
    assert licenses.stated({}, tmp_path) == "openrail++"
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: faipl\x1b[0m\n---\n")
    assert licenses.stated({}, tmp_path) == "faipl?[0m"
    (tmp_path / "README.md").write_text("license: no\n")
    assert licenses.stated({}, tmp_path) == ""


def test_a_lora_adds_its_licence(tmp_path):
    save(tmp_path / "a.safetensors", {}, {licenses.MODELSPEC: "b"})
    lora = licenses.stated(TensorFile(tmp_path / "a.safetensors").metadata)
    assert licenses.together(["a; b", lora, "", "a"]) == "a; b; unknown"


def test_licences_of_strangers_are_refused(tiny):
    config = tiny[1].copy_and_resolve_references()
    config.licenses = ("nobody=mit",)
    with pytest.raises(ValueError, match="licenses has 'nobody'.*base, left, right"):
        config_lib.check(config)
