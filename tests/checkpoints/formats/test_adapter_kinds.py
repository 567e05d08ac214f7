"""Each kind of adapter, folded into its base, gives the weights that LyCORIS's and PEFT's own code give.

LyCORIS's modules and PEFT's layers make the files here, in every decomposition, and compute what they stand for.
`python -m tests.checkpoints.formats.test_adapter_kinds` prints the largest error of each kind.
"""

import json
import sys

import numpy as np
import pytest

from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats import folding
from dmm_jax.checkpoints.formats.safetensors_io import save
from tests import adapters

torch = pytest.importorskip("torch")
pytest.importorskip("lycoris")
peft = pytest.importorskip("peft")
nn = torch.nn
GATE = 1e-6  # Relative to the largest value of the folded tensor.
WEIGHT = 0.8
DENSE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
CONV_3 = "down_blocks.0.resnets.0.conv1"
CONV_1 = "mid_block.attentions.0.proj_in"
NORM = "down_blocks.0.resnets.0.norm1"
SHAPES = {
    f"{DENSE}.weight": (32, 24), f"{DENSE}.bias": (32,), f"{CONV_3}.weight": (16, 32, 3, 3), f"{CONV_3}.bias": (16,),
    f"{CONV_1}.weight": (16, 8, 1, 1), f"{CONV_1}.bias": (16,), f"{NORM}.weight": (32,), f"{NORM}.bias": (32,),
}  # fmt: skip
ALL = (DENSE, CONV_3, CONV_1)
LYCORIS = {  # {name: (algorithm, its options)}
    "LoRA": ("locon", {}),
    "LoRA, Tucker": ("locon", {"use_tucker": True}),
    "rs-LoRA": ("locon", {"rs_lora": True}),
    "LoRA with a scalar": ("locon", {"use_scalar": True}),
    "LoHa": ("loha", {}),
    "LoHa, Tucker": ("loha", {"use_tucker": True}),
    "rs-LoHa": ("loha", {"rs_lora": True}),
    "LoKr": ("lokr", {"factor": 4}),
    "LoKr, both halves factored": ("lokr", {"factor": 8, "decompose_both": True}),
    "LoKr, Tucker": ("lokr", {"factor": 2, "use_tucker": True}),
    "LoKr, whole halves": ("lokr", {"full_matrix": True}),
    "LoKr, unbalanced": ("lokr", {"factor": 4, "unbalanced_factorization": True}),
    "GLoRA": ("glora", {}),
    "IA3 on outputs": ("ia3", {}),
    "IA3 on inputs": ("ia3", {"train_on_input": True}),
    "full difference": ("full", {}),
    "DoRA on outputs": ("locon", {"weight_decompose": True}),
    "DoRA on inputs": ("locon", {"weight_decompose": True, "wd_on_out": False}),
    "DoRA of LoHa": ("loha", {"weight_decompose": True}),
    "DoRA of LoKr on inputs": ("lokr", {"factor": 4, "weight_decompose": True, "wd_on_out": False}),
}
PEFT = {  # {name: (name of the config's class, its fields)}
    "LoRA": ("LoraConfig", {"r": 3, "lora_alpha": 2}),
    "rs-LoRA": ("LoraConfig", {"r": 3, "lora_alpha": 2, "use_rslora": True}),
    "DoRA": ("LoraConfig", {"r": 3, "lora_alpha": 2, "use_dora": True}),
    "LoRA with biases": ("LoraConfig", {"r": 3, "lora_alpha": 2, "lora_bias": True}),
    "rank and alpha patterns": (
        "LoraConfig",
        {"r": 3, "lora_alpha": 2, "rank_pattern": {"to_out.0": 5}, "alpha_pattern": {"^" + CONV_3: 7, "proj_in": 1}},
    ),
    "LoHa": ("LoHaConfig", {"r": 3, "alpha": 2}),
    "LoHa, effective convolution": ("LoHaConfig", {"r": 3, "alpha": 2, "use_effective_conv2d": True}),
    "LoKr": ("LoKrConfig", {"r": 2, "alpha": 3, "decompose_factor": 4}),
    "LoKr, effective convolution": (
        "LoKrConfig",
        {"r": 2, "alpha": 3, "decompose_both": True, "use_effective_conv2d": True},
    ),
    "LoKr, whole halves": ("LoKrConfig", {"r": 64, "alpha": 3}),
    "IA3 on outputs": ("IA3Config", {"feedforward_modules": []}),
    "IA3 on inputs": ("IA3Config", {"feedforward_modules": ["to_out.0", "conv1", "proj_in"]}),
}


