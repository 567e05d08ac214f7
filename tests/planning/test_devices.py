"""Topologies: what is counted, what comes next, and what an unknown one is told."""

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
    "name", ["v5e", "v5e:4", "v9:4x4", "gpu:8", "gpu:0x80GB", "gpu:8x81GB", "v5e:0x4", "gpu:8xv5e"]
)
def test_an_unknown_topology_is_told_what_there_is(name):
    with pytest.raises(ValueError, match=r"v5e:4x4.*80GB.*H200"):
        devices.topology(name)


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
