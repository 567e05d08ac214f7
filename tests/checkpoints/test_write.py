"""Stock diffusers opens our exports and predicts the same; our own exports open with the same bits."""

import collections
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from dmm_jax.checkpoints import modelspec, naming, published, write
from dmm_jax.checkpoints.abstract import abstract_model, abstract_params
from dmm_jax.checkpoints.checkpoint import Checkpoint, Component
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats.safetensors_io import Computed, TensorFile, Tensors
from dmm_jax.checkpoints.modelspec import Recipe
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.styles import fold_style, style_vector
from dmm_jax.models.unet_2d_condition import UNet2DConditionModel
from dmm_jax.models.unet_config import merged_config
from dmm_jax.runtime.errors import UserError

WEIGHTS = np.array([0.7, 0.5, -0.2], np.float32)
COMPONENTS = ("unet", "vae", "text_encoder")
TOLERANCE = 1e-5  # Relative to the output's maximum.
SD15 = {"cross_attention_dim": 768}  # The rest are class defaults.


def assert_equal(first, second):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True), first, second)


def unet_inputs():
    rng = np.random.default_rng(1)
    latents, text = rng.standard_normal((2, 8, 8, 4), np.float32), rng.standard_normal((2, 77, 64), np.float32)
    return latents, np.array([7, 800]), text


def network(checkpoint: Checkpoint):
    model = abstract_model(lambda rngs: UNet2DConditionModel.from_config(checkpoint.unet_config, rngs=rngs))
    return nnx.split(model)[0], checkpoint.params("unet")


@functools.partial(jax.jit, static_argnums=0)
def predict(graph, params, weights, latents, timesteps, text):
    unet = nnx.merge(graph, params)
    style = unet.style_embedding(jnp.stack([weights] * len(latents)))
    return unet(latents, timesteps, text, style_embedding=style).sample


def our_prediction(student: Checkpoint, weights):
    return np.asarray(predict(*network(student), weights, *unet_inputs()))


def their_prediction(unet):
    torch = pytest.importorskip("torch")
    latents, timesteps, text = unet_inputs()
    with torch.no_grad():
        latents = torch.from_numpy(latents.transpose(0, 3, 1, 2).copy())
        sample = unet(latents, torch.from_numpy(timesteps), torch.from_numpy(text)).sample
    return sample.numpy().transpose(0, 2, 3, 1)


