"""Stable Diffusion 2 and XL from end to end: opened, trained, sampled, exported, sampled by stock diffusers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmm_jax import train
from dmm_jax.checkpoints import write
from dmm_jax.checkpoints.checkpoint import Component
from dmm_jax.checkpoints.formats import style_lora
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, save
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.styles import fold_style
from dmm_jax.config.serialization import load_config
from dmm_jax.data.prepare import prepare_images
from dmm_jax.distill.layout import looped
from dmm_jax.distill.objective import Inputs
from dmm_jax.distill.student import put_student, style_params
from dmm_jax.distillation import Distillation
from dmm_jax.evaluation.verify_export import verify
from dmm_jax.pipeline import Pipeline
from dmm_jax.runtime import sharding
from dmm_jax.runtime.metrics import read
from dmm_jax.text.tokenizer import Tokenizers
from tests import families

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

MIX = {"left": 0.7, "right": 0.3}
PROMPTS, NEGATIVE = ["a large red circle", "a small blue star"], "green"
STEPS, GUIDANCE = 4, 3.0
SOLVERS = {"sd2": "ddim", "sdxl": "euler"}  # Those of the stock checkpoints' schedulers.
SIZES = {"original_size": (48, 96), "crops_coords_top_left": (4, 8), "target_size": (64, 32)}
TOLERANCE = 1e-5  # Relative to the maximum.


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    """A tiny XL world, its cache prepared, and the workdir of a finished run on it."""
    folder = tmp_path_factory.mktemp("sdxl")
    paths = families.write_world(folder, "sdxl")
    config = families.tiny_config(paths, folder / "cache")
    config.adversarial.weight = 0.01
    prepare_images(config)
    train.run(config, folder / "run")
    return paths, folder / "run"


@pytest.fixture(scope="module", params=families.NAMES)
def student(request, tmp_path_factory):
    """(family, base folder, student): the run's for XL, the base under random styles for 2."""
    if request.param == "sdxl":
        paths, workdir = request.getfixturevalue("xl")
        return "sdxl", paths["base"], open_checkpoint(workdir)
    folder = families.write_stock(tmp_path_factory.mktemp("sd2") / "base", "sd2", 0)
    return "sd2", folder, families.random_student(open_checkpoint(folder))


@pytest.fixture(scope="module")
def exports(student, tmp_path_factory):
    """Every format in float32."""
    out, weights = tmp_path_factory.mktemp("exports"), np.array(list(MIX.values()), np.float32)
    return {
        fmt: write.write_format(out, fmt, student[2], weights, "float32", families.RECIPE) for fmt in write.CHECKPOINTS
    }


def opened_by_diffusers(family, exports, fmt):
    kind = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    options = {"local_files_only": True} | ({} if family == "sdxl" else {"safety_checker": None})
    if fmt == "diffusers":
        pipe = kind.from_pretrained(exports[fmt], **options)
    else:
        pipe = kind.from_single_file(str(exports[fmt]), config=str(exports["diffusers"]), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise():
    return np.random.default_rng(3).standard_normal((2, 8, 8, 4), np.float32)


def channels_first(array):
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def draw(pipeline, family, **options):
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "solver": SOLVERS[family]}
    return pipeline(PROMPTS, latents=noise(), output="latents", **settings, **options)


@pytest.mark.parametrize("fmt", ["diffusers", "single-file"])
def test_diffusers_and_we_predict_and_sample_the_same(student, exports, fmt):
    family = student[0]
    their_pipeline, our_pipeline = opened_by_diffusers(family, exports, fmt), Pipeline.from_pretrained(exports["dmm"])
    stock = Pipeline.from_pretrained(exports[fmt], base=exports["diffusers"])

    text, timesteps = stock.encode_prompts(PROMPTS), np.array([7, 800])
    ids = np.array([[64, 64, 0, 0, 64, 64], [48, 96, 4, 8, 64, 32]], np.float32)
    added = text.added_cond(jnp.asarray(ids))
    their_added = None if added is None else {name: torch.from_numpy(np.array(leaf)) for name, leaf in added.items()}
    with torch.no_grad():
        states = torch.from_numpy(np.array(text.encoder_hidden_states))
        inputs = (channels_first(noise()), torch.from_numpy(timesteps), states)
        expected = their_pipeline.unet(*inputs, added_cond_kwargs=their_added).sample
    inputs = (jnp.asarray(noise()), jnp.asarray(timesteps), text.encoder_hidden_states)
    sample = stock.unet(*inputs, added_cond=added).sample
    assert families.error(sample, expected) < TOLERANCE

    sizes = SIZES if family == "sdxl" else {}
    for negative in (None, NEGATIVE):
        options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "height": 64, "width": 64, **sizes}
        negatives = None if negative is None else [negative] * 2
        latents = their_pipeline(
            PROMPTS, negative_prompt=negatives, latents=channels_first(noise()), output_type="latent", **options
        ).images
        our_latents = draw(our_pipeline, family, styles=MIX, negative_prompts=negative, **sizes)
        assert families.error(our_latents, latents) < TOLERANCE


