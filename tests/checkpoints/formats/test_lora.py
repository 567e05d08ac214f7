"""A LoRA folded into its base is the base plus weight * alpha / rank * up @ down, however its keys are spelled.

PyTorch computes the documented rule independently; diffusers' own fuse_lora and ComfyUI's code (test_comfyui.py) fold
the same files.
"""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints import write as export
from dmm_jax.checkpoints.compare import check_mergeable
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats import folding, lora
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, save
from dmm_jax.checkpoints.inspect import inspect
from dmm_jax.checkpoints.inspect_text import render
from dmm_jax.checkpoints.open import open_checkpoint, open_teacher
from dmm_jax.config.options import as_teachers, get_config
from dmm_jax.distill import incremental
from dmm_jax.distill import teachers as teachers_lib
from dmm_jax.runtime import sharding
from tests import families

torch = pytest.importorskip("torch")
DENSE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV_1 = "mid_block.attentions.0.proj_in"
CONV_3 = "down_blocks.0.resnets.0.conv1"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
RANK, ALPHA = 3, 2.0
LAYERS = (("unet", DENSE), ("unet", CONV_1), ("unet", CONV_3), ("text_encoder", TEXT))
LDM = {  # Copied by hand from the published layout, for a UNet with one layer per level.
    DENSE: "input_blocks_1_1_transformer_blocks_0_attn1_to_q", CONV_1: "middle_block_1_proj_in",
    CONV_3: "input_blocks_1_0_in_layers_2",
}  # fmt: skip
TEXT_PREFIXES = {"text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}


def kohya(component, layer):
    return ("lora_unet_" if component == "unet" else TEXT_PREFIXES[component]) + layer.replace(".", "_")


def ldm(component, layer):
    return f"lora_unet_{LDM[layer]}" if component == "unet" else kohya(component, layer)


def dotted(component, layer):
    return f"{component}.{layer}"


def bare(component, layer):
    return f"{component}.{layer.removeprefix('text_model.')}"


def as_processor(component, layer):
    """Names a layer as diffusers' first LoRA files do; they change attention only."""
    if component != "unet":
        return f"{component}.{layer.replace('q_proj', 'to_q')}"
    return f"unet.{layer.replace('.attn1.', '.attn1.processor.').removesuffix('.0')}"


def unprefixed(function):
    return lambda component, layer: function(component, layer).removeprefix("unet.")


def comfy(component, layer):
    names = {DENSE: "input_blocks.1.1.transformer_blocks.0.attn1.to_q", CONV_1: "middle_block.1.proj_in",
             CONV_3: "input_blocks.1.0.in_layers.2"}  # fmt: skip
    return f"diffusion_model.{names[layer]}" if component == "unet" else dotted(component, layer)


def peft(component, layer):
    return f"base_model.model.{layer}" if component == "unet" else dotted(component, layer)


def ldm_dotted(component, layer):
    return comfy(component, layer).removeprefix("diffusion_model.")


def onetrainer(component, layer):
    if component != "unet":
        return f"clip_l.{layer}"
    return f"unet.{ldm_dotted(component, layer)}"


def comfy_text(component, layer):
    return f"text_encoders.clip_l.transformer.{layer}" if component != "unet" else comfy(component, layer)


def nested(component, layer):
    return f"base_model.model.{layer}"


STYLES = {
    "ComfyUI, text encoders too": (comfy_text, ".lora_B.weight", ".lora_A.weight"),
    "OneTrainer": (onetrainer, ".lora_up.weight", ".lora_down.weight"),
    "LyCORIS, flattened": (
        lambda c, layer: "lycoris_" + layer.replace(".", "_"),
        ".lora_up.weight",
        ".lora_down.weight",
    ),
    "PEFT's prefix, all networks": (nested, ".lora_B.weight", ".lora_A.weight"),
    "unet. and kohya's ends": (dotted, ".lora_up.weight", ".lora_down.weight"),
    "diffusers' first": (as_processor, "_lora.up.weight", "_lora.down.weight"),
    "diffusers' first, without unet": (unprefixed(as_processor), "_lora.up.weight", "_lora.down.weight"),
    "PEFT without unet": (unprefixed(dotted), ".lora_B.weight", ".lora_A.weight"),
    "PEFT's own": (peft, ".lora_B.weight", ".lora_A.weight"),
    "PEFT's own, with an adapter's name": (peft, ".lora_B.default.weight", ".lora_A.default.weight"),
    "ComfyUI": (comfy, ".lora_up.weight", ".lora_down.weight"),
    "kohya": (kohya, ".lora_up.weight", ".lora_down.weight"),
    "kohya, LDM names": (ldm, ".lora_up.weight", ".lora_down.weight"),
    "PEFT": (dotted, ".lora_B.weight", ".lora_A.weight"),
    "PEFT, today's text encoders": (bare, ".lora_B.weight", ".lora_A.weight"),
    "diffusers": (dotted, ".lora.up.weight", ".lora.down.weight"),
}


def factors(checkpoint, layers=LAYERS, seed=0):
    """Returns {(network, layer): (up, down)}: random, of the shapes that kohya and LoCon give them."""
    rng = np.random.default_rng(seed)
    updates = {}
    for component, layer in layers:
        out, into, *kernel = checkpoint.shapes(component)[f"{layer}.weight"]
        shapes = (out, RANK, *[1] * len(kernel)), (RANK, into, *kernel)
        updates[component, layer] = tuple(rng.normal(0, 0.3, shape).astype(np.float32) for shape in shapes)
    return updates


def tucker(checkpoint, seed=3):
    """Returns {role: factor} of a convolution in Tucker's decomposition, random."""
    out, into = checkpoint.shapes("unet")[f"{CONV_3}.weight"][:2]
    shapes = {"up": (out, RANK, 1, 1), "mid": (RANK, RANK, 3, 3), "down": (RANK, into, 1, 1)}
    rng = np.random.default_rng(seed)
    return {role: rng.normal(0, 0.3, shape).astype(np.float32) for role, shape in shapes.items()}


def tensors_of(updates, style="kohya", alpha=ALPHA):
    name, up_end, down_end = STYLES[style]
    tensors = {}
    for (component, layer), (up, down) in updates.items():
        key = name(component, layer)
        tensors |= {key + up_end: up, key + down_end: down}
        if alpha is not None:
            tensors[f"{key}.alpha"] = np.array(alpha, np.float32)
    return tensors


def write(path, tensors, metadata=None):
    save(path, tensors, metadata)
    return path


def expected(array, *terms):
    """Returns the folded tensor, computed by PyTorch: a convolution's update applies both factors in sequence."""
    array = torch.tensor(np.array(array, np.float64))
    for scale, up, down in terms:
        up, down = (torch.tensor(factor.astype(np.float64)) for factor in (up, down))
        if array.ndim == 2:
            update = up @ down
        else:
            # The response of both convolutions to a unit impulse per input channel is the kernel, mirrored.
            size = array.shape[-1]
            impulses = torch.zeros(array.shape[1], array.shape[1], 2 * size - 1, 2 * size - 1, dtype=torch.float64)
            impulses[range(len(impulses)), range(len(impulses)), size - 1, size - 1] = 1
            response = torch.nn.functional.conv2d(torch.nn.functional.conv2d(impulses, down), up)
            update = response.flip(-1, -2).transpose(0, 1)
        array = array + scale * update
    return array.numpy()


def stored(checkpoint, component, layer):
    """Returns a layer's weight as the checkpoint's tensors give it."""
    tensors = checkpoint.tensors(component)
    return tensors[naming.spellings(tensors)[f"{layer}.weight"]]


def assert_close(actual, desired):
    assert actual.dtype == np.float32 and actual.shape == desired.shape
    np.testing.assert_allclose(actual, desired, rtol=0, atol=1e-6 * np.abs(desired).max())


@pytest.fixture(scope="module")
def base(folder):
    return open_checkpoint(folder)


@pytest.mark.parametrize("component, layer", LAYERS)
@pytest.mark.parametrize("alpha", [ALPHA, None])
def test_a_folded_tensor_is_the_base_and_the_scaled_product(folder, base, tmp_path, component, layer, alpha):
    updates = factors(base)
    path = write(tmp_path / "one.safetensors", tensors_of(updates, alpha=alpha))
    folded = stored(open_checkpoint(f"{folder} + {path}*0.8"), component, layer)
    scale = 0.8 * (1.0 if alpha is None else alpha / RANK)
    assert_close(folded, expected(stored(base, component, layer), (scale, *updates[component, layer])))


def test_loras_add_up_and_other_tensors_stay_as_stored(folder, base, tmp_path):
    ink, neon = factors(base, seed=1), factors(base, LAYERS[:1], seed=2)
    first = write(tmp_path / "one.safetensors", tensors_of(ink))
    second = write(tmp_path / "two.safetensors", tensors_of(neon, "PEFT", alpha=None))
    folded = open_checkpoint(f"{folder} + {first}*-0.5 + {second}")
    terms = (-0.5 * ALPHA / RANK, *ink[LAYERS[0]]), (1.0, *neon[LAYERS[0]])
    assert_close(stored(folded, "unet", DENSE), expected(stored(base, "unet", DENSE), *terms))
    touched = {f"{layer}.weight" for component, layer in LAYERS if component == "unet"}
    before, after = base.tensors("unet"), folded.tensors("unet")
    assert all(np.array_equal(after[key], before[key]) for key in before if key not in touched)


@pytest.mark.parametrize("style", ["kohya", "PEFT"])
def test_diffusers_fuses_the_same_file_to_the_same_values(folder, base, tmp_path, style):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    # diffusers recognises kohya's text encoders by the output layer.
    updates = factors(base, (*LAYERS, ("text_encoder", TEXT.replace("q_proj", "out_proj"))))
    path = write(tmp_path / "ink.safetensors", tensors_of(updates, style, ALPHA if style == "kohya" else None))
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    pipe.load_lora_weights(tmp_path, weight_name=path.name, local_files_only=True)
    pipe.fuse_lora(lora_scale=0.8)
    pipe.unload_lora_weights()
    folded = open_checkpoint(f"{folder} + {path}*0.8")
    for component in ("unet", "text_encoder"):
        fused, tensors = getattr(pipe, component).state_dict(), folded.tensors(component)
        names = naming.spellings(tensors)
        fused = {key: tensor.numpy() for key, tensor in fused.items() if "position_ids" not in key}
        assert set(naming.spellings(fused)) == set(names)
        for key, name in naming.spellings(fused).items():
            assert_close(np.asarray(tensors[names[key]]), fused[name])


def test_tucker_is_three_convolutions_in_sequence(folder, base, tmp_path):
    rng = np.random.default_rng(4)
    array, parts = base.tensors("unet")[f"{CONV_3}.weight"], tucker(base)
    into, name = array.shape[1], kohya("unet", CONV_3)
    path = write(tmp_path / "t.safetensors", {f"{name}.lora_{role}.weight": part for role, part in parts.items()})
    folded = open_checkpoint(f"{folder} + {path}").tensors("unet")[f"{CONV_3}.weight"]
    images = torch.tensor(rng.normal(0, 1, (2, into, 8, 8)).astype(np.float32))
    conv = torch.nn.functional.conv2d
    desired = conv(images, torch.tensor(np.array(array)), padding=1)
    reduced = conv(images, torch.tensor(parts["down"]))
    desired = desired + conv(conv(reduced, torch.tensor(parts["mid"]), padding=1), torch.tensor(parts["up"]))
    actual = conv(images, torch.tensor(folded), padding=1)
    assert torch.abs(actual - desired).max() < 1e-5 * torch.abs(desired).max()


@pytest.mark.parametrize("style", STYLES)
def test_every_spelling_of_the_keys_gives_the_same_tensors(folder, base, tmp_path, style):
    updates = factors(base)
    kohyas = open_checkpoint(f"{folder} + {write(tmp_path / 'a.safetensors', tensors_of(updates))}")
    other = open_checkpoint(f"{folder} + {write(tmp_path / 'b.safetensors', tensors_of(updates, style))}")
    assert other.loras[0].networks == {"unet": 3, "text_encoder": 1}
    for component in ("unet", "text_encoder"):
        assert other.digest(component) == kohyas.digest(component) != base.digest(component)


def test_diffusers_first_files_name_the_output_layer_without_a_number(folder, base, tmp_path):
    layer = DENSE.replace("to_q", "to_out.0")
    updates = factors(base, [("unet", layer)])
    path = write(tmp_path / "old.safetensors", tensors_of(updates, "diffusers' first, without unet", alpha=None))
    assert f"{layer.replace('.attn1.', '.attn1.processor.').removesuffix('.0')}_lora.up.weight" in TensorFile(path)
    folded = stored(open_checkpoint(f"{folder} + {path}"), "unet", layer)
    assert_close(folded, expected(stored(base, "unet", layer), (1.0, *updates["unet", layer])))
    with pytest.raises(CheckpointError, match="is a LoRA.*'BASE [+] .*old.safetensors[*]0.8'"):
        open_checkpoint(path)


def test_pefts_own_files_take_alpha_from_adapter_config_json(folder, base, tmp_path):
    updates = factors(base, LAYERS[:1])
    path = write(tmp_path / "adapter_model.safetensors", tensors_of(updates, "PEFT's own", alpha=None))
    with pytest.raises(CheckpointError, match="needs adapter_config.json"):
        open_checkpoint(f"{folder} + {path}")
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"lora_alpha": 6, "r": RANK}))
    folded = stored(open_checkpoint(f"{folder} + {path}"), "unet", DENSE)
    assert_close(folded, expected(stored(base, "unet", DENSE), (6 / RANK, *updates[LAYERS[0]])))
    for text in ("{", '{"lora_alpha": []}', "[" * 10**5):
        config.write_text(text)
        with pytest.raises(CheckpointError, match="states no number|adapter_config.json cannot be read"):
            open_checkpoint(f"{folder} + {path}")


