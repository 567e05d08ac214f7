"""Progress prints lines where no bar is shown."""

from dmm_jax.runtime import progress as module
from dmm_jax.runtime.progress import Progress


def test_a_line_states_images_speed_and_time_left_without_a_terminal(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    progress = Progress(1000, "drawing")
    for seconds in (30, 61, 90):
        now[0] = float(seconds)
        progress.add(61)
    assert capsys.readouterr().err == "122 of 1,000 images, 2.0 images/s, 00:07:19 left\n"
