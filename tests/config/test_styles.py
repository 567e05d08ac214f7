"""Styles: names, mixes and schedules, as text and as rows of weights."""

import json

import numpy as np
import pytest

from dmm_jax.config.styles import is_schedule, is_writable, parse_style, style_row, style_rows, style_text
from dmm_jax.diffusion import solvers
from dmm_jax.diffusion.schedule import NoiseSchedule

NAMES = ("photo", "anime", "ink")
TIMESTEPS = np.array([999.0, 800.0, 600.0, 500.0, 400.0, 0.0], np.float32)
HALF = {"photo": 0.5, "ink": 0.5}


def test_styles_are_read_as_the_command_line_writes_them():
    assert parse_style("anime") == "anime"
    assert parse_style("anime=0.7, photo=0.3") == {"anime": 0.7, "photo": 0.3}
    assert parse_style("photo:600:anime=0.7,ink=0.3") == [(1000, "photo"), (600, {"anime": 0.7, "ink": 0.3})]
    assert parse_style("photo:800-400:anime:20:ink") == [(1000, "photo"), ((800, 400), "anime"), (20, "ink")]
    with pytest.raises(ValueError, match="NAME=WEIGHT"):
        parse_style("anime=much")
    with pytest.raises(ValueError, match="not a timestep"):
        parse_style("photo:6.0.0:anime")


@pytest.mark.parametrize("style", ["ink", HALF, [(1000, HALF), (600, "ink")], [(1000, "ink"), ((800, 400.5), HALF)]])
def test_what_is_written_is_read_back(style):
    assert parse_style(style_text(style)) == style
    assert style_text(json.loads(json.dumps(style))) == style_text(style)


def test_a_schedule_switches_at_a_timestep_and_fades_in_a_span():
    switched = style_rows([(1000, "photo"), (600, "anime")], NAMES, TIMESTEPS, 1000)
    assert switched[:, 1].tolist() == [0, 0, 1, 1, 1, 1]
    faded = style_rows([(1000, "photo"), ((800, 400), HALF)], NAMES, TIMESTEPS, 1000)
    np.testing.assert_allclose(faded[:, 2], [0, 0, 0.25, 0.375, 0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(faded.sum(1), 1.0, rtol=1e-6)


def test_each_evaluation_of_a_heun_step_has_its_own_style():
    timesteps = solvers.plan("heun", NoiseSchedule(), 3).timesteps  # 999, 499.5, 499.5, 0, 0.
    rows = style_rows([(1000, "photo"), (499.5, "anime"), (10, "ink")], NAMES, timesteps, 1000)
    assert rows.argmax(1).tolist() == [0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    "style, message",
    [
        ([(900, "photo"), (600, "anime")], "the timesteps above have no style"),
        ([(1000, "photo"), (600, "anime"), (700, "ink")], "got 700 to 700 below 600"),
        ([(1000, "photo"), (600, "anime"), (600, "ink")], "must fall"),
        ([(1000, "photo"), ((800, 400), "anime"), ((500, 300), "ink")], "must not overlap"),
        ([(1000, "photo"), ((400, 800), "anime")], "must fall"),
        ([(1000, "photo"), (float("nan"), "anime")], "must fall"),
        ([(1000, "photo"), (600, "animee")], "did you mean 'anime'"),
        (["photo", "ink"], "a style is a name, a mix"),
        ("zzz", "no style 'zzz'. There are: photo, anime, ink"),
        ("Photo", "did you mean 'photo'"),
        ("photo:0.5", "did you mean 'photo=0.5'"),
        ("photo,ink", "did you mean 'photo=0.5,ink=0.5'"),
        ("(photo:0.7) + ink*0.3", "did you mean 'photo=0.7,ink=0.3'"),
        ("photo:0.5,1.2.3", "no style 'photo:0.5,1.2.3'. There are"),
    ],
)
def test_gaps_overlaps_and_unknown_names_are_refused(style, message):
    with pytest.raises(ValueError, match=message):
        style_rows(style, NAMES, TIMESTEPS, 1000)


def test_a_name_given_twice_and_weights_of_zero_are_refused():
    with pytest.raises(ValueError, match="names 'photo' twice"):
        parse_style("photo=0.5, photo =0.3")
    for nothing in ({"photo": 0.0}, {"photo": 0.0, "ink": 0.0}, {}, {"photo": float("nan")}):
        with pytest.raises(ValueError, match="at least one of them not 0"):
            style_row(nothing, NAMES)


@pytest.mark.parametrize(
    "mix, message", [({"photo": 0.7}, "sum to 0.7 instead of 1"), ({"photo": 1.5, "ink": -0.5}, "negative in part:")]
)
def test_weights_that_are_no_shares_of_1_are_warned_of(mix, message):
    with pytest.warns(UserWarning, match=message):
        style_row(mix, NAMES)


def test_shares_of_1_draw_no_warning(recwarn):
    for mix in ("photo", HALF, {"photo": 0.33, "anime": 0.33, "ink": 0.33}):
        style_row(mix, NAMES)
    assert not recwarn.list


@pytest.mark.parametrize("name", ["", "a=b", "a,b", "a\nb", " a", "a:600:b"])
def test_names_that_no_mix_can_hold_are_known(name):
    assert not is_writable(name) and is_writable("anime: soft 2")


def test_a_list_of_styles_is_no_schedule():
    assert not is_schedule([[(1000, "photo"), (600, "anime")], [(1000, "ink"), (600, "anime")]])
    assert not is_schedule(["photo", "anime"])


def test_a_schedule_has_no_single_row():
    with pytest.raises(ValueError, match="'photo:600:anime' is a schedule"):
        style_row(parse_style("photo:600:anime"), NAMES)
