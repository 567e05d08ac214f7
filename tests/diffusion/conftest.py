"""diffusers as an oracle without rounding: its schedulers computing in float64 throughout."""

import importlib

import pytest

SCHEDULER_FILES = (
    "ddim",
    "dpmsolver_multistep",
    "euler_discrete",
    "euler_ancestral_discrete",
    "heun_discrete",
    "unipc_multistep",
    "lcm",
)


class InDouble:
    """A module whose float32 is float64."""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, "float64" if name == "float32" else name)


@pytest.fixture
def diffusers_in_double(monkeypatch):
    """Makes diffusers compute in float64: its float32 loses up to 3e-4 (Euler at a sigma of 4096)."""
    pytest.importorskip("diffusers")
    for name in SCHEDULER_FILES:
        file = importlib.import_module(f"diffusers.schedulers.scheduling_{name}")
        monkeypatch.setattr(file, "torch", InDouble(file.torch))
        monkeypatch.setattr(file, "np", InDouble(file.np))
