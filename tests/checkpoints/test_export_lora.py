"""A LoRA of a style, on the base, gives the style's own weights to the share that it keeps, here and in diffusers."""

import dataclasses
import json
import re

import ml_dtypes
import numpy as np
import pytest

from dmm_jax.checkpoints import export_lora, naming, write
from dmm_jax.checkpoints.checkpoint import Component
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.export import export
from dmm_jax.checkpoints.formats import extract_lora
from dmm_jax.checkpoints.formats.extract_lora import Rank
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile
from dmm_jax.checkpoints.inspect import inspect
from dmm_jax.checkpoints.inspect_text import render
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.styles import BIAS, fold_style
from dmm_jax.evaluation.lora_error import lora_error
from dmm_jax.runtime.errors import UserError
from tests import families

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
STYLES = ("anime", "../photo")  # A name never becomes a path.
FULL = Rank(rank=10_000)
MIX = "anime=0.7,../photo=0.3"


def changed_student(base, scale=0.02):
    """Returns a merged checkpoint whose UNet differs from the base's in every tensor but two."""
    student = families.random_student(base, STYLES)
    tensors, rng = student.tensors("unet"), np.random.default_rng(1)
    same = ("conv_out.weight", "conv_norm_out.weight")
    moved = {
        key: np.array(array, np.float32) + (0 if key in same else scale) * rng.standard_normal(array.shape, np.float32)
        for key, array in tensors.items()
    }
    components = {**student.components, "unet": Component(student.unet_config, lambda: moved)}
    return dataclasses.replace(student, components=components)


@pytest.fixture(scope="module", params=["sd1", *families.NAMES])
def merged(request, folder, tmp_path_factory):
    """(family, base folder, base, student) of each family."""
    path = folder if request.param == "sd1" else families.write_stock(
        tmp_path_factory.mktemp(request.param) / "base", request.param, 0
    )  # fmt: skip
    base = open_checkpoint(path)
    return request.param, path, base, changed_student(base)


@pytest.fixture(scope="module")
def first(folder):
    """(base folder, base, student) of Stable Diffusion 1."""
    base = open_checkpoint(folder)
    return folder, base, changed_student(base)


def write_loras(out, student, base, rank=FULL, tools=("comfyui",), style=MIX, dtype="float32", **options):
    mixes = export_lora.mixes_of(student, style)
    about = lambda mix: dataclasses.replace(families.RECIPE, title=mix)  # noqa: E731
    return export_lora.write_loras(out, student, base, mixes, rank, dtype, tools, about, {}, **options)


def assert_same_unet(actual, desired, tolerance=2e-6, ignored=()):
    tensors, expected = actual.tensors("unet"), desired.tensors("unet")
    names = naming.spellings(tensors)
    for key in expected:
        if key not in ignored:
            largest = np.abs(expected[key]).max()
            np.testing.assert_allclose(
                tensors[names[key]], expected[key], rtol=0, atol=tolerance * largest, err_msg=key
            )


def test_a_lora_of_full_rank_on_the_base_is_the_style(merged, tmp_path):
    _, path, base, student = merged
    (file,) = write_loras(tmp_path, student, base)
    assert file.name == "lora.safetensors"
    folded = open_checkpoint(f"{path} + {file}")
    assert_same_unet(folded, fold_style(student, np.array([0.7, 0.3], np.float32)))
    error = lora_error(fold_style(student, np.array([0.7, 0.3], np.float32)), base, file)
    assert error.lora < 1e-5 < 1e-2 < error.base


def test_the_stated_share_is_kept(first, tmp_path):
    path, base, student = first
    (file,) = write_loras(tmp_path, student, base, Rank(rank=4))
    folded, style = open_checkpoint(f"{path} + {file}"), fold_style(student, np.array([0.7, 0.3], np.float32))
    tensors, new, old = (it.tensors("unet") for it in (folded, style, base))
    rest, total = (sum(np.square(np.float64(new[k]) - it[k]).sum() for k in new) for it in (tensors, old))
    stated = float(TensorFile(file).metadata["dmm_jax.kept_share"])
    assert 0.1 < stated < 0.9 and 1 - rest / total == pytest.approx(stated, abs=1e-5)


