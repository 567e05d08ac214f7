"""The shape of the project: imports point down one list of folders, and no PyTorch or TensorFlow is imported."""

import ast
import inspect
import pathlib
import re
import subprocess
import sys

import dmm_jax
from dmm_jax.verbs.main import VERBS, build_parser

ROOT = pathlib.Path(dmm_jax.__file__).parent
# A folder, or a module at the package root, may import itself and every floor above it in this list.
FLOORS = (
    ("runtime", "diffusion", "kernels"),
    ("config", "models", "text"),
    ("checkpoints",),
    ("pipeline", "world"),
    ("gallery", "data"),
    ("distill", "evaluation"),
    ("distillation", "serve"),
    ("planning",),
    ("train", "bench"),
    ("studies", "verbs", "__main__"),
)
FORBIDDEN = {"torch", "tensorflow", "diffusers", "pickle"}
WITH_TORCH = {  # What the [torch] extra is for: no other module imports these.
    "dmm_jax.evaluation.verify_export",
    "dmm_jax.bench.peer",
    "dmm_jax.evaluation.convert_weights",
}


def imports(path: pathlib.Path):
    """Yields the full name of every module or attribute that a file imports, lazy imports included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name_of(path: pathlib.Path) -> str:
    return ".".join(("dmm_jax", *path.relative_to(ROOT).with_suffix("").parts))


FILES = {name_of(path): path for path in ROOT.rglob("*.py") if path.name != "__init__.py"}


def floor(module: str) -> int:
    (number,) = [number for number, folders in enumerate(FLOORS) if module.split(".")[1] in folders]
    return number


def test_the_list_of_floors_holds_every_folder_once():
    listed = [folder for folders in FLOORS for folder in folders]
    assert sorted(listed) == sorted({name.split(".")[1] for name in FILES})


def test_imports_point_down_the_list():
    wrong = {
        f"{name} imports {other}"
        for name, path in FILES.items()
        for other in imports(path)
        if other in FILES and floor(other) > floor(name)
    }
    assert wrong == set()


def test_no_two_folders_of_a_floor_import_each_other():
    edges = {
        (name.split(".")[1], other.split(".")[1])
        for name, path in FILES.items()
        for other in imports(path)
        if other in FILES and floor(other) == floor(name)
    }
    assert {(a, b) for a, b in edges if a != b and (b, a) in edges} == set()


def test_public_functions_take_paths_as_text():
    public = {name: getattr(dmm_jax, name) for name in dmm_jax.__all__}
    paths = [
        (name, parameter.annotation)
        for name, function in public.items()
        if inspect.isfunction(function)
        for parameter in inspect.signature(function).parameters.values()
        if "Path" in str(parameter.annotation)
    ]
    assert len(paths) > 5 and [place for place in paths if "str" not in str(place[1])] == []


def test_no_circle_of_modules():
    waiting = {name: {other for other in imports(path) if other in FILES} - {name} for name, path in FILES.items()}
    while free := {name for name, others in waiting.items() if not others}:
        waiting = {name: others - free for name, others in waiting.items() if name not in free}
    assert waiting == {}


def test_only_the_torch_extra_imports_pytorch():
    checked = {name: path for name, path in FILES.items() if name not in WITH_TORCH}
    assert [name for name, path in checked.items() for it in imports(path) if it.split(".")[0] in FORBIDDEN] == []


ONE_VERB = {  # Files of checkpoints/ whose messages one verb alone prints.
    "export", "export_lora", "extract_lora", "lora_tools", "card_additions", "hub", "average", "inspect_text", "write",
}  # fmt: skip


def texts(path: pathlib.Path):
    """Yields every text in a file, f-strings as a whole, without docstrings and other texts that are statements."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    skipped = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            skipped |= set(map(id, node.values))
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.value


def test_a_message_of_several_verbs_names_the_verb_of_an_option():
    (verbs,) = [action.choices for action in build_parser(*VERBS)._actions if action.dest == "verb"]
    wrong = [
        (path.name, option)
        for path in ROOT.joinpath("checkpoints").rglob("*.py")
        for text in (texts(path) if path.stem not in ONE_VERB else ())
        for option in re.findall("--[a-z][a-z-]+", text)
        if not any(option in verbs[verb]._option_string_actions for verb in VERBS if re.search(rf"\b{verb}\b", text))
    ]
    assert wrong == []


def test_every_file_has_a_docstring():
    assert [name for name, path in FILES.items() if not ast.get_docstring(ast.parse(path.read_text()))] == []


def test_importing_the_package_starts_no_device():
    """Processes join before JAX looks for devices; a constant array at the root of a module would look first."""
    names = sorted(set(FILES) - WITH_TORCH - {"dmm_jax.__main__"})
    code = f"import importlib\nfor name in {names}: importlib.import_module(name)\n"
    code += "from jax._src import xla_bridge\nassert not xla_bridge.backends_are_initialized()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, check=True)
