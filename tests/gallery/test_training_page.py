"""The page of a run: its numbers, that it refreshes only while the run goes on, and that it needs no other file."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from dmm_jax.gallery.training_page import MAX_POINTS, duration, training_page

LINES = [
    {"step": step, "loss": 1.0 / step, "score": {"a<b": 1.0 / step, "ink": 2.0 / step}, "images_per_s": 12.34}
    for step in range(1, 1001)
] + [{"step": 1000, "validation": {"a<b": [0.5, None], "ink": [0.25, 0.75]}}]


def test_a_running_page_refreshes_and_a_finished_one_does_not():
    running, finished = (training_page("run", LINES, 2000, left) for left in (3700.0, None))
    assert 'http-equiv="refresh"' in running and "Step 1,000 of 2,000: 1 h 01 min left, 12.3 images/s" in running
    assert 'http-equiv="refresh"' not in finished and "finished" in finished


def test_a_page_needs_no_other_file_and_escapes_names():
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 4000, 3), np.uint8)).save(file, "PNG")
    page = training_page("<run>", LINES, 2000, 1.0, file.getvalue())
    assert "<run>" not in page and "a<b" not in page and "a&lt;b" in page
    assert re.findall(r'(?:src|href)="(?!data:)', page) == [] and "data:image/jpeg;base64," in page


def test_curves_have_a_bounded_number_of_points_and_skip_what_is_not_finite():
    points = re.findall(r'points="([^"]*)"', training_page("run", LINES, 2000, 1.0))
    assert len(points) == 4 and max(len(curve.split()) for curve in points) <= MAX_POINTS + 1
    bad = [{"step": 1, "loss": 1.0, "score": {"a": float("nan"), "b": 0.0}, "images_per_s": 1.0}]
    assert "<polyline" not in training_page("run", bad, 2, 1.0) and training_page("run", [], 2, 1.0)


@pytest.mark.parametrize("seconds, text", [(5.0, "5 s"), (65.0, "1 min 05 s"), (7500.0, "2 h 05 min")])
def test_durations_have_two_units(seconds, text):
    assert duration(seconds) == text
