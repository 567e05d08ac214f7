"""The notebook docs/first_merge.ipynb: its code runs, with fewer steps and images."""

import json
import pathlib
import re

import pytest

NOTEBOOK = pathlib.Path(__file__).parents[1] / "docs" / "first_merge.ipynb"
SMALL = {"num_steps = 50": "num_steps = 2", "num_images = 512": "num_images = 64"}


def test_the_notebooks_cells_run(tmp_path, monkeypatch, capsys):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path))
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    code = "\n".join("".join(cell["source"]) for cell in cells)
    for default, small in SMALL.items():
        assert code.count(default) == 1
        code = code.replace(default, small)
    scope = {}
    exec(compile(code, str(NOTEBOOK), "exec"), scope)
    pyplot.close("all")
    assert scope["state"].step == 2
    difference = re.search(r"mean difference from the student: ([\d.]+) of 255", capsys.readouterr().out)
    assert float(difference[1]) < 1.0
