"""The rules of adapter files that no library shows: what does not fit, what alpha scales, which names count."""

import json

import numpy as np
import pytest

from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats import adapter_facts, adapter_kinds, folding, lora, peft_options
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, save
from tests import adapters

DENSE, SQUARE, CONV, NORM = "x.to_q", "x.square", "x.conv", "x.norm"
SHAPES = {
    f"{DENSE}.weight": (32, 24), f"{DENSE}.bias": (32,), f"{SQUARE}.weight": (16, 16, 1, 1), f"{SQUARE}.bias": (16,),
    f"{CONV}.weight": (16, 32, 3, 3), f"{CONV}.bias": (16,), f"{NORM}.weight": (32,), f"{NORM}.bias": (32,),
    "x.unbiased.weight": (8, 6),
}  # fmt: skip
LAYERS = {
    name: ("unet", f"{layer}.weight")
    for layer in (DENSE, SQUARE, CONV, NORM, "x.unbiased")
    for name in (layer, f"base_model.model.{layer}")
}
RNG = np.random.default_rng(0)
BASE = {key: RNG.standard_normal(shape).astype(np.float32) for key, shape in SHAPES.items()}


def random(*shape):
    return RNG.normal(0, 0.3, shape).astype(np.float32)


def match(folder, tensors, metadata=None):
    (folder / "adapter_model.safetensors").unlink(missing_ok=True)
    save(folder / "adapter_model.safetensors", tensors, metadata)
    return lora.Match(TensorFile(folder / "adapter_model.safetensors"), LAYERS, {"unet": SHAPES})


def differences(folder, tensors, metadata=None):
    """Returns {our key: what a file adds to the base at weight 1}."""
    result = match(folder, tensors, metadata)
    assert not result.problems, result.problems
    return {key: update.difference(BASE[key]) for key, update in result.updates["unet"].items()}


def factors(layer):
    """Yields (kind, {role: shape}) of sound adapters of a layer."""
    out, into, *kernel = SHAPES[f"{layer}.weight"]
    kinds = adapters.factor_shapes(out, into, tuple(kernel))
    yield from kinds.items()
    yield "PEFT's IA3", {"ia3_l": (1, out, 1, 1) if kernel else (out, 1)}
    yield "PEFT's DoRA", kinds["LoRA"] | {"lora_magnitude_vector": (out,)}


@pytest.mark.parametrize("layer", [DENSE, CONV])
def test_a_factor_of_another_size_does_not_fit(tmp_path, layer):
    for kind, shapes in factors(layer):
        assert not match(tmp_path, {f"{layer}.{role}": random(*shape) for role, shape in shapes.items()}).problems
        for role, shape in shapes.items():
            for axis, size in enumerate(shape):
                for other in (size + 1, 0):
                    wrong = shapes | {role: (*shape[:axis], other, *shape[axis + 1 :])}
                    problems = match(tmp_path, {f"{layer}.{r}": random(*s) for r, s in wrong.items()}).problems
                    assert list(problems) == [lora.MISSHAPEN], (kind, role, axis, other)


@pytest.mark.parametrize("layer", [DENSE, CONV])
def test_axes_of_size_1_change_nothing_or_do_not_fit(tmp_path, layer):
    for kind, shapes in factors(layer):
        tensors = {f"{layer}.{role}": random(*shape) for role, shape in shapes.items()}
        expected = differences(tmp_path, tensors)
        for key, array in tensors.items():
            result = match(tmp_path, tensors | {key: array[..., None, None]})
            for changed, update in result.updates["unet"].items():
                np.testing.assert_allclose(update.difference(BASE[changed]), expected[changed], err_msg=f"{kind} {key}")
            assert result.updates["unet"].keys() == expected.keys() or list(result.problems) == [lora.MISSHAPEN]


@pytest.mark.parametrize(
    "layer, tensors",
    [
        (DENSE, {"lora_up.weight": (32, 0), "lora_down.weight": (0, 24)}),
        (NORM, {"lora_up.weight": (32, 2), "lora_down.weight": (2, 1)}),
        (CONV, {"lokr_w1": (2, 9), "lokr_w2": (8, 32)}),  # Its product has the right size, but mixes inputs and cells.
        (DENSE, {"lora_up.weight": (32, 2), "lora_down.weight": (2, 24), "dora_scale": (32,)}),
        (CONV, {"lora_up.weight": (16, 2, 1, 1), "lora_down.weight": (2, 3, 3, 32)}),
        (CONV, {"lokr_w1": (2, 2), "lokr_w2": (8, 3, 3, 16)}),
        (CONV, {"diff": (16, 9, 32)}),
        (CONV, {"hada_w1_a": (16, 2), "hada_w1_b": (2, 9, 32), "hada_w2_a": (16, 2), "hada_w2_b": (2, 288)}),
        (NORM, {"ia3_l": (1, 32, 1, 1)}),
    ],
    ids=[
        "rank 0", "a norm", "LoKr across the kernel", "a DoRA that does not tell rows from columns",
        "LoRA with the inputs last", "LoKr with the inputs last", "a difference with the inputs last",
        "LoHa with the inputs last", "IA3 of a norm",
    ],
)  # fmt: skip
def test_factors_that_only_multiply_do_not_fit(tmp_path, layer, tensors):
    problems = match(tmp_path, {f"{layer}.{role}": random(*shape) for role, shape in tensors.items()}).problems
    assert list(problems) == [lora.MISSHAPEN]


