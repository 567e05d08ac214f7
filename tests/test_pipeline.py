"""The pipeline: styles, mixes, seeds, one compilation per batch shape, any number of devices."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dmm_jax import pipeline as pipeline_lib
from dmm_jax.bench import jobs, networks
from dmm_jax.checkpoints.abstract import abstract_model
from dmm_jax.checkpoints.formats.safetensors_io import save
from dmm_jax.config.options import solver_options
from dmm_jax.data import prepare
from dmm_jax.distillation import Distillation
from dmm_jax.models import drawing
from dmm_jax.models.autoencoder_kl import AutoencoderKL
from dmm_jax.models.network import Network, cast_params
from dmm_jax.pipeline import Pipeline
from dmm_jax.planning import compiler, devices
from dmm_jax.runtime.errors import UserError
from tests import worlds

PROMPTS = ["a large red circle", "a small blue star"]
QUICK = {"num_inference_steps": 2, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def student(trained):
    return Pipeline.from_pretrained(trained)


def test_styles_are_the_teachers_in_order(student):
    assert student.styles == worlds.NAMES


def test_repr_is_one_line_with_names_and_sizes(student):
    assert re.fullmatch(r"Network\(UNet2DConditionModel, [\d,]{6,} parameters\)", repr(student.unet))
    assert re.fullmatch(
        r"Pipeline\('run', styles=\('left', 'right'\), dtype=float32, [\d,]{6,} UNet parameters\)", repr(student)
    )
    assert repr(Pipeline.for_unet(student.source, student.source.unet_config, (), dtype="float32")).count("\n") == 0


def test_a_mix_of_one_style_is_that_style(student):
    named = student(PROMPTS, styles="left", output="latents", **QUICK)
    mixed = student(PROMPTS, styles=[{"left": 1.0, "right": 0.0}, "left"], output="latents", **QUICK)
    assert np.array_equal(named, mixed)


def test_rounded_weights_mix_predictions_as_exact_ones_do(student):
    options = {"mixing": "predictions", "output": "latents", **QUICK}
    rounded, exact = ({"left": weight, "right": weight} for weight in (0.49, 0.5))
    np.testing.assert_allclose(student(PROMPTS, styles=rounded, **options), student(PROMPTS, styles=exact, **options))


def test_a_fade_mixes_predictions_by_timestep(student):
    """A fade that ends before the last evaluation has drawn as its second style from there on."""
    options = {"mixing": "predictions", "output": "latents", "guidance_scale": 2.0, "num_inference_steps": 3}
    seen = []
    drawn = student(PROMPTS, styles=[(1000, "left"), ((700, 300), "right")], **options)
    watch = lambda number, timestep, latents: seen.append(latents)  # noqa: E731
    watched = student(PROMPTS, styles=[(1000, "left"), ((700, 300), "right")], callback=watch, **options)
    assert len(seen) == 3 and np.array_equal(seen[-1], watched)
    np.testing.assert_allclose(drawn, watched, atol=1e-5 * np.abs(drawn).max())
    assert not np.array_equal(drawn, student(PROMPTS, styles="left", **options))


def xl_student():
    config = jobs.with_teachers(jobs.get_config(), 2)
    config.dtype = "float32"
    return networks.random_pipeline("tiny_xl", config)


@pytest.mark.parametrize("size", ["sd15", "xl"])
def test_mixed_predictions_of_one_step_are_the_mean_of_its_styles(student, size):
    """One step's result is linear in the prediction, so the mean of predictions draws the mean of latents."""
    pipeline = student if size == "sd15" else xl_student()
    first, second = pipeline.styles[:2]
    options = {"num_inference_steps": 1, "guidance_scale": [2.0, 5.0], "output": "latents", "seeds": [5, 6]}
    singles = [pipeline(PROMPTS, styles=style, **options) for style in (first, second)]
    mixes = [{first: 0.75, second: 0.25}, second]
    mixed = pipeline(PROMPTS, styles=mixes, mixing="predictions", **options)
    expected = np.stack([0.75 * singles[0][0] + 0.25 * singles[1][0], singles[1][1]])
    scale = np.abs(expected).max()
    np.testing.assert_allclose(mixed, expected, atol=1e-5 * scale)
    by_rows = pipeline(PROMPTS, styles=mixes, **options)
    assert np.abs(by_rows - expected)[0].max() > 1e-4 * scale