def test_every_style_has_a_lora_and_the_layers_are_decomposed_once(first, tmp_path, monkeypatch):
    path, base, student = first
    calls, extract = [], export_lora.extract_lora.extract
    monkeypatch.setattr(export_lora.extract_lora, "extract", lambda *a, **k: calls.append(a) or extract(*a, **k))
    files = write_loras(tmp_path, student, base, style="")
    assert [file.name for file in files] == ["lora_anime.safetensors", "lora_photo.safetensors"] and len(calls) == 1
    assert sorted(tmp_path.iterdir()) == sorted(files)
    for row, file in zip(np.eye(2, dtype=np.float32), files, strict=True):
        assert_same_unet(open_checkpoint(f"{path} + {file}"), fold_style(student, row))
    assert list(export_lora.places(tmp_path, student, "", ("comfyui",))) == files


def test_a_style_alone_needs_one_bias(folder, tmp_path):
    base = open_checkpoint(folder)
    student = families.random_student(base, STYLES)
    kohya, peft = sorted(write_loras(tmp_path, student, base, tools=("a1111", "diffusers")))
    assert set(TensorFile(kohya)) == {f"lora_unet_time_embedding_linear_2.{role}" for role in ("diff", "diff_b")}
    assert {key.rpartition(".lora_")[2] for key in TensorFile(peft)} == {"A.weight", "B.weight", "B.bias"}
    for file in (kohya, peft):
        style = fold_style(student, np.array([0.7, 0.3], np.float32))
        assert_same_unet(open_checkpoint(f"{folder} + {file}"), style)


def with_text_encoders(student, base):
    """Returns a stock checkpoint of the first style whose text encoders differ from the base's."""
    rng = np.random.default_rng(2)
    components = dict(fold_style(student, np.array([1.0, 0.0], np.float32)).components)
    for name in base.text_encoders:
        moved = {
            key: np.array(array) if "embedding" in key or array.dtype.kind != "f"
            else array + 0.05 * rng.standard_normal(array.shape, np.float32)
            for key, array in base.tensors(name).items()
        }  # fmt: skip
        components[name] = Component(base.config(name), lambda moved=moved: moved)
    return dataclasses.replace(base, components=components)


def test_text_encoders_that_differ_are_part_of_the_lora(merged, tmp_path):
    family, path, base, student = merged
    tuned = with_text_encoders(student, base)
    (file,) = write_loras(tmp_path, tuned, base, style="")
    folded = open_checkpoint(f"{path} + {file}")
    for name in base.text_encoders:
        assert folded.digest(name) != base.digest(name)
        actual, expected = folded.tensors(name), tuned.tensors(name)
        for key in expected:
            np.testing.assert_allclose(np.float32(actual[key]), np.float32(expected[key]), atol=1e-5)


def test_an_equal_checkpoint_has_no_lora(first, tmp_path):
    _, base, _ = first
    with pytest.raises(CheckpointError, match="equals its base"):
        write_loras(tmp_path, dataclasses.replace(base, components=dict(base.components)), base, style="")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_diffusers_loads_its_spelling(folder, family, tmp_path):
    path = folder if family == "sd1" else families.write_stock(tmp_path / "base", family, 0)
    base = open_checkpoint(path)
    student = changed_student(base)
    of_norms = {key: base.tensors("unet")[key] for key in base.tensors("unet") if "norm" in key.split(".")[-2]}
    tensors = {**student.tensors("unet"), **of_norms}  # diffusers has no keys for differences of norms.
    student.components["unet"] = Component(student.unet_config, lambda: tensors)
    (tmp_path / "out").mkdir()
    (file,) = write_loras(tmp_path / "out", student, base, tools=("diffusers",), dtype="float32")
    kind = diffusers.StableDiffusionPipeline if family == "sd1" else diffusers.StableDiffusionXLPipeline
    pipe = kind.from_pretrained(path, local_files_only=True)
    style = fold_style(student, np.array([0.7, 0.3], np.float32))
    torch.manual_seed(0)
    latents, states = torch.randn(1, 4, 8, 8), torch.randn(1, 77, pipe.unet.config.cross_attention_dim)
    ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    added = {"text_embeds": torch.randn(1, 32), "time_ids": ids} if family == "sdxl" else None
    with torch.no_grad():
        of_base = pipe.unet(latents, 500, states, added_cond_kwargs=added).sample
        pipe.load_lora_weights(file.parent, weight_name=file.name, local_files_only=True)
        output = pipe.unet(latents, 500, states, added_cond_kwargs=added).sample
        pipe.unload_lora_weights()
        state = {key: torch.tensor(np.array(array)) for key, array in style.tensors("unet").items()}
        pipe.unet.load_state_dict(state)
        expected = pipe.unet(latents, 500, states, added_cond_kwargs=added).sample
    assert (output - expected).abs().max() < 1e-5 * expected.abs().max() < (of_base - expected).abs().max()