def test_a_lora_may_change_text_encoders_that_only_the_base_holds(folder, base, recipe, tmp_path):
    alone = export.write_single_file(tmp_path / "unet.safetensors", unet_alone(base), "float32", recipe)
    text = f"{alone} + {write(tmp_path / 'ink.safetensors', tensors_of(factors(base)))}"
    with pytest.raises(CheckpointError, match="layers or networks that this base does not have"):
        open_checkpoint(text)
    complete = open_checkpoint(f"{folder} + {tmp_path / 'ink.safetensors'}")
    config = get_config()
    config.base, config.teachers = str(folder), (("ink", text),)
    for teacher in (incremental.origins(config)["ink"], open_teacher(text, folder)):
        assert teacher.digest("text_encoder") == complete.digest("text_encoder") != base.digest("text_encoder")
        check_mergeable(base, {"ink": teacher})
    report = inspect([folder, pathlib.Path(text)])
    assert report["mergeable"] and report["checkpoints"][1]["loans"] == []


def unet_alone(base):
    return dataclasses.replace(base, components={"unet": base.components["unet"]})


def test_the_second_text_encoder_and_xls_own_names_are_matched(tmp_path):
    folder = families.write_stock(tmp_path / "xl", "sdxl", 0)
    xl = open_checkpoint(folder)
    layers = [("text_encoder", TEXT), ("text_encoder_2", TEXT)]
    updates = factors(xl, [*layers, ("unet", "add_embedding.linear_1")])
    tensors = {key.replace("lora_te_", "lora_te1_"): array for key, array in tensors_of(updates).items()}
    tensors = {key.replace("add_embedding_linear_1", "label_emb_0_0"): array for key, array in tensors.items()}
    kohyas = open_checkpoint(f"{folder} + {write(tmp_path / 'a.safetensors', tensors)}")
    pefts = open_checkpoint(f"{folder} + {write(tmp_path / 'b.safetensors', tensors_of(updates, 'PEFT'))}")
    assert kohyas.loras[0].networks == {"unet": 1, "text_encoder": 1, "text_encoder_2": 1}
    for component, layer in updates:
        terms = (ALPHA / RANK, *updates[component, layer])
        assert_close(stored(kohyas, component, layer), expected(stored(xl, component, layer), terms))
        assert kohyas.digest(component) == pefts.digest(component)


