"""Topologies: what is counted, what comes next, and what an unknown one is told."""

import types

import pytest

from dmm_jax.planning import devices


@pytest.mark.parametrize(
    "name, count, platform", [("v5e:4x4", 16, "tpu"), ("v5p:2x2x2", 8, "tpu"), ("gpu:8x80GB", 8, "gpu")]
)
def test_devices_are_counted(name, count, platform):
    topology = devices.topology(name)
    assert (topology.count, topology.platform) == (count, platform)


def test_a_gpu_goes_by_its_memory_or_its_name():
    assert devices.topology("gpu:2x141GB").device == devices.topology("gpu:2xH200").device
    assert devices.topology("gpu:1x80GB").device.name == "NVIDIA H100"


@pytest.mark.parametrize(
    "name, told",
    [
        *((name, r"v5e:4x4.*80GB.*H200") for name in ("v9:4x4", "gpu:8", "gpu:0x80GB", "gpu:8x81GB", "gpu:8xv5e")),
        *((f"v5e{size}", "Slices of v5e are 2x2, 2x4.*16x16; .*v5e:16x16") for size in ("", ":4", ":0x4", ":3x7")),
        *((f"v5e:{size}", "Slices of v5e are") for size in ("100x100", "16x16x2", "4x4*0", "4x4*two", "4x4*")),
        ("v5p:2x2", "Slices of v5p are 2x2x1, 2x2x2"),
    ],
)
def test_an_unknown_topology_is_told_what_there_is(name, told):
    with pytest.raises(ValueError, match=told):
        devices.topology(name)


def test_several_slices_are_one_topology():
    two = devices.topology("v5e:4x4*2")
    assert (two.count, two.linked, two.larger.name) == (32, 16, "v5e:4x8*2")


def test_what_links_do_not_join_goes_by_the_network():
    """A host's GPUs share its network among the groups that each takes part in."""
    topology = devices.topology("gpu:16xH100")
    device = topology.device
    within, one_each, whole = range(8), (0, 8), range(16)
    assert [topology.carrier(group) for group in (within, one_each, whole)] == ["links", "network", "network"]
    assert topology.bandwidth(within) == device.link_bandwidth
    assert topology.bandwidth(one_each) == device.network_bandwidth
    assert topology.bandwidth(whole) == min(8 * device.network_bandwidth, device.link_bandwidth)


@pytest.mark.parametrize(
    "kind, name",
    [
        ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"), ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-80GB", "A100"), ("cpu", None),
    ],
)  # fmt: skip
def test_devices_that_are_here_are_known_by_what_they_call_themselves(kind, name):
    one = types.SimpleNamespace(platform="gpu" if "NVIDIA" in kind else "tpu", device_kind=kind, slice_index=0)
    found = devices.here([one] * 4)
    assert found.device == devices.DEVICES.get(name) and found.count == 4


@pytest.mark.parametrize(
    "name, larger", [("v5e:4x4", "v5e:4x8"), ("v5p:2x2x2", "v5p:2x2x4"), ("gpu:8x80GB", "gpu:16x80GB")]
)
def test_the_larger_topology_is_the_next_of_the_same_device(name, larger):
    assert devices.topology(name).larger.name == larger
    assert devices.topology(name).larger.device == devices.topology(name).device


def test_the_largest_has_none_larger():
    assert devices.topology("v5e:16x16").larger is None


@pytest.mark.parametrize("kind", devices.SLICES)
def test_sizes_grow(kind):
    def name(size):
        return f"gpu:{size}x80GB" if kind == "gpu" else f"{kind}:{size}"

    counts = [devices.topology(name(size)).count for size in devices.SLICES[kind]]
    assert counts == sorted(set(counts))