def test_a_style_lora_turns_the_base_mix_into_the_style_in_diffusers(student, tmp_path):
    """Stable Diffusion 2 has a schedule of zero terminal SNR here, on which samplers tend to differ."""
    family, source, weights = student[0], student[2], np.array(list(MIX.values()), np.float32)
    if family == "sd2":
        zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        source = dataclasses.replace(source, scheduler_config=source.scheduler_config | zero)
    equal = style_lora.equal_parts(source.styles)
    storage = {
        name: write.write_folder(tmp_path / name, fold_style(source, mix), "float32", families.RECIPE)
        for name, mix in (("base", equal), ("style", weights))
    }
    verify({"diffusers": storage["style"]})

    (path,) = style_lora.write_style_loras(tmp_path, source, weights, equal, "float32", ["diffusers"], families.RECIPE)
    base, style = (opened_by_diffusers(family, {"diffusers": folder}, "diffusers") for folder in storage.values())
    before = base.unet.time_embedding.linear_2.bias.detach().clone()
    base.load_lora_weights(tmp_path, weight_name=path.name, local_files_only=True)
    base.fuse_lora()
    after, expected = (pipe.unet.time_embedding.linear_2 for pipe in (base, style))
    after = getattr(after, "base_layer", after).bias
    assert (before - expected.bias).abs().max() > 1e-2 and (after - expected.bias).abs().max() < 1e-6


def test_an_export_comes_back_bit_for_bit(student, exports):
    weights = np.array(list(MIX.values()), np.float32)
    for fmt, path in exports.items():
        source = student[2] if fmt == "dmm" else fold_style(student[2], weights)
        back = open_checkpoint(path)
        assert back.kind == fmt and set(back.components) == set(source.components)
        assert back.architecture == source.architecture and back.prediction_type == source.prediction_type
        for component in source.components:
            assert back.abstract(component) == source.abstract(component)
            pairs = zip(jax.tree.leaves(back.params(component)), jax.tree.leaves(source.params(component)), strict=True)
            assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


def test_a_dmm_folder_of_xl_holds_the_style_mlp_and_xls_own(xl, tmp_path):
    out = write.write_format(tmp_path, "dmm", open_checkpoint(xl[1]), None, "float16", families.RECIPE)
    config, index = (json.loads((out / name).read_text()) for name in ("unet/config.json", "model_index.json"))
    assert config["addition_embed_type"] == "model_merge_xl" and config["num_models"] == 2
    assert index["unet"] == ["modeling.dmm_unet", "DMMUNet2DConditionModel"]
    assert index["text_encoder_2"] == ["transformers", "CLIPTextModelWithProjection"]
    assert index["tokenizer_2"] == ["transformers", "CLIPTokenizer"]
    keys = TensorFile(out / "unet" / "diffusion_pytorch_model.safetensors")
    assert "add_embedding2.linear_1.weight" in keys and "add_embedding.linear_1.weight" in keys


def test_an_xl_run_learns_and_validates(xl):
    lines = read(xl[1] / "metrics.jsonl")
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert [line["step"] for line in lines if "validation" in line] == [3]


def test_the_discriminator_of_xl_starts_near_chance_and_moves(xl):
    """It has 2 N classes, and its backbone takes sizes and pooled prompts like the other networks."""
    lines = [line for line in read(xl[1] / "metrics.jsonl") if "score" in line]
    for name in ("adversarial", "discriminator"):
        errors = np.array([[line[name][style] for style in families.STYLES] for line in lines])
        assert (0.1 * np.log(4) < errors).all() and (errors < 10 * np.log(4)).all()
        assert (np.ptp(errors, axis=0) > 0).all()


