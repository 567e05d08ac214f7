"""Test settings: CPU, exact float32 products, and run-time checks of every annotated shape."""

import gc
import importlib.metadata
import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Nearly all of a test's time is compiling; programs that run once need no optimising.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # Later ones have no such flag, and end where it is set.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"  # Compiles in half the time.
gc.set_threshold(100_000, 50, 100)  # Tracing makes many objects, nearly none of them in cycles.

import jax  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")

# What one test has compiled is loaded by the next, in every worker: most tests that train compile the same step.
if "DMM_JAX_TEST_PROGRAMS" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="dmm_jax_compiled_")
    os.environ["DMM_JAX_TEST_PROGRAMS"] = compiled.name
jax.config.update("jax_compilation_cache_dir", os.environ["DMM_JAX_TEST_PROGRAMS"])

install_import_hook("dmm_jax", "beartype.beartype")

import pytest  # noqa: E402

LONGEST = ("test_processes.py", "test_train.py", "test_sharding.py")  # Minutes each.


def pytest_collection_modifyitems(items):
    """Has the longest files come first, then all that train, so that no worker ends with a long one alone."""
    training = {item.path for item in items if "tiny" in item.fixturenames}
    items.sort(key=lambda item: (item.path.name not in LONGEST, item.path not in training))


@pytest.fixture(scope="module", autouse=True)
def _programs_of_one_module():
    """Programs are let go after each module, and memory with them; what comes again is loaded from the folder."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny world on disk and a config that trains on it, its cache prepared; copy the config before changing it."""
    from dmm_jax.data.prepare import prepare_images
    from tests import worlds

    folder = tmp_path_factory.mktemp("tiny")
    paths = worlds.write_world(folder)
    config = worlds.tiny_config(paths, folder / "cache")
    prepare_images(config)
    return paths, config


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory):
    """The workdir of a finished run on the tiny world."""
    from dmm_jax import train

    workdir = tmp_path_factory.mktemp("trained") / "run"
    train.run(tiny[1].copy_and_resolve_references(), workdir)
    return workdir
