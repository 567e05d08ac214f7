"""`dmm-jax demo` on tiny checkpoints: every step runs, and it ends with its numbers and the next commands."""

from dmm_jax import train
from dmm_jax.verbs import demo
from dmm_jax.verbs import main as cli
from tests.experiments import write_experiment


def test_the_demo_ends_with_its_numbers_and_links_what_it_made(tiny, tmp_path, monkeypatch, capsys):
    config = tiny[1].copy_and_resolve_references()
    config.teachers = (("comic", str(tiny[0]["left"])), ("neon", str(tiny[0]["right"])))
    config.num_steps, config.samples.prompts = 2, ("a large red circle",)
    experiment = write_experiment(tmp_path / "experiment.py", config)
    few = {"num_images": 4, "num_pairs": 2, "batch_size": 4, "num_inference_steps": 2}
    monkeypatch.setattr(demo, "EVALUATION", few)
    work = tmp_path / "demo"
    assert train.__name__ and cli.main(["demo", f"--config={experiment}", f"--workdir={work}"]) == 0
    printed = capsys.readouterr().err
    assert "FD (shapes) to each teacher" in printed and "gap closed" in printed
    assert printed.count("\n  dmm-jax ") == 3 and f"Open {work / 'report' / 'index.html'}" in printed
    page = (work / "report" / "index.html").read_text()
    assert '<a href="../samples/gallery/index.html">' in page and '<a href="../export/dmm">' in page