def lora_of(layer, rank=2):
    out, into, *kernel = SHAPES[f"{layer}.weight"]
    ones = (1,) * len(kernel)
    return {"lora_up.weight": random(out, rank, *ones), "lora_down.weight": random(rank, into, *kernel)}


def named(layer, roles):
    return {f"{layer}.{role}": array for role, array in roles.items()}


@pytest.mark.parametrize(
    "extra, problem",
    [
        ({"alpha": random(2)}, lora.NO_ALPHA),
        ({"alpha": np.array(np.inf, np.float32)}, lora.NO_ALPHA),
        ({"diff_b": random(32), "lora_B.bias": random(32)}, lora.INCOMPLETE),
        ({"lora_mid.weight": random(2, 2, 3, 3), "hada_w1_a": random(2, 2)}, lora.INCOMPLETE),
        ({"lora_down.weight": np.ones((2, 24), np.int8)}, lora.QUANTISED),
        ({"lora_A.weight": random(2, 24)}, lora.TWICE),
    ],
)
def test_what_has_no_meaning_is_reported(tmp_path, extra, problem):
    problems = match(tmp_path, named(DENSE, lora_of(DENSE) | extra)).problems
    assert list(problems) == [problem]


def test_a_bias_of_a_layer_without_one_must_be_zero(tmp_path):
    tensors = named("x.unbiased", lora_of("x.unbiased"))
    zero = match(tmp_path, tensors | {"x.unbiased.lora_B.bias": np.zeros(8, np.float32)})
    assert not zero.problems and list(zero.updates["unet"]) == ["x.unbiased.weight"]
    assert list(match(tmp_path, tensors | {"x.unbiased.lora_B.bias": random(8)}).problems) == [lora.MISSHAPEN]


def test_alpha_scales_factors_and_nothing_else(tmp_path):
    roles, bias, norm = lora_of(DENSE), random(32), random(32)
    whole, factor = random(16, 16, 1, 1), random(16)
    tensors = named(DENSE, roles | {"diff_b": bias, "alpha": np.array(1.0, np.float32)})
    tensors |= named(NORM, {"w_norm": norm, "alpha": np.array(5.0, np.float32)})
    tensors |= named(SQUARE, {"diff": whole, "alpha": np.array(5.0, np.float32)})
    result = differences(tmp_path, tensors)
    np.testing.assert_allclose(
        result[f"{DENSE}.weight"], roles["lora_up.weight"] @ roles["lora_down.weight"] / 2, rtol=1e-5, atol=1e-6
    )
    for key, expected in ((f"{DENSE}.bias", bias), (f"{NORM}.weight", norm), (f"{SQUARE}.weight", whole)):
        np.testing.assert_array_equal(result[key], expected)
    # Neither does a scale that a config states for LoRAs.
    metadata = {peft_options.METADATA: json.dumps({"unet.lora_alpha": 6, "unet.r": 2})}
    np.testing.assert_array_equal(
        differences(tmp_path, named(NORM, {"w_norm": norm}), metadata)[f"{NORM}.weight"], norm
    )
    result = differences(tmp_path, named(SQUARE, {"weight": factor, "on_input": np.array(True)}), metadata)
    expected = BASE[f"{SQUARE}.weight"] * factor[None, :, None, None]
    np.testing.assert_array_equal(result[f"{SQUARE}.weight"], expected)


def test_alpha_may_be_next_to_a_bias_alone(tmp_path):
    bias, alpha = random(32), np.array(5.0, np.float32)
    result = differences(tmp_path, named(DENSE, {"diff_b": bias, "alpha": alpha}))
    assert list(result) == [f"{DENSE}.bias"]
    np.testing.assert_array_equal(result[f"{DENSE}.bias"], bias)
    assert list(match(tmp_path, named(DENSE, {"lora_B.bias": bias, "alpha": alpha})).problems) == [lora.INCOMPLETE]