def test_weight_0_is_the_base_bit_for_bit(base, recipe, tmp_path):
    half = export.write_single_file(tmp_path / "half.safetensors", base, "float16", recipe)
    path = write(tmp_path / "a.safetensors", tensors_of(factors(base)))
    plain, zero = open_checkpoint(half), open_checkpoint(f"{half} + {path}*0")
    for component in plain.components:
        before, after = plain.tensors(component), zero.tensors(component)
        assert all(after[key].dtype == before[key].dtype for key in before)
        assert all(after[key].tobytes() == before[key].tobytes() for key in before)
        assert zero.digest(component) == plain.digest(component)


def test_the_digest_depends_on_the_loras_and_weights(folder, base, tmp_path):
    ink = write(tmp_path / "a.safetensors", tensors_of(factors(base, seed=1)))
    neon = write(tmp_path / "b.safetensors", tensors_of(factors(base, LAYERS[:1], seed=2)))
    texts = (
        f"{folder}",
        f"{folder} + {ink}",
        f"{folder} + {ink}*0.5",
        f"{folder} + {neon}",
        f"{folder} + {ink} + {neon}",
    )
    checkpoints = [open_checkpoint(text) for text in texts]
    assert len({checkpoint.digest("unet") for checkpoint in checkpoints}) == len(texts)
    assert checkpoints[3].digest("text_encoder") == base.digest("text_encoder")
    assert all(checkpoint.digest("vae") == base.digest("vae") for checkpoint in checkpoints)


