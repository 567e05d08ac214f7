"""The devices that a run may use: the figures of their makers, and the share of those figures that a plan counts on.

TPUs: cloud.google.com/tpu/docs/{v5e,v5p,v6e}; GPUs: NVIDIA's data sheets, dense figures, and its DGX systems' networks.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

from dmm_jax.runtime.errors import UserError, meant

COMPUTE_SHARE = 0.4  # Share of the bf16 peak that products reach; torch.compile reaches 0.34 of an H200's in this step.
BANDWIDTH_SHARE = 0.8  # Share of the memory's bandwidth.
GPU_SHARE = 0.95  # Share of a GPU's memory that the command line lets JAX take; CUDA's context needs the rest.
GPUS_PER_HOST = 8  # NVLink joins these.


@dataclasses.dataclass(frozen=True)
class Device:
    """One chip; memory in bytes, rates in bytes/s and FLOP/s."""

    name: str
    bf16_flops: float
    memory_bandwidth: float
    memory: float  # What a program can use: less than the maker's figure.
    link_bandwidth: float  # A ring along one mesh axis: two links of a TPU's torus, an NVIDIA GPU's NVLinks one way.
    network_bandwidth: float  # One chip's share of its host's network, which joins TPU slices and hosts of GPUs.
    host_bandwidth: float  # From the host's memory, one way: four fifths of what its PCI Express lanes carry.
    kind_pattern: str  # A pattern of JAX's `device_kind`.


GIB = 2.0**30
# Bytes/s of 16 lanes (four fifths of 16, 32 and 63 GB/s), which also join the cards of a desktop; between desktops.
PCIE_3, PCIE_4, PCIE_5, ETHERNET = 12.5e9, 25e9, 50e9, 1.25e9
# Google states no lanes of TPU hosts: theirs are an assumption.
# The compiler allows v5e's memory; other TPUs have the same proportion, GPUs lose CUDA's context.
DEVICES = {
    "v5e": Device("TPU v5e", 197e12, 819e9, 15.75 * GIB, 90e9, 3.125e9, PCIE_3, "TPU v5 ?(lite|e)"),
    "v5p": Device("TPU v5p", 459e12, 2765e9, 95 * GIB - 0.25 * GIB, 180e9, 6.25e9, PCIE_3, "TPU v5p?"),
    "v6e": Device("TPU v6e", 918e12, 1640e9, 31.25 * GIB, 180e9, 12.5e9, PCIE_3, "TPU v6 ?(lite|e)"),
    "H100": Device("NVIDIA H100", 989e12, 3350e9, GPU_SHARE * 80e9, 450e9, 50e9, PCIE_5, "NVIDIA H100.*HBM3"),
    "H200": Device("NVIDIA H200", 989e12, 4800e9, GPU_SHARE * 141e9, 450e9, 50e9, PCIE_5, "NVIDIA H200.*"),
    "A100": Device("NVIDIA A100", 312e12, 2039e9, GPU_SHARE * 80e9, 300e9, 25e9, PCIE_4, "NVIDIA A100.*80GB"),
    "A100-40GB": Device("NVIDIA A100", 312e12, 1555e9, GPU_SHARE * 40e9, 300e9, 25e9, PCIE_4, "NVIDIA A100.*40GB"),
    "L40S": Device("NVIDIA L40S", 362e12, 864e9, GPU_SHARE * 48e9, PCIE_4, ETHERNET, PCIE_4, "NVIDIA L40S"),
    "A6000": Device("NVIDIA RTX A6000", 155e12, 768e9, GPU_SHARE * 48e9, PCIE_4, ETHERNET, PCIE_4, "NVIDIA RTX A6000"),
    "A10": Device("NVIDIA A10", 125e12, 600e9, GPU_SHARE * 24e9, PCIE_4, ETHERNET, PCIE_4, "NVIDIA A10G?"),
    "L4": Device("NVIDIA L4", 121e12, 300e9, GPU_SHARE * 24e9, PCIE_4, ETHERNET, PCIE_4, "NVIDIA L4"),
    # GeForce cards compute products in bfloat16 at twice their float32 rate.
    **{
        f"RTX{name.replace(' ', '')}": Device(
            f"NVIDIA RTX {name}",
            2 * flops,
            bandwidth,
            GPU_SHARE * memory,
            bus,
            ETHERNET,
            bus,
            f"NVIDIA GeForce RTX {name}",
        )
        for name, flops, bandwidth, memory, bus in (
            ("5090", 104.8e12, 1792e9, 32e9, PCIE_5),
            ("4090", 82.6e12, 1008e9, 24e9, PCIE_4),
            ("3090", 35.6e12, 936e9, 24e9, PCIE_4),
            ("4080", 48.7e12, 717e9, 16e9, PCIE_4),
            ("4070 Ti", 40.1e12, 504e9, 12e9, PCIE_4),
            ("3060", 12.7e12, 360e9, 12e9, PCIE_4),
            ("4060", 15.1e12, 272e9, 8e9, PCIE_4 / 2),
            ("3070", 20.3e12, 448e9, 8e9, PCIE_4),
        )
    },
}
GPU_BY_MEMORY = {
    "80GB": "H100", "141GB": "H200", "40GB": "A100-40GB", "48GB": "L40S", "32GB": "RTX5090", "24GB": "RTX4090",
    "16GB": "RTX4080", "12GB": "RTX4070Ti", "8GB": "RTX4060",
}  # fmt: skip
FLAT_SLICES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SIZES = {  # In ascending order.
    "v5e": FLAT_SLICES,
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16"),
    "v6e": FLAT_SLICES,
    "gpu": ("1", "2", "4", "8", "16", "32", "64"),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Equal devices that one run uses; links join those of a TPU slice or of a host of GPUs, a network the rest."""

    name: str  # "v5e:4x4", "v5e:16x16*2", "gpu:8x80GB"; JAX's name for the devices of this process.
    device: Device | None  # None: a device without known rates.
    count: int
    platform: str  # "tpu", "gpu" or "cpu".
    domain_size: int  # Consecutive devices that links join: a TPU slice, or a host of GPUs.

    @property
    def larger(self) -> "Topology | None":
        """Returns the next size of the same device; None for the largest."""
        kind, _, size = self.name.partition(":")
        if self.platform == "gpu":
            count, _, model = size.partition("x")
            sizes = [f"{larger}x{model}" for larger in SIZES["gpu"] if int(larger) > int(count)]
        else:
            _, star, num_slices = size.partition("*")
            sizes = [shape + star + num_slices for shape in SIZES[kind] if _num_chips(shape) > self.domain_size]
        return topology(f"{kind}:{sizes[0]}") if sizes else None

    @property
    def speed_source(self) -> str:
        """Returns whose speed estimates have; where the name is a memory alone, also how to ask for other devices."""
        start, _, kind = self.name.rpartition("x")
        others = ""
        if kind.upper() in GPU_BY_MEMORY:
            same = [name for name, device in DEVICES.items() if device.memory == self.device.memory]
            others = ", ".join(f"{start}x{name}" for name in same if DEVICES[name] is not self.device)
        return f"at the speed of {self.device.name}" + (
            f"; for others of {kind}: --topology {others}" if others else ""
        )

    @property
    def domains(self) -> str:
        """Returns the name of what the network joins."""
        return "slices" if self.platform == "tpu" else "hosts"

    def carrier(self, group: Sequence[int]) -> str:
        """Returns "links" if they join all devices of a group, given by their numbers, else "network"."""
        return "links" if self._num_domains(group) == 1 else "network"

    def bandwidth(self, group: Sequence[int]) -> float:
        """Returns the bytes/s of a ring over a group of devices; those of one domain share its network connection."""
        links, num_domains = self.device.link_bandwidth, self._num_domains(group)
        if num_domains == 1:
            return links
        return min(links, self.device.network_bandwidth * len(group) / num_domains)

    def _num_domains(self, group):
        return len({number // self.domain_size for number in group})


def topology(name: str) -> Topology:
    """Reads "v5e:4x4", "v5p:2x2x2", "v5e:16x16*2" (two slices), "gpu:8x80GB", "gpu:8xH200" or "gpu:1xrtx4090".

    Raises:
      UserError: another form, a slice that is not offered, or an unknown device.
    """
    kind, _, size = name.partition(":")
    if kind == "gpu":
        match = re.fullmatch(r"(\d+)x(\w[\w-]*)", size)
        names = {name.lower(): name for name in (*DEVICES, *GPU_BY_MEMORY)}
        model = names.get(match[2].lower()) if match else None
        model = GPU_BY_MEMORY.get(model, model)
        if model in DEVICES and model not in SIZES and int(match[1]) > 0:
            return Topology(name, DEVICES[model], int(match[1]), "gpu", GPUS_PER_HOST)
    elif kind in SIZES:
        shape, num_slices = slices(size)
        if shape in SIZES[kind] and num_slices:
            return Topology(name, DEVICES[kind], _num_chips(shape) * num_slices, "tpu", _num_chips(shape))
        raise UserError(
            f"there is no topology {name!r}. Slices of {kind} are {', '.join(SIZES[kind])}; several of them are "
            f"written {kind}:{SIZES[kind][-1]}*2."
        )
    gpus = [*GPU_BY_MEMORY, *(model for model in DEVICES if model not in SIZES)]
    count, times, model = size.partition("x")
    end = meant(model or name, gpus, lambda gpu: f"gpu:{count if times else 1}x{gpu}")
    raise UserError(
        f"there is no topology {name!r}{end} Give a TPU slice such as v5e:4x4, v5p:2x2x2 or v6e:4x4, or "
        f"gpu:COUNTxKIND such as gpu:8x80GB; the kinds are {', '.join(gpus)}."
    )


def listed() -> list[tuple[str, str, str]]:
    """Returns a table of all devices: a topology of one or few, the device, its memory."""
    rows = [("topology", "device", "usable memory, GiB")]
    for name, device in DEVICES.items():
        example = f"{name}:{SIZES[name][2]}" if name in SIZES else f"gpu:1x{name}"
        rows.append((example, device.name, f"{device.memory / GIB:.1f}"))
    return rows


def slices(size: str) -> tuple[str, int]:
    """Reads "16x16*2" as (shape, number of slices); the number is 1 without a star, and 0 if it is not a number."""
    shape, star, count = size.partition("*")
    return shape, (int(count) if count.isdecimal() else 0) if star else 1


def of_process(devices: Sequence) -> Topology:
    """Returns the topology of JAX's devices."""
    platform, kind = devices[0].platform, devices[0].device_kind
    in_table = next((device for device in DEVICES.values() if re.fullmatch(device.kind_pattern, kind)), None)
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    domain_size = GPUS_PER_HOST if platform == "gpu" else len(devices) // num_slices
    return Topology(kind, in_table, len(devices), platform, domain_size)


def _num_chips(shape: str) -> int:
    return math.prod(int(size) for size in shape.split("x"))
