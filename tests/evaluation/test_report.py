"""The report shows the exact results, and no prompt or style name can reach its markup."""

import html
import json
import re

import numpy as np
import pytest
from PIL import Image

from dmm_jax.evaluation.figures import format_number
from dmm_jax.evaluation.report import write_report
from dmm_jax.evaluation.report_sections import Interpolation, Pairs
from dmm_jax.evaluation.tiles import difference_strip, tile

HOSTILE = '<script>alert("x")</script> $\\frac{ ../../'


def results(names=("comic", "ink", "neon"), **changes):
    num, rng = len(names), np.random.default_rng(0)
    base, floor = rng.uniform(20, 40, num), rng.uniform(0.3, 0.5, num)
    matrix = rng.uniform(40, 90, (num, num))
    np.fill_diagonal(matrix, rng.uniform(1, 2, num))
    values = {
        "styles": list(names),
        "distance": "FD (shapes)",
        "n": 2000,
        "matrix": matrix.tolist(),
        "floor": floor.tolist(),
        "base": base.tolist(),
        "average": rng.uniform(10, 15, num).tolist(),
        "weight_merges": ["average"],
        "gap_closed": ((base - np.diagonal(matrix)) / (base - floor)).tolist(),
        "diagonal_is_minimum": True,
        "fidelity": {"latent_mse": dict.fromkeys(names, 0.0123456)},
        "pairs": 2,
        "settings": {"solver": "ddim", "num_inference_steps": 25},
        "timings": {"sample_s": 93.25},
        "command": "dmm-jax evaluate demo",
    }
    return values | changes


def extras(names, prompt, size=16):
    def pictures(*shape):
        return np.random.default_rng(1).integers(0, 256, (*shape, size, size, 3), dtype=np.uint8)

    score = dict.fromkeys(names, 0.5)
    return {
        "pairs": {name: Pairs([prompt] * 2, pictures(2), pictures(2)) for name in names},
        "interpolation": Interpolation(pictures(3), [0.0, 0.5, 1.0], names[0], names[-1], prompt),
        "training_log": [
            {"step": 10, "loss": 0.5, "score": score},
            {"step": 10, "validation_loss": 0.4, "validation": {name: [0.3, 0.5] for name in names}},
            {"step": 20, "loss": 0.4, "score": score},
        ],
    }


def numbers(text):
    return [float(value) for value in re.findall(r'<data value="([^"]*)">', text)]


def test_the_page_holds_every_number_of_the_results_exactly(tmp_path):
    values = results()
    shown = set(numbers(write_report(tmp_path / "report", values).read_text()))
    rows = [values[key] for key in ("floor", "base", "average", "gap_closed")]
    rows.append(np.diagonal(values["matrix"]).tolist())
    assert shown >= {value for row in rows for value in row} | {float(np.mean(row)) for row in rows}
    assert shown >= {0.0123456, 93.25}


def test_visible_numbers_are_the_exact_ones_rounded(tmp_path):
    text = write_report(tmp_path / "report", results()).read_text()
    for exact, shown in re.findall(r'<data value="([^"]*)">([^<]*)</data>', text):
        exact = float(exact) * (100 if shown.endswith("%") else 1)
        assert float(shown.removesuffix("%").replace(",", "")) == pytest.approx(
            exact, rel=6e-3, abs=0.51 * shown.endswith("%")
        )


def test_the_table_holds_the_weight_averages_share_of_the_gap(tmp_path):
    values = results(base=[10.0] * 3, average=[7.0] * 3, floor=[2.0] * 3, gap_closed=[0.9] * 3)
    text = write_report(tmp_path / "report", values).read_text()
    row = text.split('<th scope="row">Weight average')[1].split("</tr>")[0]
    assert numbers(row) == [7.0, 0.375] * 4


def test_every_weight_merge_has_a_row_in_the_table(tmp_path):
    merges = {"average": [7.0] * 3, "ties": [4.0] * 3, "dare": [9.0] * 3, "task_arithmetic": [10.0] * 3}
    values = results(base=[10.0] * 3, floor=[2.0] * 3, **merges, weight_merges=list(merges))
    text = write_report(tmp_path / "report", values).read_text()
    for label, shown in (("TIES", [4.0, 0.75]), ("DARE", [9.0, 0.125]), ("Task arithmetic", [10.0, 0.0])):
        assert numbers(text.split(f'<th scope="row">{label}')[1].split("</tr>")[0]) == shown * 4


def test_a_missing_weight_merge_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lack ties"):
        write_report(tmp_path / "report", results(weight_merges=["average", "ties"]))


def test_metrics_json_is_the_results(tmp_path):
    values = results()
    write_report(tmp_path / "report", values | {"floor": np.asarray(values["floor"])})
    assert json.loads((tmp_path / "report" / "metrics.json").read_text()) == values


def test_a_missing_number_is_null_in_metrics_json(tmp_path):
    write_report(tmp_path / "report", results(gap_closed=[None, 0.5, float("nan")]))
    text = (tmp_path / "report" / "metrics.json").read_text()
    assert json.loads(text)["gap_closed"] == [None, 0.5, None] and "NaN" not in text


