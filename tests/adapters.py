"""Adapters for tests: LyCORIS's classes, the differences that they stand for, and a reader without a whole base."""

import importlib
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from dmm_jax.checkpoints.formats import lora
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile


def lycoris_classes() -> dict:
    """Returns LyCORIS's modules, by the name of their algorithm."""
    names = {
        "locon": "LoConModule", "loha": "LohaModule", "lokr": "LokrModule", "glora": "GLoRAModule", "ia3": "IA3Module",
        "full": "FullModule", "norms": "NormModule",
    }  # fmt: skip
    classes = {name: getattr(importlib.import_module(f"lycoris.modules.{name}"), cls) for name, cls in names.items()}
    return classes | {"norm": classes["norms"]}


def lycoris_differences(module) -> dict:
    """Returns {"weight", and for some kinds "bias": what a module of LyCORIS adds at strength 1}.

    LyCORIS's `get_diff_weight` multiplies LoHa and LoKr by alpha / rank twice; its training uses `get_weight`, which
    is taken here.
    """
    weight = module.org_module[0].weight
    if module.name in ("loha", "kron"):
        difference = module.get_weight(module.shape)
    elif module.name in ("full", "norm"):
        difference, bias = module.get_diff_weight()
        return {"weight": difference, "bias": bias}
    else:
        difference = module.get_diff_weight()[0]
    if getattr(module, "wd", False):
        difference = module.apply_weight_decompose(weight + difference) - weight
    return {"weight": difference.reshape(weight.shape)}


def match(path: pathlib.Path, shapes: Mapping[str, tuple[int, ...]]):
    """Returns how a file fits a UNet of these shapes, which may be a part of one; refuses nothing silently."""
    layers = {
        prefix + spelling: ("unet", key)
        for key in shapes
        if key.endswith(".weight")
        for prefix, spelling in (
            ("lora_unet_", key.removesuffix(".weight").replace(".", "_")),
            ("base_model.model.", key.removesuffix(".weight")),
        )
    }
    result = lora.Match(TensorFile(path), layers, {"unet": shapes})
    assert not result.problems, result.problems
    return result


def factor_shapes(out: int, into: int, kernel: tuple[int, ...]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Returns {kind: {role: shape}} of adapters of rank 2 for a layer; `out` and `into` are even."""
    rank, ones, size = 2, (1,) * len(kernel), math.prod(kernel)
    lora = {"lora_up.weight": (out, rank, *ones), "lora_down.weight": (rank, into, *kernel)}
    halves = {f"hada_w{n}_a": (out, rank) for n in (1, 2)} | {f"hada_w{n}_b": (rank, into * size) for n in (1, 2)}
    core = {"lokr_w1": (2, 2), "lokr_w2_a": (out // 2, rank), "lokr_w2_b": (rank, into // 2 * size)}
    kinds = {
        "LoRA": lora,
        "LoRA with biases": lora | {"diff_b": (out,)},
        "LoHa": halves,
        "LoKr": core,
        "LoKr, both": core | {"lokr_w1_a": (2, 1), "lokr_w1_b": (1, 2)},
        "DoRA on outputs": lora | {"dora_scale": (out, 1, *ones)},
        "DoRA on inputs": lora | {"dora_scale": (1, into, *ones)},
        "DoRA of LoKr": core | {"dora_scale": (out, 1, *ones)},
        "GLoRA": {"a1.weight": (into, rank), "a2.weight": (rank, into), "b1.weight": (out, rank),
                  "b2.weight": (rank, into * size)},
        "IA3": {"weight": (into,), "on_input": ()},
        "full difference": {"diff": (out, into, *kernel), "diff_b": (out,)},
    }  # fmt: skip
    del kinds["LoKr, both"]["lokr_w1"]
    if kernel:
        mid = (rank, rank, *kernel)
        kinds["LoRA, Tucker"] = lora | {"lora_down.weight": (rank, into, *ones), "lora_mid.weight": mid}
        tucker = {role: (rank, out) for role in ("hada_w1_a", "hada_w2_a")} | {"hada_t1": mid, "hada_t2": mid}
        kinds["LoHa, Tucker"] = tucker | {role: (rank, into) for role in ("hada_w1_b", "hada_w2_b")}
        kinds["LoKr, Tucker"] = {
            "lokr_w1": (2, 2), "lokr_w2_a": (rank, out // 2), "lokr_w2_b": (rank, into // 2), "lokr_t2": mid,
        }  # fmt: skip
    return kinds


def random_adapter(kind: str, shapes: Mapping[str, tuple[int, ...]], layers: Sequence[str], seed: int = 0) -> dict:
    """Returns the tensors of an adapter of a kind for layers of a UNet, random, under kohya's names.

    Args:
      shapes: {our key: shape} of the UNet.
    """
    rng, tensors = np.random.default_rng(seed), {}
    for layer in layers:
        out, into, *kernel = shapes[f"{layer}.weight"]
        roles = factor_shapes(out, into, tuple(kernel)).get(kind)
        if roles is None:  # Only convolutions have this kind.
            continue
        if f"{layer}.bias" not in shapes:
            roles = {role: shape for role, shape in roles.items() if role != "diff_b"}
        prefix = "lora_unet_" + layer.replace(".", "_")
        for role, shape in roles.items():
            tensors[f"{prefix}.{role}"] = np.asarray(rng.normal(0, 0.3, shape), np.float32)
        tensors[f"{prefix}.alpha"] = np.asarray(2.0, np.float16)
    return tensors