def test_a_half_precision_base_is_folded_in_float32(folder, base, recipe, tmp_path):
    half = export.write_single_file(tmp_path / "half.safetensors", base, "float16", recipe)
    updates = factors(base)
    path = write(tmp_path / "a.safetensors", tensors_of(updates))
    folded = open_checkpoint(f"{half} + {path}")
    terms = (ALPHA / RANK, *updates["unet", CONV_1])
    assert_close(stored(folded, "unet", CONV_1), expected(stored(open_checkpoint(half), "unet", CONV_1), terms))
    assert folded.tensors("unet")["conv_in.weight"].dtype == np.float16
    assert folded.name == "half + a*1"


def test_folded_parameters_are_computed_at_each_read(folder, base, tmp_path, monkeypatch):
    path = write(tmp_path / "a.safetensors", tensors_of(factors(base, LAYERS[:1])))
    params = open_checkpoint(f"{folder} + {path}").params("unet")
    leaves = dict(naming.flat(params))
    computed = [leaf for leaf in leaves.values() if isinstance(leaf, naming.ComputedArray)]
    assert len(computed) == 1 and computed[0].shape == base.shapes("unet")[f"{DENSE}.weight"][::-1]
    calls = []
    monkeypatch.setattr(folding.Update, "difference", counted(folding.Update.difference, calls))
    array = np.asarray(computed[0])
    np.testing.assert_array_equal(computed[0][2:5], array[2:5])
    np.testing.assert_array_equal(array, open_checkpoint(f"{folder} + {path}").tensors("unet")[f"{DENSE}.weight"].T)
    assert len(calls) == 3