@pytest.mark.parametrize(
    "layer, roles",
    [(DENSE, {"diff": (32, 24)}), (NORM, {"w_norm": (32,)}), (SQUARE, {"ia3_l": (1, 16, 1, 1)})],
)
def test_a_scalar_next_to_a_kind_without_one_is_reported(tmp_path, layer, roles):
    tensors = {role: random(*shape) for role, shape in roles.items()} | {"scalar": np.array(0.5, np.float32)}
    (problem,) = match(tmp_path, named(layer, tensors)).problems
    assert "scalar next to the kind" in problem


def test_the_side_of_ia3_decides_its_size(tmp_path):
    tensors = named(DENSE, {"weight": random(32), "on_input": np.array(True)})
    assert list(match(tmp_path, tensors).problems) == [lora.MISSHAPEN]
    assert not match(tmp_path, tensors | {f"{DENSE}.on_input": np.array(False)}).problems


def test_a_scalar_multiplies_the_difference(tmp_path):
    roles = lora_of(DENSE)
    result = differences(tmp_path, named(DENSE, roles | {"scalar": np.array(0.5, np.float32)}))
    expected = roles["lora_up.weight"] @ roles["lora_down.weight"] / 2
    np.testing.assert_allclose(result[f"{DENSE}.weight"], expected, rtol=1e-5, atol=1e-6)


def test_a_lokr_s_rank_is_that_of_the_half_that_is_factored(tmp_path):
    halves = {"lokr_w1_a": random(4, 2), "lokr_w1_b": random(2, 3), "lokr_w2": random(8, 8)}
    result = differences(tmp_path, named(DENSE, halves | {"alpha": np.array(1.0, np.float32)}))
    expected = np.kron(halves["lokr_w1_a"] @ halves["lokr_w1_b"], halves["lokr_w2"]) / 2
    np.testing.assert_allclose(result[f"{DENSE}.weight"], expected, rtol=1e-5, atol=1e-6)