def test_export_writes_loras_of_a_dmm_folder_and_of_any_checkpoint(first, tmp_path):
    path, base, student = first
    dmm = write.write_folder(tmp_path / "dmm", student, "float32", families.RECIPE)
    with pytest.raises(UserError, match="give it by --base"):
        export(dmm, tmp_path / "out", ["lora"], dtype="float32")
    with pytest.raises(UserError, match="--rank takes"):
        export(dmm, tmp_path / "out", ["lora"], base=path, rank="x")
    with pytest.raises(UserError, match="--lora-for takes"):
        export(dmm, tmp_path / "out", ["lora"], base=path, lora_for=["x"])
    assert not (tmp_path / "out").exists()
    files = export(dmm, tmp_path / "out", ["lora"], dtype="float32", base=path, rank="auto:0.9", exact=True)
    assert {file.name for file in tmp_path.joinpath("out").iterdir()} == {*(file.name for file in files), "README.md"}
    assert all(float(TensorFile(file).metadata["dmm_jax.kept_share"]) >= 0.9 for file in files)

    style = fold_style(student, np.array([1.0, 0.0], np.float32))
    stock = write.write_single_file(tmp_path / "tuned.safetensors", style, "float32", families.RECIPE)
    (file,) = export(stock, tmp_path / "stock", ["lora"], dtype="float32", base=path, rank="10000")
    assert_same_unet(open_checkpoint(f"{path} + {file}"), style, tolerance=1e-5)
    with pytest.raises(UserError, match="only a merged one"):
        export(stock, tmp_path / "no", ["lora", "dmm"], base=path)


def test_the_metadata_names_the_base_and_inspect_prints_it(first, tmp_path):
    _, base, student = first
    (file,) = write_loras(tmp_path, student, base, Rank(rank=2), dtype="float16")
    metadata = TensorFile(file).metadata
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert json.loads(metadata["dmm_jax.lora_base"]) == {"name": base.name} and metadata["ss_network_dim"] == "2"
    report = inspect([file])
    (entry,) = report["checkpoints"]
    assert json.loads(json.dumps(report)) == report and not report["mergeable"]
    assert entry["adapter"]["kinds"]["LoRA"] > 10 and entry["adapter"]["stated"]["base"] == base.name
    text = render(report)
    assert "adapter" in text and f"trained on {base.name}" in text and "'BASE + " in text


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_diffusers_takes_each_layers_scale_from_the_metadata(folder, family, tmp_path, monkeypatch):
    """Versions before 0.40 guess one alpha for all ranks; with the metadata no version guesses."""
    path = folder if family == "sd1" else families.write_stock(tmp_path / "base", family, 0)
    base = open_checkpoint(path)
    components, rng = dict(base.components), np.random.default_rng(3)
    for name in ("unet", *base.text_encoders):
        tensors = {key: np.array(array) for key, array in base.tensors(name).items()}
        keys = [key for key in tensors if key.endswith(("to_q.weight", "q_proj.weight"))][:3]
        for key, rank in zip(keys, (1, 2, 2), strict=False):
            factors = rng.standard_normal((len(tensors[key]), rank)), rng.standard_normal((rank, tensors[key].shape[1]))
            tensors[key] = (tensors[key] + factors[0] @ factors[1]).astype(np.float32)
        components[name] = Component(base.config(name), lambda tensors=tensors: tensors)
    tuned = dataclasses.replace(base, components=components)
    (tmp_path / "out").mkdir()
    (file,) = write_loras(tmp_path / "out", tuned, base, Rank(rank=4), ("diffusers",), "")
    kind = diffusers.StableDiffusionPipeline if family == "sd1" else diffusers.StableDiffusionXLPipeline
    pipe = kind.from_pretrained(path, local_files_only=True)
    monkeypatch.setattr("diffusers.utils.peft_utils.get_peft_kwargs", lambda *a, **k: pytest.fail("it guesses"))
    pipe.load_lora_weights(file.parent, weight_name=file.name, local_files_only=True)
    networks = [pipe.unet, *(getattr(pipe, name) for name in base.text_encoders)]
    for network in networks:
        layers = [it for it in network.modules() if getattr(it, "lora_A", None)]
        ranks = {it.lora_A["default_0"].weight.shape[0] for it in layers}
        assert len(ranks) > 1 and {it.scaling["default_0"] for it in layers} == {1.0}
    assert_same_unet(open_checkpoint(f"{path} + {file}"), tuned, tolerance=1e-5)