def test_images_of_one_batch_have_styles_of_their_own(student):
    both = student([PROMPTS[0]] * 2, styles=["left", "right"], seeds=[5, 5], output="latents", **QUICK)
    of_left = student([PROMPTS[0]] * 2, styles="left", seeds=[5, 5], output="latents", **QUICK)
    assert np.array_equal(both[0], of_left[0])
    assert not np.array_equal(both[1], of_left[1])


def test_a_seed_draws_the_same_image_at_any_place_in_the_batch(student):
    forward = student(PROMPTS, styles="left", seeds=[1, 2], **QUICK)
    backward = student(PROMPTS[::-1], styles="left", seeds=[2, 1], **QUICK)
    assert np.abs(forward.astype(int) - backward[::-1]).max() <= 1  # A place in the batch may round differently.


def test_guidance_of_one_is_no_guidance(student):
    off = student(PROMPTS, styles="left", num_inference_steps=2, guidance_scale=1.0, output="latents")
    mixed = student(PROMPTS, styles="left", num_inference_steps=2, guidance_scale=[1.0, 3.0], output="latents")
    assert np.abs(off[0] - mixed[0]).max() < 1e-5 * np.abs(off).max()
    assert np.abs(off[1] - mixed[1]).max() > 1e-3 * np.abs(off).max()


def test_rescale_is_per_image_and_needs_guidance(student):
    options = {"styles": "left", "num_inference_steps": 2, "output": "latents"}
    plain = student(PROMPTS, guidance_scale=5.0, **options)
    mixed = student(PROMPTS, guidance_scale=5.0, guidance_rescale=[0.0, 0.7], **options)
    assert np.abs(plain[0] - mixed[0]).max() < 1e-5 * np.abs(plain).max() < np.abs(plain[1] - mixed[1]).max()
    unguided = [student(PROMPTS, guidance_scale=1.0, guidance_rescale=share, **options) for share in (0.0, 0.7)]
    assert np.array_equal(*unguided)


def test_weights_and_long_prompts_change_images(student):
    options = QUICK | {"styles": "left", "output": "latents"}
    plain = student(["a (large:1.0) red circle"], **options)
    assert np.array_equal(plain, student(["a large red circle"], **options))
    assert not np.array_equal(plain, student(["a (large:1.5) red circle"], **options))
    both = student(["a large red circle", "a red circle BREAK a star"], **options)
    alone = student(["a large red circle"], num_chunks=2, **options)
    assert both.shape[0] == 2 and np.abs(both[0] - alone[0]).max() < 1e-5 * np.abs(both).max()
    assert student.encode_prompts(["a BREAK b"]).encoder_hidden_states.shape[1] == 154


def test_plain_grammar_reads_brackets_as_text(student):
    plain = dataclasses.replace(student, prompt_grammar="plain")
    assert plain.tokenize(["(star) BREAK"]).input_ids.shape[1] == 1
    assert not np.array_equal(plain.tokenize(["(star)"]).input_ids, student.tokenize(["(star)"]).input_ids)


def test_an_embedding_of_words_draws_as_these_words(student, tmp_path):
    """An embedding that holds the vectors of two words is these words, at any place and weight."""
    tokenizer, params = student.tokenizers.tokenizers[0], student.text_encoders.params["text_encoder"]
    rows = np.asarray(params["text_model"]["embeddings"]["token_embedding"]["embedding"])
    save(tmp_path / "shape.safetensors", {"emb_params": rows[tokenizer.token_ids("red circle")]}, {})
    taught = student.with_embeddings([tmp_path / "shape.safetensors"])
    assert taught.embeddings == {"shape": 2}
    prompts = ["a large (Shape:1.3), a <shape>", "embedding:shape on a star"]
    words = ["a large (red circle:1.3), a red circle", "red circle on a star"]
    options = QUICK | {"styles": "left", "output": "latents"}
    assert np.array_equal(taught(prompts, **options), student(words, **options))
    with pytest.raises(ValueError, match="no embedding '<shap>'; did you mean '<shape>'.* There are: "):
        taught(["a <shap>"], **options)
    with pytest.raises(ValueError, match="no embedding 'shape': give its file"):
        student(["a embedding:shape"], **options)
    with pytest.raises(ValueError, match="two embeddings are called shape"):
        taught.with_embeddings([tmp_path / "shape.safetensors"])


