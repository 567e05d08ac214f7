"""Exported folders hold a card and the licences of all parents, and state nothing that the user leaves out."""

import json
import pathlib
import shutil

import pytest
import yaml

from dmm_jax.checkpoints import licenses, model_card, provenance
from dmm_jax.checkpoints.export import export
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, save
from dmm_jax.checkpoints.inspect import inspect
from dmm_jax.checkpoints.inspect_text import render
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.config.serialization import load_config
from dmm_jax.runtime.errors import UserError
from dmm_jax.verbs import main as cli

FILE = {"file": "x.safetensors", "sha256": 64 * "a", "autov2": 10 * "a"}
PARENTS = {name: {"file": name, "files": [FILE], "license": "openrail"} for name in ("base", "anime")}
PARENTS["anime"]["loras"] = [FILE | {"autov2": 10 * "b", "weight": 0.5}]
METRICS = {
    "styles": ["anime"], "matrix": [[2.0]], "floor": [1.0], "base": [9.0], "average": [5.0], "n": 50,
    "weight_merges": ["average"], "distance": "FID",
    "settings": {"num_inference_steps": 5, "guidance_scale": 2.0, "solver": "ddim"},
}  # fmt: skip


def head(text):
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def card(
    title="one", styles=("anime",), parents=PARENTS, license="openrail", metrics=None, has_grid=False, schedule=None,
    formats=("dmm",), tools=(), **options,
):  # fmt: skip
    family, schedule = "stable-diffusion-v1", schedule or {"prediction_type": "epsilon"}
    sampling = {"num_inference_steps": 9, "guidance_scale": 2.5}
    return model_card.card(
        list(formats), title, styles, family, parents, license, metrics, has_grid, schedule, sampling,
        tools=tools, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    "tools, named, unnamed",
    [
        (("comfyui",), ("ComfyUI", "dmm_jax (`BASE"), ("AUTOMATIC1111", "diffusers 0.40", "kohya")),
        (("a1111",), ("AUTOMATIC1111 reads it without",), ("ComfyUI and", "diffusers 0.40", "kohya")),
        (("diffusers",), ("diffusers 0.40 or later",), ("ComfyUI and", "AUTOMATIC1111", "kohya")),
    ],
)
def test_the_card_of_a_lora_names_the_tools_that_read_its_spelling(tools, named, unnamed):
    text = card(formats=("lora",), tools=tools)
    assert all(it in text for it in named) and not any(it in text for it in unnamed)


@pytest.mark.parametrize("formats", [("lora",), ("style-lora",)])
def test_the_card_of_a_lora_cites_no_file_that_the_export_lacks(formats):
    text = card(formats=formats, schedule={"prediction_type": "v_prediction"})
    assert "scheduler_config.json" not in text and "No tool reads this from a LoRA" in text
    both = card(formats=("single-file", *formats), schedule={"prediction_type": "v_prediction"})
    assert "empty tensors" in both and "No tool reads this from a LoRA" in both


@pytest.mark.parametrize(
    "license, read",
    [
        ("openrail++", {"license": "openrail++"}),
        ('a: "b"\nc; d', {"license": "other", "license_name": 'a: "b"\nc; d'}),
        ("", {"license": "other", "license_name": "unknown"}),
    ],
)
def test_the_head_is_yaml_that_hubs_read(license, read):
    fields = head(card(license=license))
    assert fields | read == fields and "merge" in fields["tags"]
    assert (fields["pipeline_tag"], fields["library_name"]) == ("text-to-image", "diffusers")


def test_the_card_lists_parents_measures_and_the_grid():
    text = card(metrics=METRICS, has_grid=True)
    assert "| anime | anime | aaaaaaaaaa \\+ bbbbbbbbbb \\* 0.5 | openrail |" in text and "(grid.png)" in text
    assert "AutoV2" in text
    assert "| anime | 2.00 | 1.00 | 9.00 | 5.00 |" in text and "50 pictures per style" in text
    assert 10 * "a" not in card(parents={}) and "| anime |" in card(parents={})


def test_the_head_lists_parents_on_hubs_and_the_table_every_style():
    hub = {"file": "0123", "license": "x", "hub": "some-one/tiny"}
    lora = FILE | {"weight": 0.5, "hub": "some-one/ink"}
    odd = hub | {"file": "a b + ink*0.5", "loras": [lora]}
    text = card(parents=PARENTS | {"base": hub, "odd": odd}, styles=("anime", "odd", "fitted"))
    assert (
        head(text)["base_model"] == ["some-one/tiny", "some-one/ink"] and head(text)["base_model_relation"] == "merge"
    )
    assert "| odd | a b \\+ ink\\*0.5 |" in text and "| fitted | images, by fit\\-style |" in text
    assert not any({"base_model", "base_model_relation"} & set(head(card(parents=names))) for names in ({}, PARENTS))