def test_alpha_is_exact_in_every_dtype():
    layer = ("unet", "a.weight")
    factors = extract_lora.Factors(np.zeros((300, 257), ml_dtypes.bfloat16), np.zeros((257, 300), ml_dtypes.bfloat16))
    result = extract_lora.Extraction({layer: factors}, {}, {layer: (300,)})
    tensors = extract_lora.tensors_of(result, "kohya", "stable-diffusion-v1", {})
    assert float(tensors["lora_unet_a.alpha"]) == 257


@pytest.mark.parametrize("key", [BIAS, "conv_in.bias", "conv_in.weight", "conv_norm_out.weight"])
def test_a_difference_beyond_float16_is_an_error(first, tmp_path, key):
    _, base, student = first
    tensors = dict(student.tensors("unet"))
    tensors[key] = tensors[key] + np.float32(1e5 if tensors[key].ndim == 1 else 1e12)
    changed = dataclasses.replace(
        student, components={**student.components, "unet": Component(student.unet_config, lambda: tensors)}
    )
    with pytest.raises(CheckpointError, match=f"{re.escape(key)} has values beyond float16's"):
        write_loras(tmp_path, changed, base, Rank(rank=1), dtype="float16", style="")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("style", STYLES)
def test_a_style_that_equals_the_base_is_refused_before_writing(folder, tmp_path, style):
    student = families.random_student(open_checkpoint(folder), STYLES)
    dmm = write.write_folder(tmp_path / "dmm", student, "float32", families.RECIPE)
    (stock,) = export(dmm, tmp_path / "stock", ["diffusers"], style, "float32")
    with pytest.raises(UserError, match=rf"'{style}' of .*equals the base.*--style") as error:
        export(dmm, tmp_path / "out", ["lora"], dtype="float32", base=stock)
    (other,) = set(STYLES) - {style}
    assert other in str(error.value).partition("--style")[2] and not (tmp_path / "out").exists()
    export(dmm, tmp_path / "out", ["lora"], other, "float32", base=stock)


def test_networks_that_a_lora_does_not_hold_are_named(first, tmp_path, capsys):
    _, base, student = first
    tensors = {key: np.array(array) + np.float32(0.1) for key, array in base.tensors("vae").items()}
    changed = dataclasses.replace(
        student, components={**student.components, "vae": Component(base.vae_config, lambda: tensors)}
    )
    bare = dataclasses.replace(base, components={k: v for k, v in base.components.items() if k != "text_encoder"})
    write_loras(tmp_path, changed, bare, Rank(rank=2))
    printed = "".join(capsys.readouterr())
    assert "leaves out the text_encoder of" in printed and "leaves out the VAE of" in printed
    (tmp_path / "b").mkdir()
    write_loras(tmp_path / "b", student, base, Rank(rank=2))
    assert "VAE" not in "".join(capsys.readouterr())


def test_a_prediction_type_that_is_not_the_bases_gives_a_warning(first, tmp_path):
    _, base, student = first
    changed = dataclasses.replace(
        student, scheduler_config=student.scheduler_config | {"prediction_type": "v_prediction"}
    )
    expected = "predicts v_prediction, and its base .* predicts epsilon.*set v_prediction by hand"
    with pytest.warns(UserWarning, match=expected):
        (file,) = write_loras(tmp_path, changed, base, Rank(rank=2))
    metadata = TensorFile(file).metadata
    assert json.loads(metadata["dmm_jax.lora_base"])["prediction_type"] == "epsilon"
    assert metadata["modelspec.prediction_type"] == "v"


def test_the_biases_that_a1111_does_not_read_are_counted(first, tmp_path, capsys):
    _, base, student = first
    (file,) = write_loras(tmp_path, student, base, Rank(rank=2), tools=("a1111",))
    keys = set(TensorFile(file))
    unread = [key for key in keys if key.endswith(".diff_b") and key.replace(".diff_b", ".diff") not in keys]
    printed = "".join(capsys.readouterr())
    assert len(unread) > 10
    assert f"A1111 does not read the differences of {len(unread)} biases, such as unet." in printed


def test_ranks_of_a_file_are_those_asked_for(first, tmp_path):
    _, base, student = first
    (file,) = write_loras(tmp_path, student, base, Rank(rank=3), dtype="bfloat16", tools=("comfyui",))
    downs = {key: TensorFile(file).shape(key) for key in TensorFile(file) if key.endswith("lora_down.weight")}
    assert {shape[0] for shape in downs.values()} == {3}
    assert not [key for key in TensorFile(file) if "conv_out.lora" in key]  # It does not differ from the base's.
