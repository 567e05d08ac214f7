"""`--vae` replaces the VAE alone, whatever form the other one comes in, and refuses one of other latents."""

import dataclasses
import json
import re
import shutil
import warnings

import numpy as np
import pytest

from dmm_jax.checkpoints import vae, write
from dmm_jax.checkpoints.average import average
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.export import export
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, save
from dmm_jax.checkpoints.inspect import inspect
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.pipeline import Pipeline
from tests import families
from tests.checkpoints.files import rewrite, rewrite_json

KEY = "decoder.conv_out.weight"


@pytest.fixture(scope="module")
def other(folder, tmp_path_factory):
    """{form: path} of one VAE that differs from the base's."""
    root = tmp_path_factory.mktemp("vae")
    whole = shutil.copytree(folder, root / "whole")
    weights = whole / "vae" / "diffusion_pytorch_model.safetensors"
    rewrite(weights, lambda tensors: tensors.update({KEY: tensors[KEY] + 1}))
    single = write.write_single_file(root / "single.safetensors", open_checkpoint(whole), "float32", families.RECIPE)
    file = TensorFile(single)
    prefix = "first_stage_model."
    prefixed = {key: np.array(file[key]) for key in file if key.startswith(prefix)}
    save(root / "prefixed.safetensors", prefixed)
    bare = {key.removeprefix(prefix): array for key, array in prefixed.items()}
    save(root / "bare.safetensors", bare | {"loss.logvar": np.zeros(1, np.float32)})
    return {
        "a folder of a pipeline": whole, "a folder of a VAE": whole / "vae", "a file with diffusers' keys": weights,
        "a single file": single, "a file with a prefix": root / "prefixed.safetensors",
        "a bare file": root / "bare.safetensors",
    }  # fmt: skip


FORMS = (
    "a folder of a pipeline", "a folder of a VAE", "a file with diffusers' keys", "a single file",
    "a file with a prefix", "a bare file",
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_vae_replaces_the_base_s(folder, other, form):
    base = open_checkpoint(folder)
    changed = vae.with_vae(base, other[form])
    expected = open_checkpoint(other["a folder of a pipeline"])
    assert changed.digest("vae") == expected.digest("vae") != base.digest("vae")
    assert changed.digest("unet") == base.digest("unet")
    assert changed.vae_config["scaling_factor"] == base.vae_config["scaling_factor"]
    assert vae.with_vae(base, "") is base


@pytest.mark.parametrize("form", ["a file with diffusers' keys", "a file with a prefix", "a bare file"])
def test_inspect_says_that_a_file_is_a_vae(other, form):
    report = inspect([other[form]])
    assert not report["mergeable"] and "it is a VAE alone, for `sample --vae`" in report["obstacles"][0]


def retrained(tensors):
    """Replaces an encoder's kernels by those of another training; nothing in them reminds of the old ones."""
    rng = np.random.default_rng(5)
    for key, array in tensors.items():
        if "encoder." in key and array.ndim > 1:
            tensors[key] = rng.standard_normal(array.shape, np.float32)


def assert_no_doubt(base, path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return vae.with_vae(base, path)


@pytest.mark.parametrize("form", FORMS)
def test_a_vae_of_the_same_training_raises_no_doubt(folder, other, form):
    assert_no_doubt(open_checkpoint(folder), other[form])


def test_an_unknown_encoder_without_a_stated_family_is_doubted(folder, other, tmp_path):
    base, bare = open_checkpoint(folder), tmp_path / "bare.safetensors"
    shutil.copy(other["a bare file"], bare)
    rewrite(bare, lambda tensors: tensors.update({key: 1.5 * array for key, array in tensors.items()}))
    assert_no_doubt(base, bare)  # Fine-tuned: other norms, the same directions.
    rewrite(bare, retrained)
    with pytest.warns(UserWarning, match="does not state its family, and its encoder is unlike"):
        assert vae.with_vae(base, bare).digest("vae") != base.digest("vae")
    rewrite(bare, lambda tensors: None, {"modelspec.architecture": "stable-diffusion-v1"})
    assert_no_doubt(base, bare)
    rewrite(bare, lambda tensors: None, {"modelspec.architecture": "stable-diffusion-xl-v1-base/vae"})
    with pytest.raises(CheckpointError, match="scaling_factor 0.13025.*another family"):
        vae.with_vae(base, bare)


def test_the_config_beside_a_file_states_its_family(folder, other, tmp_path):
    base, copied = open_checkpoint(folder), shutil.copytree(other["a folder of a VAE"], tmp_path / "vae")
    weights = copied / "diffusion_pytorch_model.safetensors"
    rewrite(weights, retrained)
    assert_no_doubt(base, weights)
    rewrite_json(copied / "config.json", scaling_factor=0.13025)
    with pytest.raises(CheckpointError, match="scaling_factor 0.13025.*another family"):
        vae.with_vae(base, weights)
    rewrite_json(copied / "config.json", _class_name="AutoencoderTiny")  # Of another file in this folder.
    with pytest.warns(UserWarning, match="does not state its family"):
        vae.with_vae(base, weights)
    (copied / "config.json").unlink()
    with pytest.warns(UserWarning, match="does not state its family"):
        vae.with_vae(base, weights)


def test_export_average_and_pipeline_take_a_vae(folder, other, student, tmp_path):
    path, expected = other["a bare file"], open_checkpoint(other["a folder of a pipeline"])
    dmm = write.write_folder(tmp_path / "dmm", student, "float32", families.RECIPE)
    (single,) = export(dmm, tmp_path / "export", ["single-file"], "anime", "float32", vae=path)
    result = average(tmp_path / "average", folder, [folder], "average", dtype="float32", vae=path)
    assert f"vae: that of {path}" in result.notes
    for written in (single, result.path):
        np.testing.assert_array_equal(
            open_checkpoint(written).params("vae")["decoder"]["conv_out"]["kernel"],
            expected.params("vae")["decoder"]["conv_out"]["kernel"],
        )
    pipe = Pipeline.from_pretrained(folder, vae=path)
    kernel = expected.params("vae")["decoder"]["conv_out"]["kernel"]
    np.testing.assert_array_equal(np.asarray(pipe.vae.params["decoder"]["conv_out"]["kernel"]), kernel)


def test_a_vae_of_other_latents_is_refused(folder, other, tmp_path):
    base = open_checkpoint(folder)
    changed = shutil.copytree(other["a folder of a VAE"], tmp_path / "vae")
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.13025}))
    with pytest.raises(CheckpointError, match="scaling_factor 0.13025.*another family"):
        vae.with_vae(base, changed)
    with pytest.raises(CheckpointError, match="holds no VAE"):
        save(tmp_path / "x.safetensors", {"x": np.zeros(1, np.float32)})
        vae.with_vae(base, tmp_path / "x.safetensors")
    rewrite(other["a bare file"], lambda tensors: tensors.pop("decoder.conv_in.bias"))
    with pytest.raises(CheckpointError, match="1 missing: decoder.conv_in.bias"):
        vae.with_vae(base, other["a bare file"])