def test_teacher_and_student_of_xl_get_equal_sizes_and_prompts(xl):
    """A student that equals its teacher has no error for any inputs; other encoders or sizes change the error."""
    base = open_checkpoint(xl[0]["base"])
    config = load_config(xl[1])
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    run = Distillation(config, teachers={name: open_checkpoint(xl[0][name]) for name in MIX}, mesh=mesh)
    assert np.asarray(run.teachers.encoder).tolist() == [0, 1]
    assert len(run.objective.empty_ids) == 2 and set(run.objective.empty_ids[0]) == {-1}
    unlooped_params = put_student(
        [base.params("unet")], style_params(run.student_config, "zero", 0), run.student_config, mesh
    )
    params = looped(unlooped_params, config.loop_blocks, mesh)
    errors = run._validation  # The program of the finished run: the cache of compiled programs holds it.

    rng = np.random.default_rng(0)
    tokenizers = Tokenizers.from_folders(base.tokenizer_folders)
    inputs = Inputs(
        latents=rng.standard_normal((2, 2, 8, 8, 4), np.float32), timesteps=np.array([[7, 800]] * 2),
        noise=rng.standard_normal((2, 2, 8, 8, 4), np.float32),
        input_ids=np.array([tokenizers([PROMPTS[0], None])] * 2),
        time_ids=rng.integers(0, 99, (2, 2, 6)).astype(np.int32), style_ids=np.array([[0, 0], [1, 1]]),
    )  # fmt: skip
    unet = {name: leaf for name, leaf in unlooped_params.items() if name not in ("model_embedding", "add_embedding2")}
    unets = jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf)[None], 2, 0), unet)
    unets, encoder = sharding.put_global((unets, np.array([-1, 0], np.int32)), mesh, sharding.TEACHERS)
    same = run.teachers._replace(unet=unets, encoder=encoder)
    first, second = np.asarray(errors(params, same, run.frozen, inputs))
    assert first.max() < 1e-9
    assert second[0] > 1e-5 and second[1] < 1e-9  # Other encoders change a prompt's states, and leave zeros alone.
    before = np.asarray(errors(params, run.teachers, run.frozen, inputs))
    after = np.asarray(errors(params, run.teachers, run.frozen, inputs._replace(time_ids=inputs.time_ids + 40)))
    assert np.abs(before - after).min() > 1e-5


def test_the_sizes_that_xl_takes_change_its_picture(xl):
    base = Pipeline.from_pretrained(xl[0]["base"])
    plain, sized = draw(base, "sdxl"), draw(base, "sdxl", original_size=(256, 256))
    assert np.abs(plain - sized).max() > 100 * TOLERANCE * np.abs(plain).max()
    assert np.array_equal(plain, draw(base, "sdxl", original_size=(64, 64), target_size=(64, 64)))


def test_no_negative_prompt_differs_from_an_empty_one_for_xl_alone(student, exports):
    stock = Pipeline.from_pretrained(exports["diffusers"])
    same = np.array_equal(draw(stock, student[0]), draw(stock, student[0], negative_prompts=""))
    assert same == (student[0] == "sd2")


def test_a_single_file_of_xl_has_xls_scale(xl):
    file = open_checkpoint(xl[0]["right"])
    assert file.vae_config["scaling_factor"] == 0.13025 and not file.unused
    assert file.scheduler_config["timestep_spacing"] == "leading"


def test_text_encoders_that_do_not_fit_the_unet_are_refused(xl, tmp_path):
    def keep(name):
        return not name.startswith("conditioner.embedders.1.")

    file = TensorFile(xl[0]["right"])
    save(tmp_path / "half.safetensors", {name: np.array(file[name]) for name in file if keep(name)})
    half = open_checkpoint(tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="holds no text_encoder_2, tokenizer, tokenizer_2. Give a "):
        Pipeline.from_pretrained(half.path)
    assert Pipeline.from_pretrained(half.path, base=xl[0]["base"]).source.from_base == ("text_encoder_2",)
    base = open_checkpoint(xl[0]["base"])
    narrow = Component(base.unet_config | {"cross_attention_dim": 64}, base.components["unet"].load)
    odd = dataclasses.replace(base, components={**base.components, "unet": narrow})
    with pytest.raises(ValueError, match="cross_attention_dim 64, but its text encoders give 192"):
        Pipeline.for_unet(odd, odd.unet_config, (), dtype="float32")