def test_the_card_of_one_style_lists_that_style_alone():
    metrics = METRICS | {"styles": ["anime", "odd"], "floor": [1.0, 1.0], "base": [9.0, 9.0], "average": [5.0, 5.0]}
    metrics |= {"matrix": [[2.0, 3.0], [4.0, 2.0]]}
    text = card(formats=("single-file",), styles=("anime", "odd"), mix=("odd",), metrics=metrics)
    assert "The style odd of 2 checkpoints" in text and "| odd |" in text and "anime" not in text
    both = card(formats=("single-file",), styles=("anime", "odd"), mix=("anime", "odd"))
    assert "The mix of anime, odd of 2 checkpoints" in both and "| anime |" in both
    assert "| base |" in text and "Each style, in a file of its own" in card(formats=("lora",))


@pytest.mark.parametrize("fmt", ["single-file", "lora", "style-lora"])
def test_the_card_of_a_toy_recommends_no_tool_that_cannot_load_it(fmt):
    toy, full = (card(formats=(fmt,), tools=("comfyui", "a1111"), is_published_size=size) for size in (False, True))
    assert "ComfyUI" in full and "do not load it" not in full
    assert "ComfyUI, A1111, Forge and diffusers' `from_single_file` do not load" in toy or "load no checkpoint" in toy


@pytest.mark.parametrize("zero", [False, True])
def test_a_card_says_how_to_sample_from_a_velocity_model(zero):
    schedule = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": zero}
    in_folder, in_file = card(schedule=schedule), card(schedule=schedule, formats=["single-file", "style-lora"])
    assert "v-prediction" in in_folder and ("signal-to-noise ratio of zero" in in_folder) == zero
    assert "scheduler_config.json" in in_folder and "DDIMScheduler" not in in_folder
    options = 'prediction_type="v_prediction"' + ", rescale_betas_zero_snr=True" * zero
    assert f"config, {options})" in in_file.replace("'v_prediction'", '"v_prediction"') and "strength 1" in in_file
    assert "v-prediction" not in card()


HUGE = b'{"styles": ["left"], "matrix": [[1%s]], "floor": [1.0], "base": [1.0]}' % (b"0" * 400)


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"\xff", HUGE])
def test_damaged_metrics_are_refused(tmp_path, content):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "metrics.json").write_bytes(content)
    with pytest.raises(UserError, match="metrics.json is (damaged|not UTF-8|not JSON)"):
        model_card.metrics_of(tmp_path, ["left"])


def test_names_do_not_break_out_of_the_card():
    name = "x | y](javascript:a) <script> `z`\n# heading"
    lines = card(title=name, styles=[name], parents={}).splitlines()
    assert "# heading" not in lines and not any("<script>" in line for line in lines if "styles=" not in line)
    (row,) = [line for line in lines if line.startswith("| x")]
    assert row.replace("\\|", "").count("|") == 2 and "](" not in row


@pytest.fixture(scope="module")
def copied(trained, tmp_path_factory):
    """A copy of the tiny run."""
    return shutil.copytree(trained, tmp_path_factory.mktemp("copied") / "run")


def test_an_export_names_the_licences_of_all_parents(copied, tmp_path):
    out = tmp_path / "out"
    stated = ["--license", "base=openrail", "--license", "left=faipl-1.0-sd"]
    assert cli.main(["export", str(copied), str(out), "--format", "dmm,single-file", "--style", "left", *stated]) == 0
    together = "openrail; faipl-1.0-sd; unknown"
    for path in (out / "dmm", out / "model.safetensors"):
        assert open_checkpoint(path).license == together
    text = (out / "dmm" / "README.md").read_text()
    assert head(text)["license_name"] == together and "faipl\\-1.0\\-sd" in text
    report = inspect([out / "dmm"])
    assert report["checkpoints"][0]["license"] == together and f"licence: {together}" in render(report)
    second = export(out / "dmm", tmp_path / "second", ["dmm"])[0]
    assert open_checkpoint(second).license == together


def test_no_recipe_leaves_every_trace_of_the_parents_out(copied, tmp_path):
    out = tmp_path / "out"
    arguments = ["export", str(copied), str(out), "--format", "dmm,diffusers,single-file", "--style", "left"]
    assert cli.main([*arguments, "--no-recipe"]) == 0
    config = load_config(copied)
    secrets = set()
    for path in (config.base, *(path for _, path in config.teachers)):
        digest = open_checkpoint(path).digest("unet")
        secrets |= {digest, digest[:10], path}
    for record in provenance.parents_of_workdir(copied).values():
        secrets |= {file[kind] for file in record["files"] for kind in ("sha256", "autov2")}
    files = [path for path in pathlib.Path(out).rglob("*") if path.is_file()]
    texts = [path.read_text() for path in files if path.suffix in (".json", ".md", ".txt")]
    texts += [json.dumps(TensorFile(path).metadata) for path in files if path.suffix == ".safetensors"]
    assert len(texts) > 10 and not any(secret in text for text in texts for secret in secrets)


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
    file = TensorFile(tmp_path / "a.safetensors")
    lora = licenses.stated(file.metadata, file.path)
    assert licenses.together(["a; b", lora, "", "a"]) == "a; b; unknown"


@pytest.mark.parametrize("entry", ["nobody=mit", "left=", "left"])
def test_a_licence_without_a_parent_or_a_name_is_refused(entry):
    parents = dict.fromkeys(("base", "left", "right"), {"license": "unknown"})
    with pytest.raises(UserError, match="NAME=LICENCE.*base, left, right"):
        provenance.with_licenses(parents, [entry])