def test_only_kernels_and_matrices_of_encoders_are_compared():
    kernel = np.eye(3, dtype=np.float32)
    first = {"encoder.a.weight": kernel, "encoder.norm.weight": np.ones(3, np.float32), "decoder.a.weight": kernel}
    second = first | {"encoder.a.weight": kernel[::-1] - kernel}
    assert vae.encoder_similarity(first, first) == pytest.approx(1.0)
    assert vae.encoder_similarity(first, second) == pytest.approx(-1 / 3**0.5)
    assert vae.encoder_similarity({"encoder.a.weight": np.ones((2, 2), np.float32)}, first) == 0.0


def test_a_vae_of_another_network_or_number_of_channels_is_refused(folder, other, tmp_path):
    base, changed = open_checkpoint(folder), shutil.copytree(other["a folder of a VAE"], tmp_path / "vae")
    rewrite_json(changed / "config.json", latent_channels=16)
    with pytest.raises(CheckpointError, match="has latent_channels 16.*another family"):
        vae.with_vae(base, changed)
    rewrite_json(changed / "config.json", latent_channels=4, block_out_channels=[32, 64, 64])
    with pytest.raises(CheckpointError, match="has other latent cells"):
        vae.with_vae(base, changed)
    (changed / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(CheckpointError, match="is not the folder of a VAE"):
        vae.with_vae(base, changed)


@pytest.mark.parametrize("blocks", [5, "ab", None, {"a": 1}, [5, "a"], [[1], [2]], [0, 0]])
def test_a_damaged_config_of_a_vae_is_the_librarys_error(folder, other, tmp_path, blocks):
    changed = shutil.copytree(other["a folder of a VAE"], tmp_path / "vae")
    rewrite_json(changed / "config.json", block_out_channels=blocks)
    with pytest.raises(CheckpointError, match=re.escape(str(changed))):
        vae.with_vae(open_checkpoint(folder), changed)


@pytest.mark.parametrize("value, dtype, reason", [(np.nan, "float32", "NaN"), (1e6, "float16", "beyond float16")])
def test_damage_in_a_vae_is_reported_under_its_own_path(folder, other, student, tmp_path, value, dtype, reason):
    dmm = write.write_folder(tmp_path / "dmm", student, "float32", families.RECIPE)
    changed = shutil.copytree(other["a folder of a VAE"], tmp_path / "damaged")
    rewrite(changed / "diffusion_pytorch_model.safetensors", lambda tensors: tensors[KEY].fill(value))
    with pytest.raises(CheckpointError, match=f"vae of {re.escape(str(changed))}: .*{reason}"):
        export(dmm, tmp_path / "export", ["single-file"], "anime", dtype, vae=changed)
    assert not (tmp_path / "export").exists()


def test_a_replaced_vae_is_not_said_to_be_the_bases(folder, other):
    base = dataclasses.replace(open_checkpoint(folder), from_base=("vae", "text_encoder"))
    assert vae.with_vae(base, other["a folder of a VAE"]).from_base == ("text_encoder",)