def test_a_file_s_own_alpha_comes_before_that_of_its_metadata(tmp_path):
    roles = lora_of(DENSE)
    # The other network's fields come last, and do not count.
    stated = {"unet.lora_alpha": 6, "unet.r": 2, "text_encoder.lora_alpha": 9}
    metadata = {peft_options.METADATA: json.dumps(stated)}
    product = roles["lora_up.weight"] @ roles["lora_down.weight"]
    for extra, scale in (({}, 3.0), ({"alpha": np.array(1.0, np.float32)}, 0.5)):
        result = differences(tmp_path, named(DENSE, roles | extra), metadata)
        np.testing.assert_allclose(result[f"{DENSE}.weight"], scale * product, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", ["1e999", "NaN"])
def test_a_config_s_alpha_must_be_finite(tmp_path, alpha):
    (tmp_path / peft_options.CONFIG).write_text(f'{{"r": 2, "lora_alpha": {alpha}}}')
    ends = {"lora_B.weight": random(32, 2), "lora_A.weight": random(2, 24)}
    assert list(match(tmp_path, named(f"base_model.model.{DENSE}", ends)).problems) == [lora.NO_ALPHA]


@pytest.mark.parametrize(
    "pattern, is_match",
    [
        ("down.0.to_q", True), ("to_q", True), ("0.to_q", True), ("^down.0.to_q", True), ("down\\.0\\.to_q$", True),
        ("to", False), ("o_q", False), ("^to_q", False), ("down", False), ("down.0.to_q.x", False),
        ("0.to_.", True), ("down.0..o_q", True), ("^down...to_q", True), ("0.to_..", False), ("0\\.to_\\.", False),
        ("", False),
    ],
)  # fmt: skip
def test_a_pattern_is_a_layer_or_the_end_of_its_name(pattern, is_match):
    plain = peft_options.PeftOptions("x", {"lora_alpha": 8, "r": 4})
    assert plain.scale("down.0.to_q", None) == 2
    alphas = plain._replace(fields=plain.fields | {"alpha_pattern": {pattern: 16}})
    assert alphas.scale("down.0.to_q", None) == (4 if is_match else 2)
    ranks = plain._replace(fields=plain.fields | {"rank_pattern": {pattern: 2}})
    assert ranks.scale("down.0.to_q", None) == (4 if is_match else 2)
    assert ranks.scale("down.0.to_q", 8) == 1  # The factors' own rank comes first.


def test_a_long_pattern_is_refused_unread():
    options = peft_options.PeftOptions("x", {"lora_alpha": 8, "r": 4, "alpha_pattern": {"a" * 1000: 1}})
    with pytest.raises(CheckpointError, match="is not the name of a layer"):
        options.scale("to_q", 4)


@pytest.mark.parametrize("modules, axis", [(["square"], 1), (["uare"], 0), ("square", 0), (None, 0)])
def test_a_config_tells_the_sides_of_a_square_convolution_of_ia3(tmp_path, modules, axis):
    (tmp_path / peft_options.CONFIG).write_text(json.dumps({"peft_type": "IA3", "feedforward_modules": modules}))
    factor = random(1, 16, 1, 1)
    result = differences(tmp_path, {f"base_model.model.{SQUARE}.ia3_l": factor})
    shape = (1, 16, 1, 1) if axis else (16, 1, 1, 1)
    expected = BASE[f"{SQUARE}.weight"] * (factor.reshape(shape) - 1)
    np.testing.assert_allclose(result[f"{SQUARE}.weight"], expected, rtol=1e-6)
    assert (f"{SQUARE}.bias" in result) == (axis == 0)


@pytest.mark.parametrize("is_old", [False, True])
def test_the_rank_tells_the_names_of_a_square_layer_s_glora(is_old):
    new = {"a1": random(16, 3), "a2": random(3, 16), "b1": random(16, 3), "b2": random(3, 16)}
    weight = random(16, 16)
    arrays = {"a1": new["a2"], "a2": new["a1"], "b1": new["b2"], "b2": new["b1"]} if is_old else new
    expected = weight @ new["a1"] @ new["a2"] + new["b1"] @ new["b2"]
    np.testing.assert_allclose(adapter_kinds.glora(arrays, weight), expected, rtol=1e-4, atol=1e-5)
    assert adapter_kinds.rank("GLoRA", {name: array.shape for name, array in arrays.items()}) == 3


def test_a_glora_with_a_core_is_lycoris_s(tmp_path):
    torch = pytest.importorskip("torch")
    glora = pytest.importorskip("lycoris.modules.glora")
    roles = {
        "a1": random(32, 3, 1, 1), "a2": random(3, 32, 1, 1), "b1": random(16, 3, 1, 1), "b2": random(3, 32, 1, 1),
        "bm": random(3, 3, 3, 3),
    }  # fmt: skip
    # LyCORIS's constructor makes no core, but its reader and its mathematics know one.
    tensors = [torch.tensor(array) for array in (BASE[f"{CONV}.weight"], *roles.values())]
    expected = glora._glora_weight(*tensors, 1.0).numpy()
    result = differences(tmp_path, {f"{CONV}.{name}.weight": array for name, array in roles.items()})
    np.testing.assert_allclose(result[f"{CONV}.weight"], expected.reshape(16, 32, 3, 3), rtol=1e-4, atol=1e-5)


def test_folding_leaves_the_base_alone_and_skips_misshapen_tensors(tmp_path):
    result = match(tmp_path, named(DENSE, lora_of(DENSE)) | named(NORM, {"w_norm": random(32)}))
    updates = {key: [(1.0, update), (1.0, update)] for key, update in result.updates["unet"].items()}
    base = {key: np.array(array) for key, array in BASE.items()} | {f"{NORM}.weight": np.zeros(31, np.float32)}
    folded = folding.Folded(base, updates, SHAPES)
    once = np.array(folded[f"{DENSE}.weight"])
    np.testing.assert_array_equal(base[f"{DENSE}.weight"], BASE[f"{DENSE}.weight"])
    np.testing.assert_array_equal(folded[f"{DENSE}.weight"], once)
    assert folded.computed == {f"{DENSE}.weight"} and folded[f"{NORM}.weight"] is base[f"{NORM}.weight"]


@pytest.mark.parametrize(
    "value, is_read",
    [
        (True, True), (False, True), (None, True), ("gaussian", True), ("orthogonal", True), ("eva", True),
        ("pissa", False), ("pissa_niter_16", False), ("OLoRA", False), ("corda", False), ("loftq", False),
        ("lora_ga", False), ([], False),
    ],
)  # fmt: skip
def test_adapters_that_began_as_a_part_of_the_base_are_refused(tmp_path, value, is_read):
    path = tmp_path / "adapter_model.safetensors"
    for prefix, name in (("base_model.model.", ""), ("", "unet."), ("", "")):
        text = json.dumps({f"{name}init_lora_weights": value})
        metadata = {} if prefix else {peft_options.METADATA: text}
        (tmp_path / peft_options.CONFIG).write_text(text if prefix else "{}")
        path.unlink(missing_ok=True)
        # A file's own alpha does not help.
        save(path, named(f"{prefix}{DENSE}", lora_of(DENSE) | {"alpha": np.ones((), np.float32)}), metadata)
        if is_read:
            adapter_facts.refuse_other_kinds(TensorFile(path))
            continue
        with pytest.raises(CheckpointError, match="init_lora_weights .*path_initial_model_for_weight_conversion"):
            adapter_facts.refuse_other_kinds(TensorFile(path))