def layer_of(name: str):
    """Returns a layer of PyTorch with random weights, of the shapes in SHAPES."""
    shape = SHAPES[f"{name}.weight"]
    if len(shape) == 1:
        return nn.GroupNorm(4, shape[0])
    if len(shape) == 2:
        return nn.Linear(shape[1], shape[0])
    return nn.Conv2d(shape[1], shape[0], shape[2], padding=shape[2] // 2)


def network(names=(*ALL, NORM)):
    """Returns a module whose layers have the names and shapes of a UNet's, random also in norms and biases."""
    torch.manual_seed(0)
    root = nn.Module()
    for name in names:
        place, (*path, last) = root, name.split(".")
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        place.add_module(last, layer_of(name))
    with torch.no_grad():
        for parameter in root.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    root.forward = lambda x: x
    return root


def randomise(module):
    """Gives every trainable tensor of an adapter a random value; magnitudes move a little from the weight's norms."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "dora" in name or "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            else:
                parameter.normal_(1.0 if "ia3_l" in name else 0.0, 0.3)


def lycoris_modules(kind: str):
    """Returns (network, {layer: LyCORIS's module}) with random adapters of rank 3 and alpha 2."""
    algorithm, options = LYCORIS[kind]
    root, modules = network(), {}
    classes = adapters.lycoris_classes()
    for name in ALL:
        layer = root.get_submodule(name)
        modules[name] = classes[algorithm](name, layer, 1.0, lora_dim=3, alpha=2.0, **options)
    if algorithm == "full":
        modules[NORM] = classes["norm"](NORM, root.get_submodule(NORM), 1.0)
    for module in modules.values():
        if algorithm == "full" and module is not modules[NORM]:  # It trains a copy of the weight.
            module.is_diff = False
            with torch.no_grad():
                for trained, own in (
                    (module.weight, module.org_module[0].weight),
                    (module.bias, module.org_module[0].bias),
                ):
                    trained.copy_(own + 0.3 * torch.randn_like(own))
            continue
        randomise(module)
    return root, modules


def lycoris_error(kind: str, folder) -> float:
    """Writes LyCORIS's file of a kind, folds it at WEIGHT, and returns the largest relative error."""
    root, modules = lycoris_modules(kind)
    tensors, expected = {}, {name: tensor.detach().numpy() for name, tensor in root.state_dict().items()}
    with torch.no_grad():
        for name, module in modules.items():
            own = module.custom_state_dict() or module.state_dict()
            prefix = "lora_unet_" + name.replace(".", "_")
            tensors |= {f"{prefix}.{role}": tensor.detach().numpy().copy() for role, tensor in own.items()}
            for part, difference in adapters.lycoris_differences(module).items():
                expected[f"{name}.{part}"] = expected[f"{name}.{part}"] + WEIGHT * difference.numpy()
    save(folder / "x.safetensors", tensors)
    return largest_error(root, folder / "x.safetensors", expected, WEIGHT)


def peft_error(kind: str, folder) -> float:
    """Saves PEFT's adapter of a kind, folds it, and returns the largest error relative to PEFT's merged weights."""
    class_name, fields = PEFT[kind]
    root = network(ALL)
    plain = network(ALL)
    config = getattr(peft, class_name)(target_modules=["to_out.0", "conv1", "proj_in"], **fields)
    wrapped = peft.PeftModel(root, config)
    with torch.no_grad():
        randomise_adapter(wrapped)
    wrapped.save_pretrained(folder)
    merged = wrapped.merge_and_unload()
    expected = {name: tensor.detach().numpy() for name, tensor in merged.state_dict().items()}
    return largest_error(plain, folder / "adapter_model.safetensors", expected, 1.0)


def randomise_adapter(wrapped):
    for name, parameter in wrapped.named_parameters():
        if "magnitude" in name:
            parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
        elif "base_layer" not in name and "norm" not in name:
            parameter.normal_(1.0 if "ia3_l" in name else 0.0, 0.3)


def largest_error(root, path, expected, weight) -> float:
    base = {name: tensor.detach().numpy() for name, tensor in root.state_dict().items()}
    folded = fold(path, base, weight)
    changed = [name for name in expected if not np.array_equal(expected[name], base[name])]
    assert changed and set(folded.computed) >= set(changed)
    errors = [np.abs(folded[name] - expected[name]).max() / np.abs(expected[name]).max() for name in expected]
    return float(max(errors))


def fold(path, base, weight):
    """Returns a state dict with an adapter folded in, for a part of a UNet."""
    shapes = {key: array.shape for key, array in base.items()}
    updates = adapters.match(path, shapes).updates["unet"]
    return folding.Folded(base, {key: [(weight, update)] for key, update in updates.items()}, shapes)


@pytest.mark.parametrize("kind", LYCORIS)
def test_lycoris_gives_the_same_weights(tmp_path, kind):
    assert lycoris_error(kind, tmp_path) < GATE


@pytest.mark.parametrize("kind", PEFT)
def test_peft_gives_the_same_weights(tmp_path, kind):
    assert peft_error(kind, tmp_path) < GATE


def test_the_first_gloras_have_exchanged_names(tmp_path):
    root, modules = lycoris_modules("GLoRA")
    base = {name: tensor.detach().numpy() for name, tensor in root.state_dict().items()}
    new, old = {}, {}
    for name, module in ((name, modules[name]) for name in (DENSE, CONV_1)):
        prefix = "lora_unet_" + name.replace(".", "_")
        for role, tensor in module.custom_state_dict().items():
            other = {"a1.weight": "a2.weight", "a2.weight": "a1.weight", "b1.weight": "b2.weight"}.get(role, role)
            other = "b1.weight" if role == "b2.weight" else other
            new[f"{prefix}.{role}"] = old[f"{prefix}.{other}"] = tensor.detach().numpy().copy()
    save(tmp_path / "new.safetensors", new)
    save(tmp_path / "old.safetensors", old)
    first, second = (fold(tmp_path / f"{name}.safetensors", base, 1.0) for name in ("new", "old"))
    for name in (DENSE, CONV_1):
        assert not np.array_equal(first[f"{name}.weight"], base[f"{name}.weight"])
        np.testing.assert_array_equal(first[f"{name}.weight"], second[f"{name}.weight"])


def test_the_order_of_adapters_does_not_matter(tmp_path):
    root, modules = lycoris_modules("DoRA on outputs")
    base = {name: tensor.detach().numpy() for name, tensor in root.state_dict().items()}
    shapes = {key: array.shape for key, array in base.items()}
    terms = []
    for kind in ("DoRA on outputs", "GLoRA", "LoHa"):
        tensors = {}
        for name, module in lycoris_modules(kind)[1].items():
            prefix = "lora_unet_" + name.replace(".", "_")
            tensors |= {f"{prefix}.{role}": t.detach().numpy().copy() for role, t in module.custom_state_dict().items()}
        save(tmp_path / f"{kind}.safetensors", tensors)
        terms.append((0.5, adapters.match(tmp_path / f"{kind}.safetensors", shapes).updates["unet"]))
    key = f"{DENSE}.weight"
    sums = [
        folding.Folded(base, {key: [(weight, updates[key]) for weight, updates in order]}, shapes)[key]
        for order in (terms, terms[::-1])
    ]
    np.testing.assert_allclose(sums[0], sums[1], rtol=0, atol=1e-6 * np.abs(sums[0]).max())


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"peft_type": "VERA"}, "of the type VERA"),
        ({"fan_in_fan_out": True}, "trained with fan_in_fan_out"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "is not the name of a layer"),
        ({"alpha_pattern": [1]}, "not a JSON object"),
        ({"lora_alpha": []}, "no number as alpha"),
        ({"lora_alpha": 1, "use_rslora": True, "alpha_pattern": {"to_out.0": "x"}}, "no number as alpha"),
    ],
)
def test_a_config_that_is_not_followed_is_an_error(tmp_path, fields, message):
    root = network(ALL)
    config = peft.LoraConfig(target_modules=["to_out.0"], r=2)
    peft.PeftModel(root, config).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(CheckpointError, match=message):
        adapters.match(tmp_path / "adapter_model.safetensors", SHAPES)


def test_a_difference_of_zero_strength_leaves_a_dora_out(tmp_path):
    root, modules = lycoris_modules("DoRA on outputs")
    tensors = {}
    for name, module in modules.items():
        prefix = "lora_unet_" + name.replace(".", "_")
        tensors |= {f"{prefix}.{role}": t.detach().numpy().copy() for role, t in module.custom_state_dict().items()}
    save(tmp_path / "x.safetensors", tensors)
    base = {name: tensor.detach().numpy() for name, tensor in root.state_dict().items()}
    folded = fold(tmp_path / "x.safetensors", base, 0.0)
    for key in folded.computed:
        np.testing.assert_array_equal(folded[key], base[key])


def main() -> None:
    """Prints one line per kind: the oracle, and the largest error relative to the largest weight."""
    import pathlib
    import tempfile

    for oracle, kinds, error in (("LyCORIS", LYCORIS, lycoris_error), ("PEFT", PEFT, peft_error)):
        for kind in kinds:
            with tempfile.TemporaryDirectory() as folder:
                print(f"{oracle}, {kind}: {error(kind, pathlib.Path(folder)):.1e}")


if __name__ == "__main__":
    sys.exit(main())