def counted(method, calls):
    def call(self, base):
        calls.append(self)
        return method(self, base)

    return call


def test_the_metadata_may_state_pefts_alpha(folder, base, tmp_path):
    updates = factors(base, LAYERS[:1])
    tensors = tensors_of(updates, "PEFT", alpha=None)
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": ALPHA, "unet.r": RANK})}
    stated = open_checkpoint(f"{folder} + {write(tmp_path / 'a.safetensors', tensors, metadata)}")
    stored_alpha = open_checkpoint(f"{folder} + {write(tmp_path / 'b.safetensors', tensors_of(updates))}")
    assert stated.digest("unet") == stored_alpha.digest("unet")
    metadata = {"lora_adapter_metadata": json.dumps({"unet.fan_in_fan_out": True})}
    with pytest.raises(CheckpointError, match="fan_in_fan_out"):
        open_checkpoint(f"{folder} + {write(tmp_path / 'c.safetensors', tensors, metadata)}")


def test_twenty_loras_cost_one_pass_over_the_base(folder, base, tmp_path, monkeypatch):
    files = [write(tmp_path / f"{n}.safetensors", tensors_of(factors(base, seed=n), alpha=None)) for n in range(20)]
    folded = open_checkpoint(" + ".join([str(folder), *(f"{file}*0.05" for file in files)]))
    reads, read = [], TensorFile.__getitem__
    monkeypatch.setattr(TensorFile, "__getitem__", lambda self, key: reads.append((self.path, key)) or read(self, key))
    tensors = folded.tensors("unet")
    assert not reads and len(folded.loras) == 20
    sums = {key: np.asarray(tensors[key]) for key in tensors}
    of_base = [key for path, key in reads if path not in files]
    assert sorted(of_base) == sorted(tensors)
    terms = [(0.05, *factors(base, seed=n)["unet", DENSE]) for n in range(20)]
    assert_close(sums[f"{DENSE}.weight"], expected(stored(base, "unet", DENSE), *terms))


