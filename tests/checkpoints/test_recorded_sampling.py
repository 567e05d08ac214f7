"""How a checkpoint draws where a call does not say."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dmm_jax.checkpoints.export import export
from dmm_jax.checkpoints.formats.safetensors_io import save
from dmm_jax.checkpoints.modelspec import RECIPE_KEY, Recipe
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.recorded_sampling import recorded_sampling
from dmm_jax.checkpoints.write import write_single_file
from dmm_jax.config.options import get_config, solver_options
from dmm_jax.config.serialization import load_config
from dmm_jax.gallery.sample import Sheet
from dmm_jax.pipeline import Pipeline
from dmm_jax.world import demo_config

DEFAULT = solver_options(get_config())


def test_a_run_and_its_exports_draw_as_its_config_says(trained, tiny, tmp_path):
    of_run = solver_options(load_config(trained))
    assert of_run != DEFAULT
    (dmm,) = export(trained, tmp_path / "one", ["dmm"])
    stock = export(trained, tmp_path / "two", ["diffusers", "single-file"], style="left")
    (again,) = export(dmm, tmp_path / "three", ["dmm"])
    (nameless,) = export(trained, tmp_path / "four", ["dmm"], recipe=False)
    save(tmp_path / "x.safetensors", {"lora_unet_conv_in.diff_b": np.zeros(64, np.float32)})
    with_lora = f"{trained} + {tmp_path / 'x.safetensors'}"
    for model in (trained, with_lora, dmm, *stock, again):
        assert recorded_sampling(open_checkpoint(model, tiny[0]["base"])) == of_run
    for model in (tiny[0]["base"], nameless):
        assert recorded_sampling(open_checkpoint(model)) == DEFAULT
    steps, guidance = (of_run[name] for name in ("num_inference_steps", "guidance_scale"))
    use = f"num_inference_steps={steps}, guidance_scale={guidance}"
    assert all(use in (path / "README.md").read_text() for path in (dmm, stock[0]))


def test_the_demo_draws_as_the_demo_does():
    assert recorded_sampling(open_checkpoint("demo")) == solver_options(demo_config.get_config())


def of_sampling(**options):
    return {"options": {"sampling": options}}


def nested(recipe, times):
    return {"recipe": nested(recipe, times - 1)} if times else recipe


UNUSABLE = [
    [], "x", {"options": []}, {"options": {"sampling": 3}}, {"recipe": {"recipe": 1}},
    of_sampling(num_inference_steps="9"), of_sampling(num_inference_steps=10**9), of_sampling(solver="unheard"),
    of_sampling(guidance_scale=float("nan")), of_sampling(guidance_scale=1e39),
    of_sampling(guidance_rescale=2.0), nested(of_sampling(solver="lcm"), 30),
]  # fmt: skip


@pytest.fixture(scope="module")
def file(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("single") / "x.safetensors"
    return write_single_file(path, open_checkpoint(tiny[0]["base"]), "float16", Recipe("x", [], None))


DEEP = '{"options": {"teachers": %s}}' % ("[" * 900 + "]" * 900)


@pytest.mark.parametrize("text", [*map(json.dumps, UNUSABLE), "", "{", DEEP, "[" * 100_000, " " * 2_000_000 + "{}"])
def test_a_recipe_that_cannot_be_used_leaves_the_defaults(file, text):
    save_file(load_file(file), file, {"format": "pt", RECIPE_KEY: text})
    assert recorded_sampling(open_checkpoint(file)) == DEFAULT


def test_a_recipe_that_can_be_used_is(file):
    save_file(load_file(file), file, {"format": "pt", RECIPE_KEY: json.dumps(of_sampling(solver="lcm"))})
    assert recorded_sampling(open_checkpoint(file)) == DEFAULT | {"solver": "lcm"}


def test_a_pipeline_and_a_sheet_take_what_a_call_leaves_out(tiny, tmp_path):
    options = {"num_inference_steps": 3, "guidance_scale": 1.5, "guidance_rescale": 0.25, "solver": "euler_karras"}
    base = open_checkpoint(tiny[0]["base"])
    recipe = {"from": {}, "recipe": {"options": {"sampling": options}}}
    write_single_file(tmp_path / "x.safetensors", base, "float32", Recipe("x", [], recipe))
    pipeline = Pipeline.from_pretrained(tmp_path / "x.safetensors", base=tiny[0]["base"])
    assert pipeline.sampling == options
    assert np.array_equal(pipeline(["red"]), pipeline(["red"], **options))
    other = options | {"guidance_scale": 3.0}
    assert np.array_equal(pipeline(["red"], guidance_scale=3.0), pipeline(["red"], **other))
    assert not np.array_equal(pipeline(["red"]), pipeline(["red"], **other))
    sheet = Sheet(pipeline, ["red"], [], guidance_scale=3.0)
    assert {name: getattr(sheet, name) for name in options} == other
    assert json.loads(json.dumps(dataclasses.replace(sheet).recipe()))["solver"] == "euler_karras"