def test_a_token_without_a_row_is_refused(student):
    params = jax.tree.map(lambda leaf: leaf, student.text_encoders.params)
    embeddings = params["text_encoder"]["text_model"]["embeddings"]["token_embedding"]
    embeddings["embedding"] = embeddings["embedding"][:-1]
    short = dataclasses.replace(student, text_encoders=Network(student.text_encoders.graph, params))
    with pytest.raises(ValueError, match="has no row for the token '<.endoftext.>'"):
        short(PROMPTS, styles="left", **QUICK)


def test_several_images_per_prompt_have_their_own_seeds(student):
    options = QUICK | {"styles": ["left", "right"], "output": "latents"}
    four = student(PROMPTS, num_images_per_prompt=2, **options)
    expanded = [text for text in PROMPTS for _ in range(2)]
    assert np.array_equal(four, student(expanded, **{**options, "styles": ["left", "left", "right", "right"]}))


def test_a_string_and_pil_are_accepted(student):
    options = QUICK | {"styles": "left"}
    (image,) = student(PROMPTS[0], output="pil", negative_prompt="blur", **options)
    assert np.array_equal(image, student(PROMPTS[:1], negative_prompts="blur", **options)[0])


@pytest.mark.parametrize("solver", ["unipc", "dpmpp_sde"])
def test_a_callback_sees_every_evaluation_and_may_stop(student, solver):
    options = QUICK | {"styles": SWITCHED, "output": "latents", "solver": solver}
    seen = []
    watched = student(PROMPTS, callback=lambda *event: seen.append(event), **options)
    plain, count = student(PROMPTS, **options), {"unipc": 2, "dpmpp_sde": 3}[solver]
    assert [number for number, _, _ in seen] == list(range(count)) and seen[0][1] == 999.0
    assert np.abs(watched - plain).max() < 1e-5 * np.abs(plain).max()
    stopped = student(PROMPTS, callback=lambda *_: False, **options)
    np.testing.assert_array_equal(stopped, seen[0][2])
    small = student.preview(seen[0][2])
    assert small.dtype == np.uint8 and small.shape == (*seen[0][2].shape[:3], 3)


def test_new_prompts_styles_seeds_and_scales_compile_nothing(student):
    student(PROMPTS, styles="left", **QUICK)
    before = drawing.denoise._cache_size()
    student(["a small green square", "x"], styles=["right", {"left": 0.5, "right": 0.5}], seeds=[8, 9],
            num_inference_steps=2, guidance_scale=5.0, negative_prompts="blur", solver="euler")  # fmt: skip
    assert drawing.denoise._cache_size() == before


def test_decoding_in_parts_gives_the_same_images(student, monkeypatch):
    latents = np.random.default_rng(0).standard_normal((5, 8, 24, 4), np.float32)
    at_once, num_programs = np.asarray(student.decode(latents), np.int32), drawing.decode._cache_size()
    monkeypatch.setattr(pipeline_lib, "PIXELS_DECODED", 2 * 64 * 192)
    parts = np.asarray(student.decode(latents), np.int32)
    assert parts.shape == at_once.shape and np.abs(parts - at_once).max() <= 1
    assert drawing.decode._cache_size() == num_programs + 1  # Parts of two; the last is padded.


