"""The devices that a run may be planned for: what their makers promise, and what of it we count on.

TPUs: cloud.google.com/tpu/docs/{v5e,v5p,v6e}; GPUs: NVIDIA's data sheets, dense figures, and its DGX systems' networks.
"""

import dataclasses
import re
from collections.abc import Sequence

from dmm_jax.runtime.errors import UserError

COMPUTE_SHARE = 0.4  # Of the peak of bf16 products: torch.compile reaches 0.34 of an H200's in this step.
BANDWIDTH_SHARE = 0.8  # Of the memory's.
GPUS_PER_HOST = 8  # That NVLink joins.


@dataclasses.dataclass(frozen=True)
class Device:
    """One chip; memory in bytes, rates in bytes/s and FLOP/s."""

    name: str
    bf16_flops: float
    memory_bandwidth: float
    memory: float  # What a program can have: less than the maker's figure.
    link_bandwidth: float  # Of a ring along one mesh axis: two links of a TPU's torus, an NVIDIA GPU's NVLinks one way.
    network_bandwidth: float  # One chip's share of its host's: between TPU slices, between hosts of GPUs.
    calls_itself: str  # A pattern of JAX's `device_kind`.


GIB = 2.0**30
# The memory of v5e is what the compiler allows; the others' in the same proportion, GPUs' less CUDA's context.
DEVICES = {
    "v5e": Device("TPU v5e", 197e12, 819e9, 15.75 * GIB, 90e9, 3.125e9, "TPU v5 ?(lite|e)"),
    "v5p": Device("TPU v5p", 459e12, 2765e9, 95 * GIB - 0.25 * GIB, 180e9, 6.25e9, "TPU v5p?"),
    "v6e": Device("TPU v6e", 918e12, 1640e9, 31.25 * GIB, 180e9, 12.5e9, "TPU v6 ?(lite|e)"),
    "H100": Device("NVIDIA H100", 989e12, 3350e9, 0.95 * 80e9, 450e9, 50e9, "NVIDIA H100.*HBM3"),
    "H200": Device("NVIDIA H200", 989e12, 4800e9, 0.95 * 141e9, 450e9, 50e9, "NVIDIA H200.*"),
    "A100": Device("NVIDIA A100", 312e12, 2039e9, 0.95 * 80e9, 300e9, 25e9, "NVIDIA A100.*80GB"),
    "A100-40GB": Device("NVIDIA A100", 312e12, 1555e9, 0.95 * 40e9, 300e9, 25e9, "NVIDIA A100.*40GB"),
}
SIZES = {"80GB": "H100", "141GB": "H200", "40GB": "A100-40GB"}
FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SLICES = {
    "v5e": FLAT,
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16"),
    "v6e": FLAT,
    "gpu": ("1", "2", "4", "8", "16", "32", "64"),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Equal devices that one run uses."""

    name: str  # "v5e:4x4", "v5e:16x16*2", "gpu:8x80GB"; or what JAX calls the devices that are here.
    device: Device | None  # None: in no table, so nothing is known of its rates.
    count: int
    platform: str  # "tpu", "gpu" or "cpu".
    linked: int  # How many, one after the other, are joined by links: a TPU slice, a host of GPUs.

    @property
    def larger(self) -> "Topology | None":
        """The next size of the same device; None if there is none."""
        kind, _, size = self.name.partition(":")
        if self.platform == "gpu":
            count, _, which = size.partition("x")
            sizes = [f"{more}x{which}" for more in SLICES["gpu"] if int(more) > int(count)]
        else:
            sizes = [
                more + size[size.find("*") :] * ("*" in size) for more in SLICES[kind] if _product(more) > self.linked
            ]
        return topology(f"{kind}:{sizes[0]}") if sizes else None

    @property
    def beyond(self) -> str:
        """What the network joins."""
        return "slices" if self.platform == "tpu" else "hosts"

    def carrier(self, group: Sequence[int]) -> str:
        """Returns "links" where they join all devices of a group, by their numbers, and "network" where they do not."""
        return "links" if self._places(group) == 1 else "network"

    def bandwidth(self, group: Sequence[int]) -> float:
        """Returns the bytes/s at which a ring over a group of devices turns: in the network, all of a place join in."""
        links, places = self.device.link_bandwidth, self._places(group)
        if places == 1:
            return links
        return min(links, self.device.network_bandwidth * len(group) / places)

    def _places(self, group):
        return len({one // self.linked for one in group})


def topology(name: str) -> Topology:
    """Reads "v5e:4x4", "v5p:2x2x2", "v5e:16x16*2" (two slices), "gpu:8x80GB" or "gpu:8xH200".

    Raises:
      ValueError: another form, a slice that nobody rents out, or a device that is not in the table.
    """
    kind, _, size = name.partition(":")
    if kind == "gpu":
        match = re.fullmatch(r"(\d+)x(\w[\w-]*)", size)
        which = SIZES.get(match[2], match[2]) if match else None
        if which in DEVICES and which not in SLICES and int(match[1]) > 0:
            return Topology(name, DEVICES[which], int(match[1]), "gpu", GPUS_PER_HOST)
    elif kind in SLICES:
        shape, num_slices = slices(size)
        if shape in SLICES[kind] and num_slices:
            return Topology(name, DEVICES[kind], _product(shape) * num_slices, "tpu", _product(shape))
        raise UserError(
            f"there is no topology {name!r}. Slices of {kind} are {', '.join(SLICES[kind])}; several of them are "
            f"written {kind}:{SLICES[kind][-1]}*2."
        )
    gpus = ", ".join([*SIZES, *(which for which in DEVICES if which not in SLICES)])
    raise UserError(
        f"there is no topology {name!r}. Give a TPU slice such as v5e:4x4, v5p:2x2x2 or v6e:4x4, or gpu:COUNTxKIND "
        f"such as gpu:8x80GB; the kinds are {gpus}."
    )


def slices(size: str) -> tuple[str, int]:
    """Reads "16x16*2" as a slice's shape and how many there are: 1 where it is not said, 0 if it is no number."""
    shape, several, count = size.partition("*")
    return shape, (int(count) if count.isdecimal() else 0) if several else 1


def here(devices: Sequence) -> Topology:
    """Describes JAX's devices."""
    platform, kind = devices[0].platform, devices[0].device_kind
    device = next((one for one in DEVICES.values() if re.fullmatch(one.calls_itself, kind)), None)
    num_slices = len({getattr(one, "slice_index", 0) for one in devices})
    linked = GPUS_PER_HOST if platform == "gpu" else len(devices) // num_slices
    return Topology(kind, device, len(devices), platform, linked)


def _product(size):
    product = 1
    for part in size.split("x"):
        product *= int(part)
    return product
