"""Kernels are summed by name, and nothing but what ran on a device's streams."""

from dmm_jax import bench_profile


def name(kind, pid, tid, text):
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": text}}


def ran(pid, tid, text, microseconds):
    return {"ph": "X", "pid": pid, "tid": tid, "name": text, "dur": microseconds}


def test_kernels_are_summed_by_name_a_call():
    events = [
        name("process_name", 1, 0, "/device:GPU:0"), name("process_name", 2, 0, "/host:CPU"),
        name("thread_name", 1, 7, "Stream #7(Compute)"), name("thread_name", 1, 8, "XLA Ops"),
        name("thread_name", 2, 7, "Stream #7"),
        ran(1, 7, "loop_fusion_1", 2000), ran(1, 7, "loop_fusion_12_3", 4000), ran(1, 7, "gemm", 10000),
        ran(1, 7, "gemm", 10000), ran(1, 8, "gemm", 9e9), ran(2, 7, "gemm", 9e9),
    ]  # fmt: skip
    kernels = bench_profile.summed(events)
    assert kernels == {"gemm": (10.0, 1), "loop_fusion": (3.0, 1)}
    assert list(kernels) == ["gemm", "loop_fusion"]
    assert "gemm" in bench_profile.table(kernels).splitlines()[1]