def test_hostile_names_and_prompts_are_shown_as_text(tmp_path):
    names = [HOSTILE, "_" + HOSTILE, "$x$"]
    values = results(names, settings={HOSTILE: HOSTILE}, command=HOSTILE, distance=HOSTILE)
    text = write_report(tmp_path / "report", values, **extras(names, HOSTILE)).read_text()
    assert "<script" not in text
    assert text.count(html.escape(HOSTILE)) > 15
    files = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert all(re.fullmatch(r"[a-z_0-9]+\.(png|html|json)", name) for name in files)


def test_the_page_needs_no_network_or_scripts(tmp_path):
    page = write_report(tmp_path / "report", results(), **extras(["comic", "ink", "neon"], "a star"))
    text = page.read_text()
    linked = set(re.findall(r'(?:src|href|srcset)="([^"]*)"', text))
    assert linked == {path.name for path in page.parent.iterdir()} - {"index.html"}
    assert "<script" not in text and "@import" not in text and "url(" not in text


def test_empty_sections_are_left_out(tmp_path):
    bare = write_report(tmp_path / "bare", results()).read_text()
    full = write_report(tmp_path / "full", results(), **extras(["comic", "ink", "neon"], "a star")).read_text()
    for heading in ("Same prompt", "Between two styles", "Training"):
        assert heading in full and heading not in bare


def test_kernel_distances_are_shown_under_their_name(tmp_path):
    names = ["comic", "ink", "neon"]
    sides = {
        side: {name: {"mean": 0.25 + k, "std": 0.125} for k, name in enumerate(names)} for side in ("student", "floor")
    }
    values = results(names, kernel={"distance": "KID " + HOSTILE, "subsets": "100 of 1000"} | sides)
    section = write_report(tmp_path / "report", values).read_text().split("<h2>KID ")[1].split("<h2>")[0]
    assert numbers(section) == [0.25, 0.125, 1.25, 0.125, 2.25, 0.125] * 2
    assert html.escape(HOSTILE) in section and "100 of 1000 pictures" in section


def test_clip_scores_are_shown_by_model_with_their_mean(tmp_path):
    names = ["comic", "ink", "neon"]
    models = ("base", "average", "student", "teacher", "teacher_again")
    scores = {model: [20.5 + k, 21.5 + k, 22.5 + k] for k, model in enumerate(models)}
    page = write_report(tmp_path / "report", results(names, clip_score={"name": "CLIPScore " + HOSTILE} | scores))
    section = page.read_text().split("<h2>CLIPScore ")[1].split("<h2>")[0]
    expected = [value for k, model in enumerate(models) for value in (*scores[model], 21.5 + k)]
    assert numbers(section) == expected and "2,000 pictures" in section
    assert (page.parent / "clip_scores_dark.png").is_file()


def test_summary_admits_a_style_nearer_to_another_teacher(tmp_path):
    assert "always nearest" in write_report(tmp_path / "a", results()).read_text()
    assert "always nearest" not in write_report(tmp_path / "b", results(diagonal_is_minimum=False)).read_text()


def test_a_second_report_replaces_the_first(tmp_path):
    write_report(tmp_path / "report", results())
    (tmp_path / "report" / "notes.txt").write_text("mine")
    assert "Second" in write_report(tmp_path / "report", results(command="Second")).read_text()
    assert (tmp_path / "report" / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_every_fault_is_named_before_any_writing(tmp_path):
    with pytest.raises(ValueError, match="lack floor, base"):
        write_report(
            tmp_path / "report", {key: value for key, value in results().items() if key not in ("floor", "base")}
        )
    with pytest.raises(ValueError, match=r"(?s)matrix is \(2, 2\).*average is \(1,\)"):
        write_report(tmp_path / "report", results(matrix=np.ones((2, 2)), average=[1.0]))
    assert not list(tmp_path.iterdir())


def test_strip_is_teacher_student_and_four_times_their_difference():
    teacher = np.full((200, 200, 3), 100, np.uint8)
    student = np.full((200, 200, 3), (90, 110, 255), np.uint8)
    strip = np.asarray(difference_strip(teacher, student))
    assert strip[100, [50, strip.shape[1] // 2, -50]].tolist() == [
        [100, 100, 100, 255],
        [90, 110, 255, 255],
        [40, 40, 255, 255],
    ]


@pytest.mark.parametrize("side, shown", [(64, 192), (250, 250), (512, 384)])
def test_tiles_are_enlarged_by_whole_factors_and_limited(side, shown):
    picture = np.zeros((side, side, 3), np.uint8)
    picture[:, side // 2 :] = 255
    assert tile(picture).size == (shown, shown)
    assert side > 384 or set(np.unique(tile(picture))) == {0, 255}


@pytest.mark.parametrize("num", [1, 2, 20])
def test_figures_fit_the_page_for_any_number_of_styles(tmp_path, num):
    values = results([f"a style with quite a long name {place}" for place in range(num)])
    write_report(tmp_path / "report", values)
    for name in ("matrix", "distances"):
        with Image.open(tmp_path / "report" / f"{name}_light.png") as picture:
            assert picture.width / 2 < 1300


@pytest.mark.parametrize(
    "value, shown", [(48.0, "48.0"), (0.0123456, "0.0123"), (123.4, "123"), (12345.6, "12,346"), (0.0, "0")]
)
def test_numbers_have_three_digits(value, shown):
    assert format_number(value) == shown