def test_a_complete_checkpoint_is_not_taken_for_an_adapter(folder, base, recipe, tmp_path):
    path = export.write_single_file(tmp_path / "complete.safetensors", base, "float16", recipe)
    with pytest.raises(CheckpointError, match="unknown: "):
        open_checkpoint(f"{folder} + {path}")


def test_one_error_lists_everything_that_does_not_fit(folder, base, tmp_path):
    tensors = tensors_of(factors(base))
    tensors["lora_unet_no_such_layer.lora_up.weight"] = np.zeros((2, 2), np.float32)
    tensors["text_encoder_2.x.lora_A.weight"] = np.zeros((2, 2), np.float32)
    tensors[f"{kohya('unet', CONV_3)}.lora_down.weight"] = np.zeros((RANK, 5, 3, 3), np.float32)
    tensors[f"{kohya('unet', CONV_1)}.alpha"] = np.array(np.nan, np.float32)
    tensors[f"{ldm('unet', DENSE)}.lora_up.weight"] = np.zeros((2, 2), np.float32)
    del tensors[f"{kohya('text_encoder', TEXT)}.lora_up.weight"]
    other = {"lora_unet_other.alpha": np.ones((), np.float32)}
    first, second = write(tmp_path / "a.safetensors", tensors), write(tmp_path / "b.safetensors", other)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(f"{folder} + {first} + {second}")
    message = str(error.value)
    for text in (
        "1 unknown: ", "lora_unet_no_such_layer.lora_up.weight", "text_encoder_2.x.lora_A.weight",
        f"1 misshapen: {kohya('unet', CONV_3)}.lora_down.weight", "(3, 5, 3, 3)",
        "1 with an alpha that is not a number",
        "1 named twice: ", "2 incomplete, or of several kinds: ", "b.safetensors, 1 unknown: lora_unet_other.alpha",
    ):  # fmt: skip
        assert text in message


def test_a_sum_is_split_into_base_files_and_weights(tmp_path):
    odd = tmp_path / "a + b*2.safetensors"
    odd.touch()
    path, files = lora.parse(f"base + {odd} + x.safetensors*0.25 + y.safetensors")
    assert str(path) == "base" and [weight for _, weight in files] == [1.0, 0.25, 1.0]
    assert [file.name for file, _ in files] == [odd.name, "x.safetensors", "y.safetensors"]
    for weight in ("much", "nan", ""):
        with pytest.raises(CheckpointError, match="is not a weight"):
            lora.parse(f"base + x.safetensors*{weight}")


def test_missing_files_and_pickles_are_named(folder, tmp_path):
    with pytest.raises(CheckpointError, match="there is no file .*none.safetensors"):
        open_checkpoint(f"{folder} + {tmp_path / 'none.safetensors'}*0.5")
    with pytest.raises(CheckpointError, match="only .safetensors"):
        open_checkpoint(f"{folder} + {tmp_path / 'old.pt'}")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        open_checkpoint(f"{tmp_path / 'none'} + {tmp_path / 'x.safetensors'}")