def test_pictures_with_nan_are_refused_by_name(student):
    params = student.unet.params
    last = jax.tree.map(lambda leaf: leaf * np.nan, params["conv_out"])
    broken = dataclasses.replace(student, unet=pipeline_lib.Network(student.unet.graph, {**params, "conv_out": last}))
    with pytest.raises(UserError, match="latents of 'a large red circle' in style left; 'a small blue star' in style"):
        broken(PROMPTS, styles=["left", "right"], **QUICK)
    latents = np.zeros((2, 8, 8, 4), np.float32)
    latents[1] = np.inf
    with pytest.raises(UserError, match="pixels of image 1 hold NaN"):
        student.decode(latents)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"styles": "lefd"}, "did you mean 'left'"),
        ({"styles": None}, "it has: left, right"),
        ({"styles": ["left"]}, "2 prompts"),
        ({"styles": "left", "seeds": [1]}, "seeds has 1"),
        ({"styles": "left", "height": 63}, "Use 56"),
        ({"styles": "left", "solver": "eular"}, "did you mean 'euler'"),
        ({"styles": "left", "height": 7}, "Use 8"),
        ({"styles": "left", "latents": np.zeros((1, 8, 8, 4))}, "unit noise"),
        ({"styles": "left", "latents": np.full((2, 8, 8, 4), np.nan)}, "finite unit noise"),
        ({"styles": "left", "latents": np.zeros((2, 8, 8, 4)), "height": 128}, r"shape \(2, 16, 8, 4\)"),
        ({"styles": "left", "seeds": [1, -1]}, "a seed must be a whole number from 0"),
        ({"styles": "left", "seeds": [1, 2**32]}, "a seed must be a whole number from 0"),
        ({"styles": "left", "mixing": "pixels"}, "rows, predictions; got 'pixels'"),
        ({"styles": {"left": 1.0, "right": 0.5}, "mixing": "predictions"}, "sum to 1; those of a mix sum to 1.5"),
        ({"styles": "left", "output": "png"}, "images, pil, latents; got 'png'"),
        ({"styles": "left", "prompt": "x"}, "prompt; did you mean prompts?"),
        ({"styles": "left", "hight": 64}, "hight; did you mean height?"),
        ({"styles": "left", "clip_skip": 2}, "an argument of Pipeline.from_pretrained"),
        ({"styles": "left", "num_images_per_prompt": 0}, "num_images_per_prompt must be"),
        ({"styles": ["left"] * 3, "num_images_per_prompt": 2}, "styles has 3 entries for 4 prompts"),
    ],
)
def test_unfit_arguments_are_refused(student, arguments, message):
    with pytest.raises(ValueError, match=message):
        student(PROMPTS, **QUICK, **arguments)


@pytest.mark.parametrize("scale, message", [(float("nan"), "finite number"), ([2.0], "has 1 entries for 2 prompts")])
def test_unfit_guidance_scales_are_refused(student, scale, message):
    with pytest.raises(ValueError, match=f"guidance_scale .*{message}"):
        student(PROMPTS, styles="left", num_inference_steps=2, guidance_scale=scale)


@pytest.mark.parametrize("share, message", [(1.5, "from 0 to 1"), ([0.5], "has 1 entries for 2 prompts")])
def test_unfit_rescales_are_refused(student, share, message):
    with pytest.raises(ValueError, match=f"guidance_rescale .*{message}"):
        student(PROMPTS, styles="left", guidance_rescale=share)


def test_empty_prompts_and_unknown_dtypes_are_refused(student, trained):
    with pytest.raises(ValueError, match="prompts is empty"):
        student([], styles="left")
    for dtype in ("foo", "int32"):
        with pytest.raises(ValueError, match="float32, bfloat16; got"):
            Pipeline.from_pretrained(trained, dtype=dtype)


def test_a_seed_draws_the_same_noise_in_batches_of_any_size(student):
    options = QUICK | {"styles": "left", "output": "latents"}
    five = student([PROMPTS[0]] * 5, seeds=[3, 4, 5, 6, 7], **options)
    single = student(PROMPTS[:1], seeds=[5], **options)
    assert np.abs(single[0] - five[2]).max() < 1e-5 * np.abs(single).max()
    keys = jax.vmap(jax.random.key)(np.arange(5, dtype=np.uint32))
    noise = [drawing.unit_noise(part, (8, 8, 4)) for part in (keys, keys[3:4])]
    assert np.array_equal(noise[0][3], noise[1][0])


def test_a_runs_own_pipeline_draws_as_its_config_says(tiny):
    config = tiny[1].copy_and_resolve_references()
    config.sampling.guidance_scale, config.sampling.solver = 2.5, "euler"
    assert Distillation(config)._empty_pipeline.sampling == solver_options(config)


def test_defaults_are_taken_by_name_in_any_order(student):
    defaults = {"solver": "euler", "guidance_rescale": 0.25, "guidance_scale": 2.0, "num_inference_steps": 2}
    drawn = dataclasses.replace(student, default_sampling=defaults)(PROMPTS, styles="left", output="latents")
    assert np.array_equal(drawn, student(PROMPTS, styles="left", output="latents", **defaults))


def test_a_stock_checkpoint_takes_no_style(tiny):
    stock = Pipeline.from_pretrained(tiny[0]["base"])
    assert stock.styles == ()
    with pytest.raises(ValueError, match="has no styles"):
        stock(PROMPTS, styles="left", **QUICK)


