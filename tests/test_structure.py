"""The shape of the project: imports point one way, and nothing of PyTorch or TensorFlow is imported at run time."""

import ast
import pathlib

import dmm_jax

ROOT = pathlib.Path(dmm_jax.__file__).parent
# Lower numbers may be imported by higher ones. The embedded world's drawings and words are leaves that data may read.
LAYERS = {
    "compilation": 0, "config": 0, "diffusion": 0, "models": 0, "page": 0, "folders": 0, "metrics": 0, "sharding": 0,
    "tokenizer": 0, "flops": 0, "demo.scenes": 0, "demo.styles": 0, "demo.renderer": 0, "demo.words": 0,
    "demo.world": 0, "processes": 0, "workdirs": 1, "arguments": 0, "config_files": 0, "config_checks": 0,
    "styles": 0, "model_card": 2, "images": 1, "checkpoints": 1, "data": 1, "distill": 2, "pipeline": 2, "sample": 3,
    "verify": 3, "export": 3, "average": 3, "prepare": 3, "demo.layout": 3, "demo.lora": 3, "evaluation": 4,
    "demo.recipe": 5, "demo.random_checkpoints": 6, "demo.study": 7, "train": 4, "demo.experiment": 4, "demo.run": 6,
    "bench_profile": 0, "bench_networks": 6, "bench_numerics": 6, "bench": 7, "bench_peer": 7, "bench_verb": 8,
    "verbs": 8, "cli": 8, "planning": 1, "plan": 5, "prepare_samples": 3, "fit_style": 4, "parents": 2,
    "vocabulary": 0, "demo.study_rows": 6, "definitions": 3, "demo.architecture": 0, "demo.study_data": 6,
    "bench_scaling": 6, "bench_traffic": 0, "bench_timing": 0,
}  # fmt: skip
FORBIDDEN = {"torch", "tensorflow", "diffusers", "pickle"}
WITH_TORCH = {
    "dmm_jax.verify",
    "dmm_jax.bench_peer",
    "dmm_jax.evaluation.convert_inception",
    "dmm_jax.evaluation.convert_lpips",
}  # What the [torch] extra is for; nothing imports them unasked.


def imports(path: pathlib.Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(module: str) -> int | None:
    parts = module.split(".")[1:]
    return next((LAYERS[".".join(parts[:n])] for n in (2, 1) if ".".join(parts[:n]) in LAYERS), None)


def modules():
    return [path for path in ROOT.rglob("*.py") if path.name != "__init__.py"]


def name_of(path):
    return ".".join(("dmm_jax", *path.relative_to(ROOT).with_suffix("").parts))


def test_every_module_has_its_place():
    assert [name_of(path) for path in modules() if layer(name_of(path)) is None] == []


def test_imports_point_downwards():
    wrong = [
        f"{name_of(path)} imports {other}"
        for path in modules()
        for other in imports(path)
        if other.startswith("dmm_jax.") and layer(other) is not None and layer(other) > layer(name_of(path))
    ]
    assert wrong == []


def test_nothing_of_pytorch_tensorflow_or_pickle_is_imported():
    checked = [path for path in modules() if name_of(path) not in WITH_TORCH]
    assert [f"{path}: {name}" for path in checked for name in imports(path) if name.split(".")[0] in FORBIDDEN] == []


def test_every_file_says_what_it_is_for():
    assert [str(path) for path in modules() if not ast.get_docstring(ast.parse(path.read_text()))] == []