def test_a_lora_without_a_base_is_refused_with_the_right_form(base, tmp_path):
    path = write(tmp_path / "ink.safetensors", tensors_of(factors(base)))
    with pytest.raises(CheckpointError, match="is a LoRA.*'BASE [+] .*ink.safetensors[*]0.8'"):
        open_checkpoint(path)
    parts = {"lora_unet_x.lokr_w1": np.zeros((2, 2), np.float32), "lora_unet_x.lokr_w2": np.zeros((2, 2), np.float32)}
    metadata = {"ss_sd_model_name": "nai.safetensors", "ss_base_model_version": "sd_v1"}
    with pytest.raises(CheckpointError, match="an adapter, .*LoKr of 1 layers, in unet. .*trained on nai.safetensors"):
        open_checkpoint(write(tmp_path / "b.safetensors", parts, metadata))
    with pytest.raises(CheckpointError, match="holds OFT or BOFT"):
        open_checkpoint(write(tmp_path / "c.safetensors", {"lora_unet_x.oft_blocks": np.zeros((2, 2), np.float32)}))


def test_inspect_shows_the_loras_and_whether_they_can_be_merged(folder, base, tmp_path):
    path = write(tmp_path / "ink.safetensors", tensors_of(factors(base)))
    report = inspect([folder, pathlib.Path(f"{folder} + {path}*0.8")])
    entry = report["checkpoints"][1]
    assert report["mergeable"] and json.loads(json.dumps(report)) == report
    assert entry["name"] == f"{folder.name} + ink*0.8"
    assert entry["files"] == report["checkpoints"][0]["files"]
    (shown,) = entry["loras"]
    assert (shown["weight"], shown["ranks"], shown["networks"]) == (0.8, [RANK], {"unet": 3, "text_encoder": 1})
    line = f"LoRA ink.safetensors * 0.8: rank 3, tensors: 3 of unet, 1 of text_encoder; hash {shown['sha256'][:10]}"
    assert line in render(report)
    bad = write(tmp_path / "bad.safetensors", {"lora_unet_x.oft_blocks": np.zeros((2, 2), np.float32)})
    report = inspect([folder, pathlib.Path(f"{folder} + {bad}")])
    assert not report["mergeable"] and "OFT" in report["obstacles"][0]


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "adapter_model.safetensors"])
def test_the_folder_of_an_adapter_is_answered_with_its_file(folder, base, tmp_path, name):
    path = write(tmp_path / name, tensors_of(factors(base)))
    for text in (str(tmp_path), f"{folder} + {tmp_path}*0.8"):
        with pytest.raises(CheckpointError, match=f"is a folder .*for example .*{path}"):
            open_checkpoint(text)
    with pytest.raises(CheckpointError, match="Give the folder that holds unet/"):
        open_checkpoint(folder / "unet")


def test_nan_in_a_lora_is_damage_of_the_folded_tensor(folder, base, tmp_path):
    updates = factors(base, LAYERS[:1])
    updates[LAYERS[0]][0][0, 0] = np.nan
    text = f"{folder} + {write(tmp_path / 'a.safetensors', tensors_of(updates))}"
    (damage,) = inspect([pathlib.Path(text)])["checkpoints"][0]["damage"]
    assert damage["kind"] == "not finite" and damage["tensors"] == [f"{DENSE}.weight"]
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        open_checkpoint(text).params("unet")


def test_a_lora_is_a_teacher_like_any_other(folder, base, tmp_path):
    updates = factors(base)
    path = write(tmp_path / "ink.safetensors", tensors_of(updates))
    named = as_teachers([f"plain={folder}", f"ink={folder} + {path}*0.8"])
    teachers = {name: open_checkpoint(text) for name, text in named}
    check_mergeable(base, teachers)
    mesh = sharding.make_mesh(teacher=1, data=1, fsdp=1)
    rows = incremental.batch_rows(teachers)
    stacked = teachers_lib.put_teachers(base, rows, base.unet_config, mesh, np.float32)
    (kernel,) = (leaf for path, leaf in naming.flat(stacked.unet) if naming.torch_key(path) == f"{DENSE}.weight")
    before = stored(base, "unet", DENSE)
    terms = (0.8 * ALPHA / RANK, *updates["unet", DENSE])
    np.testing.assert_array_equal(kernel[0], before.T)
    assert_close(np.asarray(kernel[1]), expected(before, terms).T)
    assert np.asarray(stacked.encoder).tolist() == [-1, 0] and stacked.text is not None
