"""The devices that a run may be planned for: what their makers promise, and what of it we count on.

TPUs: cloud.google.com/tpu/docs/{v5e,v5p,v6e}; GPUs: NVIDIA's data sheets, dense figures.
"""

import dataclasses
import re

COMPUTE_SHARE = 0.4  # Of the peak of bf16 products: torch.compile reaches 0.34 of an H200's in this step.
BANDWIDTH_SHARE = 0.8  # Of the memory's.


@dataclasses.dataclass(frozen=True)
class Device:
    """One chip; memory in bytes, rates in bytes/s and FLOP/s."""

    name: str
    bf16_flops: float
    memory_bandwidth: float
    memory: float  # What a program can have: less than the maker's figure.
    link_bandwidth: float  # Of a ring along one mesh axis: two links of a TPU's torus, an NVIDIA GPU's NVLinks one way.


GIB = 2.0**30
# The memory of v5e is what the compiler allows; the others' in the same proportion, GPUs' less CUDA's context.
DEVICES = {
    "v5e": Device("TPU v5e", 197e12, 819e9, 15.75 * GIB, 90e9),
    "v5p": Device("TPU v5p", 459e12, 2765e9, 95 * GIB - 0.25 * GIB, 180e9),
    "v6e": Device("TPU v6e", 918e12, 1640e9, 31.25 * GIB, 180e9),
    "H100": Device("NVIDIA H100", 989e12, 3350e9, 0.95 * 80e9, 450e9),
    "H200": Device("NVIDIA H200", 989e12, 4800e9, 0.95 * 141e9, 450e9),
    "A100": Device("NVIDIA A100", 312e12, 2039e9, 0.95 * 80e9, 300e9),
    "A100-40GB": Device("NVIDIA A100", 312e12, 1555e9, 0.95 * 40e9, 300e9),
}
SIZES = {"80GB": "H100", "141GB": "H200", "40GB": "A100-40GB"}
SLICES = {
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "gpu": ("1", "2", "4", "8", "16", "32", "64"),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Equal devices that one run uses."""

    name: str  # "v5e:4x4", "gpu:8x80GB".
    device: Device
    count: int
    platform: str  # "tpu" or "gpu".

    @property
    def larger(self) -> "Topology | None":
        """The next size of the same device; None if there is none."""
        kind, _, size = self.name.partition(":")
        if self.platform == "gpu":
            count, _, which = size.partition("x")
            sizes = [f"{more}x{which}" for more in SLICES["gpu"] if int(more) > int(count)]
        else:
            sizes = [more for more in SLICES[kind] if _product(more) > self.count]
        return topology(f"{kind}:{sizes[0]}") if sizes else None


def topology(name: str) -> Topology:
    """Reads "v5e:4x4", "v5p:2x2x2", "gpu:8x80GB" or "gpu:8xH200".

    Raises:
      ValueError: another form, or a device that is not in the table.
    """
    kind, _, size = name.partition(":")
    if kind == "gpu":
        match = re.fullmatch(r"(\d+)x(\w[\w-]*)", size)
        which = SIZES.get(match[2], match[2]) if match else None
        if which in DEVICES and which not in SLICES and int(match[1]) > 0:
            return Topology(name, DEVICES[which], int(match[1]), "gpu")
    elif kind in SLICES and re.fullmatch(r"\d+(x\d+){1,2}", size) and _product(size) > 0:
        return Topology(name, DEVICES[kind], _product(size), "tpu")
    gpus = ", ".join([*SIZES, *(which for which in DEVICES if which not in SLICES)])
    raise ValueError(
        f"there is no topology {name!r}. Give a TPU slice such as v5e:4x4, v5p:2x2x2 or v6e:4x4, or gpu:COUNTxKIND "
        f"such as gpu:8x80GB; the kinds are {gpus}."
    )


def _product(size):
    product = 1
    for part in size.split("x"):
        product *= int(part)
    return product
