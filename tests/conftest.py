"""Test settings: CPU, exact float32 products, and run-time checks of every annotated shape."""

import dis
import gc
import importlib.metadata
import inspect
import os
import pathlib
import tempfile
import types

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Nearly all of a test's time is compiling; programs that run once need no optimising.
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"  # Splitting takes a tenth.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # Later versions do not know this flag and exit.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"  # Compiles in half the time.
# Workers, and the programs that tests start, share one cache of compiled programs: most compile the same step.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="dmm_jax_compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # A run has fifty programs that compile in a moment.
gc.set_threshold(100_000, 50, 100)  # Tracing makes many objects, few of them in cycles.

import jax  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Only modules that annotate shapes: a check of every call of every function takes half of a program's tracing.
ROOT = pathlib.Path(__file__).parents[1]
ANNOTATED = [path for path in ROOT.glob("dmm_jax/**/*.py") if "jaxtyping" in path.read_text("utf-8")]
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ANNOTATED]
install_import_hook(MODULES, "beartype.beartype")

import pytest  # noqa: E402

LONGEST = ("test_processes.py", "test_train.py", "test_sharding.py")  # Minutes each.
SLOW_MODULES = {"subprocess", "multiprocessing", "dmm_jax.train"}


def pytest_collection_modifyitems(items):
    """Marks slow tests; puts the longest files first, then those that train, so that no worker ends with a long one."""
    for item in items:
        fixtures = (definitions[-1].func for definitions in item._fixtureinfo.name2fixturedefs.values())
        if SLOW_MODULES & set().union(*map(modules_used, (item.function, *fixtures))):
            item.add_marker("slow")
    training = {item.path for item in items if "tiny" in item.fixturenames}
    items.sort(key=lambda item: (item.path.name not in LONGEST, item.path not in training))


def modules_used(function, seen=None) -> set[str]:
    """Returns the modules that a test's function names, and those that helpers of the tests name which it names."""
    function, seen = inspect.unwrap(function), set() if seen is None else seen
    modules, codes = set(), [getattr(function, "__code__", None)]
    while codes:
        if (code := codes.pop()) is None or code in seen:
            continue
        seen.add(code)
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        package = ""
        for instruction in dis.get_instructions(code):
            if instruction.opname == "IMPORT_NAME":
                package = instruction.argval
                modules.add(package)
            elif instruction.opname == "IMPORT_FROM":
                modules.add(f"{package}.{instruction.argval}")
            elif instruction.opname == "LOAD_GLOBAL":
                value = function.__globals__.get(instruction.argval)
                if inspect.ismodule(value):
                    modules.add(value.__name__)
                elif getattr(value, "__module__", "").startswith("tests."):
                    helpers = [value] if inspect.isfunction(value) else filter(inspect.isfunction, vars(value).values())
                    modules |= set().union(*(modules_used(helper, seen) for helper in helpers))
    return modules


@pytest.fixture(scope="module", autouse=True)
def _programs_of_one_module():
    """Frees programs after each module, and their memory; the next module loads them from the cache again."""
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