def assert_same_prediction(prediction, expected):
    assert np.abs(prediction - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.fixture(scope="module")
def stock_folder(student, tmp_path_factory):
    out = tmp_path_factory.mktemp("diffusers")
    return write.write_format(out, "diffusers", student, WEIGHTS, "float32", Recipe("tiny", [], None))


@pytest.fixture(scope="module")
def stock_file(student, tmp_path_factory):
    out = tmp_path_factory.mktemp("single")
    return write.write_format(out, "single-file", student, WEIGHTS, "float32", Recipe("tiny", [], None))


def test_diffusers_predicts_the_same_from_the_folder(student, stock_folder):
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(stock_folder, safety_checker=None, local_files_only=True)
    assert type(pipe.unet) is diffusers.UNet2DConditionModel and type(pipe.scheduler) is diffusers.PNDMScheduler
    assert_same_prediction(their_prediction(pipe.unet), our_prediction(student, WEIGHTS))
    assert pipe.tokenizer("a red circle").input_ids[0] == 579


def test_diffusers_predicts_the_same_from_the_single_file(student, folder, stock, stock_file):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_single_file(
        str(stock_file), config=str(folder), local_files_only=True, safety_checker=None
    )
    assert_same_prediction(their_prediction(pipe.unet), our_prediction(student, WEIGHTS))
    for name in ("vae", "text_encoder"):
        opened, original = getattr(pipe, name).state_dict(), getattr(stock, name).state_dict()
        assert set(opened) == set(original)
        assert all(torch.equal(opened[key].float(), original[key].float()) for key in original)


def test_the_style_changes_the_prediction_and_is_folded_in(student, stock_folder):
    styled, bare = our_prediction(student, WEIGHTS), our_prediction(student, np.zeros(3, np.float32))
    assert np.abs(styled - bare).max() > 100 * TOLERANCE * np.abs(styled).max()
    assert open_checkpoint(stock_folder).styles is None


def test_the_folded_vector_is_the_one_that_the_network_adds(student):
    graph, params = network(student)
    unet = nnx.merge(graph, jax.tree.map(jnp.asarray, params))
    expected = unet.add_embedding(unet.style_embedding(jnp.asarray(WEIGHTS[None])))[0]
    vector = style_vector(naming.to_torch(params), "add_embedding", WEIGHTS)
    assert vector.dtype == np.float32
    np.testing.assert_allclose(vector, expected, rtol=1e-5, atol=1e-6)


def test_folding_changes_one_bias_and_drops_the_style_table(student):
    stock = fold_style(student, WEIGHTS)
    before, after = naming.to_torch(student.params("unet")), naming.to_torch(stock.params("unet"))
    changed = {key for key in after if not np.array_equal(before[key], after[key])}
    assert changed == {"time_embedding.linear_2.bias"}
    assert len(before) - len(after) == 5
    assert stock.styles is None and "num_models" not in stock.unet_config


@pytest.mark.parametrize("dtype", write.DTYPES)
@pytest.mark.parametrize("fmt", write.CHECKPOINTS)
def test_an_export_comes_back_bit_for_bit(student, recipe, tmp_path, fmt, dtype):
    source = student if fmt == "dmm" else fold_style(student, WEIGHTS)
    back = open_checkpoint(write.write_format(tmp_path, fmt, student, WEIGHTS, dtype, recipe))
    assert back.kind == fmt and back.styles == (student.styles if fmt == "dmm" else None)
    for component in COMPONENTS:
        cast = jax.tree.map(lambda leaf: np.asarray(leaf).astype(write.DTYPES[dtype]), source.params(component))
        assert_equal(back.params(component), cast)
        assert_equal(back.abstract(component), source.abstract(component))


def test_a_dmm_folder_has_exactly_the_contracts_keys_and_files(student, recipe, tmp_path):
    out = write.write_format(tmp_path, "dmm", student, None, "float16", recipe)
    weights = "diffusion_pytorch_model.safetensors"
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {
        "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json",
        "text_encoder/model.safetensors", "tokenizer/vocab.json", "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json", "tokenizer/tokenizer_config.json", "unet/config.json", f"unet/{weights}",
        "vae/config.json", f"vae/{weights}",
    }  # fmt: skip
    index = json.loads((out / "model_index.json").read_text())
    assert index == {
        "_class_name": "StableDiffusionDMMPipeline", "_diffusers_version": "0.24.0",
        "unet": ["modeling.dmm_unet", "DMMUNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "PNDMScheduler"], "safety_checker": [None, None], "feature_extractor": [None, None],
        "image_encoder": [None, None], "requires_safety_checker": False,
    }  # fmt: skip
    config = json.loads((out / "unet" / "config.json").read_text())
    expected = {"_class_name": "DMMUNet2DConditionModel", "addition_embed_type": "model_merge", "num_models": 3}
    assert config | expected == config and config["num_attention_heads"] is None
    assert set(TensorFile(out / "unet" / weights)) == set(student.shapes("unet"))


def test_dmm_keys_are_those_of_the_original_class():
    path = pathlib.Path(__file__).parents[1] / "data" / "dmm_unet_state_dict_keys.txt"
    expected = dict(line.split("\t") for line in path.read_text().splitlines())
    shapes = naming.torch_shapes(abstract_params("unet", merged_config(SD15, 8)))
    assert {key: str(shape) for key, shape in shapes.items()} == expected
    assert len(shapes) == 691 and sum(map(np.prod, shapes.values())) == 862_810_564


def test_text_encoders_are_written_with_their_prefix(student, recipe, tmp_path):
    out = write.write_format(tmp_path, "diffusers", student, WEIGHTS, "float16", recipe)
    assert all(key.startswith("text_model.") for key in TensorFile(out / "text_encoder" / "model.safetensors"))


@pytest.mark.parametrize("fmt", write.CHECKPOINTS)
def test_the_metadata_of_a_file_follow_modelspec(student, recipe, tmp_path, fmt):
    out = write.write_format(tmp_path, fmt, student, WEIGHTS, "float16", recipe)
    path = out if fmt == "single-file" else out / "unet" / "diffusion_pytorch_model.safetensors"
    metadata, raw = TensorFile(path).metadata, path.read_bytes()
    assert metadata["format"] == "pt"
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1" + ("/dmm" if fmt == "dmm" else "")
    assert metadata["modelspec.implementation"] == ("sgm" if fmt == "single-file" else "diffusers")
    assert metadata["modelspec.title"] == "tiny" and metadata["modelspec.merged_from"] == "a, b"
    assert metadata["modelspec.resolution"] == "64x64" and metadata["modelspec.prediction_type"] == "epsilon"
    data = raw[8 + struct.unpack("<Q", raw[:8])[0] :]
    assert metadata["modelspec.hash_sha256"] == "0x" + hashlib.sha256(data).hexdigest()
    assert json.loads(metadata["dmm_jax.recipe"]) == recipe.details
    assert ("dmm_jax.config.styles" in metadata) == (fmt == "dmm")


@pytest.mark.parametrize(
    "name, prediction_type, expected",
    [
        ("sd15", "epsilon", "stable-diffusion-v1"), ("sdxl", "v_prediction", "stable-diffusion-xl-v1-base"),
        ("sd21", "epsilon", "stable-diffusion-v2-512"), ("sd21", "v_prediction", "stable-diffusion-v2-768-v"),
        ("sd21", "unknown", "stable-diffusion-v2"),
    ],
)  # fmt: skip
def test_modelspecs_required_fields_include_the_prediction_of_sd2(name, prediction_type, expected, recipe):
    source = published.checkpoint(name)
    source = dataclasses.replace(
        source, scheduler_config=source.scheduler_config | {"prediction_type": prediction_type}
    )
    metadata = modelspec.metadata(source, dataclasses.replace(recipe, merged_from=["a, b", "c"]), "sgm")
    required = ("sai_model_spec", "architecture", "implementation", "title", "resolution")
    assert all(metadata[f"modelspec.{field}"] for field in required) and metadata["modelspec.architecture"] == expected
    assert metadata["modelspec.merged_from"].split(", ") == ["a  b", "c"]


def test_the_recipe_can_be_left_out(student, recipe, tmp_path):
    without_details = dataclasses.replace(recipe, details=None)
    out = write.write_format(tmp_path, "single-file", student, WEIGHTS, "float16", without_details)
    assert "dmm_jax.recipe" not in TensorFile(out).metadata


def test_v_prediction_and_zero_snr_travel_as_empty_tensors(student, recipe, tmp_path):
    schedule = student.scheduler_config | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    out = write.write_format(
        tmp_path, "single-file", dataclasses.replace(student, scheduler_config=schedule), WEIGHTS, "float16", recipe
    )
    file = TensorFile(out)
    assert file.shape("v_pred") == file.shape("ztsnr") == (0,)
    assert file.metadata["modelspec.prediction_type"] == "v"
    back = open_checkpoint(out)
    assert back.prediction_type == "v_prediction" and back.scheduler_config["rescale_betas_zero_snr"] is True


def replaced(student, component, **tensors) -> Checkpoint:
    original = student.components[component]
    changed = {key.replace("__", "."): value for key, value in tensors.items()}
    new = Component(original.config, lambda: {**original.tensors, **changed})
    return dataclasses.replace(student, components={**student.components, component: new})


@pytest.mark.parametrize("fmt", write.CHECKPOINTS)
def test_a_value_too_large_for_float16_is_named_and_nothing_is_left(student, recipe, tmp_path, fmt):
    large = replaced(student, "vae", decoder__conv_out__bias=np.full(3, 1e5, np.float32))
    with pytest.raises(CheckpointError, match="float16's 65504 in decoder.conv_out.bias"):
        write.write_format(tmp_path, fmt, large, WEIGHTS, "float16", recipe)
    assert not os.listdir(tmp_path)
    write.write_format(tmp_path, fmt, large, WEIGHTS, "bfloat16", recipe)


@pytest.mark.parametrize("fmt", write.CHECKPOINTS)
def test_a_damaged_student_is_not_exported_and_nothing_is_left(student, recipe, tmp_path, fmt):
    damaged = replaced(student, "unet", conv_out__bias=np.full(4, np.nan, np.float32))
    with pytest.raises(CheckpointError, match="NaN or infinity in conv_out.bias"):
        write.write_format(tmp_path, fmt, damaged, WEIGHTS, "float16", recipe)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("fmt", write.CHECKPOINTS)
def test_nothing_is_overwritten(student, recipe, tmp_path, fmt):
    out = write.write_format(tmp_path, fmt, student, WEIGHTS, "float16", recipe)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(UserError, match=f"{out.name} .*; nothing is overwritten"):
        write.write_format(tmp_path, fmt, student, WEIGHTS, "float16", recipe)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_folding_needs_as_many_weights_as_there_are_styles(student, folder):
    with pytest.raises(CheckpointError, match="no styles to fold in"):
        fold_style(open_checkpoint(folder), WEIGHTS)
    with pytest.raises(CheckpointError, match="3 styles; got 2 weights"):
        fold_style(student, WEIGHTS[:2])


def test_an_unsupported_checkpoint_is_not_exported(student, recipe, tmp_path):
    for writer, name in ((write.write_folder, "x"), (write.write_single_file, "x.safetensors")):
        with pytest.raises(CheckpointError, match="cannot be exported: because"):
            writer(tmp_path / name, dataclasses.replace(student, unsupported="because"), "float16", recipe)


@pytest.mark.parametrize("fmt", ["dmm", "diffusers"])
def test_parts_under_an_index_come_back_bit_for_bit(student, recipe, tmp_path, fmt):
    limit = 100_000
    out = write.write_format(tmp_path / "parts", fmt, student, WEIGHTS, "float16", recipe, limit)
    complete = open_checkpoint(write.write_format(tmp_path / "complete", fmt, student, WEIGHTS, "float16", recipe))
    for network in COMPONENTS:
        files = [TensorFile(path) for path in sorted((out / network).glob("*.safetensors"))]
        assert len(files) > 1 and all(file.num_bytes <= limit or len(file) == 1 for file in files)
        (index,) = (out / network).glob("*.safetensors.index.json")
        assert json.loads(index.read_text())["metadata"]["total_size"] == sum(file.num_bytes for file in files)
        assert open_checkpoint(out).digest(network) == complete.digest(network)
    assert open_checkpoint(out).styles == complete.styles


def test_diffusers_opens_parts_under_an_index(student, stock, recipe, tmp_path):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    out = write.write_format(tmp_path, "diffusers", student, WEIGHTS, "float32", recipe, 100_000)
    assert all(len(list((out / network).glob("*-of-*.safetensors"))) > 1 for network in COMPONENTS)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(out, safety_checker=None, local_files_only=True)
    for name in ("vae", "text_encoder"):
        opened, original = getattr(pipe, name).state_dict(), getattr(stock, name).state_dict()
        assert set(opened) == set(original) and all(torch.equal(opened[key], original[key]) for key in original)
    assert_same_prediction(their_prediction(pipe.unet), our_prediction(student, WEIGHTS))


def test_zero_snr_is_written_for_a_scheduler_class_that_obeys_it(student, recipe, tmp_path):
    schedule = student.scheduler_config | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert schedule["_class_name"] == "PNDMScheduler"  # This class ignores the flag.
    source = dataclasses.replace(student, scheduler_config=schedule)
    written = open_checkpoint(
        write.write_format(tmp_path, "diffusers", source, WEIGHTS, "float16", recipe)
    ).scheduler_config
    assert written["_class_name"] == "DDIMScheduler" and written["prediction_type"] == "v_prediction"


@pytest.mark.parametrize("fmt", write.CHECKPOINTS)
def test_every_tensor_is_read_once(student, recipe, tmp_path, fmt):
    reads = collections.Counter()

    def counted(component):
        tensors = student.tensors(component)

        def read(key):
            reads[component, key] += 1
            return np.asarray(tensors[key])

        return Tensors({
            key: Computed(np.shape(tensors[key]), np.asarray(tensors[key]).dtype, functools.partial(read, key))
            for key in tensors
        })  # fmt: skip

    parts = {
        name: Component(part.config, functools.partial(counted, name)) for name, part in student.components.items()
    }
    weights = None if fmt == "dmm" else WEIGHTS
    write.write_format(tmp_path, fmt, dataclasses.replace(student, components=parts), weights, "float16", recipe)
    repeated = [key for key, count in reads.items() if count > 1]
    # The run-time type checks of the tests read this bias a second time.
    assert len(reads) > 100 and repeated in ([], [("unet", "add_embedding.linear_1.bias")])


def test_bfloat16_rounds_once(student, recipe, tmp_path):
    bias = naming.to_torch(fold_style(student, WEIGHTS).params("unet"))["time_embedding.linear_2.bias"]
    out = write.write_format(tmp_path, "single-file", student, WEIGHTS, "bfloat16", recipe)
    stored = TensorFile(out)["model.diffusion_model.time_embed.2.bias"]
    np.testing.assert_array_equal(stored, bias.astype(ml_dtypes.bfloat16))