SWITCHED = [(1000, "left"), (500, "right")]


@pytest.mark.parametrize("solver", ["dpmpp_2m", "heun"])
def test_a_schedule_of_one_style_is_that_style(student, solver):
    options = QUICK | {"output": "latents", "solver": solver}
    constant = [[(1000, "left")], [(1000, "left"), (500, "left")]]
    assert np.array_equal(student(PROMPTS, styles="left", **options), student(PROMPTS, styles=constant, **options))


def test_a_switch_after_the_last_evaluation_changes_nothing(student):
    options = QUICK | {"output": "latents"}  # Evaluations at timesteps 999 and 500.
    late, switched = (student(PROMPTS, styles=[(1000, "left"), (at, "right")], **options) for at in (400, 600))
    of_left = student(PROMPTS, styles="left", **options)
    assert np.array_equal(late, of_left)
    assert not np.array_equal(switched, of_left)


def test_each_image_has_its_own_schedule_and_nothing_compiles(student):
    options = QUICK | {"output": "latents", "seeds": [5, 6]}
    faded = [(1000, "right"), ((900, 100), {"left": 0.5, "right": 0.5})]
    alone = [student(PROMPTS, styles=style, **options) for style in (SWITCHED, faded)]
    before = drawing.denoise._cache_size()
    both = student(PROMPTS, styles=[SWITCHED, faded], **options)
    assert np.array_equal(both, [alone[0][0], alone[1][1]])
    student(PROMPTS, styles=["left", SWITCHED], **options)
    assert drawing.denoise._cache_size() == before


ON_TWO_DEVICES = """
import sys, jax, numpy as np
from dmm_jax import pipeline as lib
from dmm_jax.models import drawing
shards = []
denoise = drawing.denoise
drawing.denoise = lambda *args: (shards.append(len(args[4].addressable_shards[0].data)), denoise(*args))[1]
student = lib.Pipeline.from_pretrained(sys.argv[1])
options = {"num_inference_steps": 2, "guidance_scale": 2.0, "output": "latents"}
latents = [student(["a large red circle"] * n, styles="left", **options) for n in (2, 3)]
assert shards == [1, 3], shards
np.savez(sys.argv[2], *latents)
"""


def test_two_devices_share_a_batch_and_draw_the_same(student, trained, tmp_path):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(pathlib.Path(__file__).parent.parent)}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    command = [sys.executable, "-c", ON_TWO_DEVICES, str(trained), str(tmp_path / "latents.npz")]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]
    for shared in np.load(tmp_path / "latents.npz").values():
        single = student(["a large red circle"] * len(shared), styles="left", output="latents", **QUICK)
        assert np.abs(single - shared).max() < 1e-5 * np.abs(single).max()


@pytest.mark.skipif(not compiler.is_installed(), reason="needs libtpu: pip install 'dmm-jax[plan]'")
def test_a_decoded_part_of_xl_images_fits_a_v5e():
    device = compiler.tpu_mesh("v5e:2x2", teacher=1, data=4, fsdp=1).devices.flat[:1]
    placed = NamedSharding(Mesh(device, "device"), PartitionSpec())
    config = networks.abstract_checkpoint("sdxl").vae_config
    model = abstract_model(lambda rngs: AutoencoderKL.from_config(config, dtype=jnp.bfloat16, rngs=rngs))
    graph, state = nnx.split(model, nnx.Param)
    decoded, encoded = (pixels // 1024**2 for pixels in (pipeline_lib.PIXELS_DECODED, prepare.PIXELS_ENCODED))

    def put(tree):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed), tree)

    def temporaries(run, *batch):
        params = jax.eval_shape(lambda params: cast_params(params, jnp.bfloat16), nnx.to_pure_dict(state))
        with jax.default_matmul_precision("default"):
            compiled = run.lower(graph, put(params), *put(batch)).compile(compiler_options=compiler.LEAST_EFFORT)
        return compiled.memory_analysis().temp_size_in_bytes / devices.GIB

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), encoded))
    images = jax.ShapeDtypeStruct((encoded, 1024, 1024, 3), jnp.uint8)
    assert temporaries(drawing.decode, jax.ShapeDtypeStruct((decoded, 128, 128, 4), jnp.float32)) < 6
    assert temporaries(prepare._encode, images, keys) < 9
