"""The command line as a user meets it: exit codes, one clear message, nothing half-written."""

import dataclasses
import json
import types
import warnings

import jax
import numpy as np
import pytest

from dmm_jax.checkpoints.formats import safetensors_io
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, save
from dmm_jax.config.files import read_config
from dmm_jax.pipeline import Pipeline
from dmm_jax.runtime.errors import UserError
from dmm_jax.verbs import main as cli
from dmm_jax.verbs import verbs

CONFIG = """
from tests.worlds import tiny_config
import pathlib
def get_config():
    paths = {{"base": {base!r}, "left": {left!r}, "right": {right!r}}}
    return tiny_config({{name: pathlib.Path(path) for name, path in paths.items()}}, pathlib.Path({cache!r}))
"""


@pytest.fixture
def experiment(tiny, tmp_path):
    """Writes an experiment file; paths of the tiny world can be replaced by name."""

    def write(**others):
        paths, config = tiny
        places = {name: str(others.get(name, path)) for name, path in paths.items()}
        path = tmp_path / "experiment.py"
        path.write_text(CONFIG.format(**places, cache=config.data.cache))
        return [f"--config={path}", f"--workdir={tmp_path / 'work'}"]

    return write


def inspecting_by(run) -> verbs.Verb:
    """`inspect`, but for what it does."""
    return dataclasses.replace(next(verb for verb in verbs.VERBS if verb.name == "inspect"), run=run)


def failing(capsys, *argv, code: int = cli.EXIT_ERROR) -> str:
    assert cli.main([str(one) for one in argv]) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_no_verb_is_wrong_usage():
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == 2


def test_a_missing_checkpoint_is_named(capsys, experiment, tmp_path):
    said = failing(capsys, "train", *experiment(), f"--config.base={tmp_path / 'nothing_here'}")
    assert "there is no checkpoint" in said and "nothing_here" in said and not (tmp_path / "work").exists()


def test_a_truncated_teacher_is_named(capsys, experiment, tiny, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(tiny[0]["left"].read_bytes()[:-100])
    said = failing(capsys, "train", *experiment(left=tmp_path / "cut.safetensors"))
    assert "cut.safetensors is not a sound safetensors file" in said and not (tmp_path / "work").exists()


def test_nan_weights_are_named_by_their_tensor(capsys, experiment, tiny, tmp_path):
    tensors = {key: np.array(array) for key, array in TensorFile(tiny[0]["left"]).items()}
    tensors["model.diffusion_model.out.2.weight"].flat[0] = np.nan
    save(tmp_path / "bad.safetensors", tensors)
    said = failing(capsys, "train", *experiment(left=tmp_path / "bad.safetensors"))
    assert "NaN" in said and "conv_out.weight" in said


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_pickles_are_refused_with_how_to_convert(capsys, experiment, tmp_path, suffix):
    (tmp_path / f"model{suffix}").write_bytes(b"\x80\x04K\x01.")
    said = failing(capsys, "train", *experiment(left=tmp_path / f"model{suffix}"))
    assert "runs code when it is opened" in said and "save_file" in said


def test_a_teacher_of_another_architecture_is_told_with_the_differing_shapes(capsys, experiment, tiny, tmp_path):
    from tests import worlds

    wide = worlds.random_params(worlds.UNet2DConditionModel, worlds.UNET | {"cross_attention_dim": 32}, 0)
    unet = worlds.naming.to_torch(wide)
    source = worlds.open_checkpoint(tiny[0]["base"])
    part = worlds.Component(worlds.UNET | {"cross_attention_dim": 32}, lambda: unet)
    other = worlds.Checkpoint(tmp_path, "diffusers", {"unet": part}, source.scheduler_config, None, None)
    worlds.write_single_file(tmp_path / "wide.safetensors", other, "float32", worlds.Recipe("wide", [], None))
    said = failing(capsys, "train", *experiment(left=tmp_path / "wide.safetensors"))
    assert "cannot be merged" in said and "attn2.to_k" in said and "(64, 64)" in said and "(64, 32)" in said


@pytest.mark.parametrize(
    "given, said",
    [
        (["--config.learning_rat=1"], "did you mean --config.learning_rate?"),
        (["--config.data.cach=x"], "did you mean --config.data.cache?"),
        (["--config.seed=much"], "seed"),
        (["--num_steps=3"], "no option --num_steps; did you mean --config.num_steps?"),
        (["extra"], "unexpected arguments: extra"),
    ],
)
def test_options_that_there_are_not_are_wrong_usage_and_the_nearest_is_suggested(capsys, experiment, given, said):
    assert said in failing(capsys, "train", *experiment(), *given, code=cli.EXIT_USAGE)


def test_what_inspect_finds_in_the_way_is_said_on_stderr_too(capsys, tmp_path):
    assert cli.main(["inspect", str(tmp_path / "x.safetensors"), "--json"]) == cli.EXIT_ERROR
    told = capsys.readouterr()
    assert json.loads(told.out)["obstacles"][0] in told.err and told.err.startswith("dmm-jax inspect: error: ")


def test_the_demo_takes_options_of_its_experiment(capsys, tmp_path):
    said = failing(capsys, "demo", "--workdir", str(tmp_path / "d"), "--config.num_stepz=3", code=cli.EXIT_USAGE)
    assert "did you mean --config.num_steps?" in said and not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    "option, said",
    [
        ("base=nothing_here", "there is no checkpoint"),
        ("seed=-1", "seed must not be negative"),
        ("dtype=foo", "dtype must be one of float32, bfloat16"),
        ("data.resolution=0", "data.resolution must be at least 1"),
        ("data.resolution=60", "data.resolution must be a multiple of 8 pixels; got 60. Use 56"),
    ],
)
def test_what_cannot_be_prepared_is_told_before_a_picture_is_drawn(capsys, experiment, tmp_path, option, said):
    given = [experiment()[0], f"--config.data.cache={tmp_path / 'cache'}", f"--config.{option}"]
    assert said in failing(capsys, "prepare", *given)
    assert [path.name for path in tmp_path.iterdir()] == ["experiment.py"]


def test_a_cache_of_another_resolution_is_not_trained_on(capsys, experiment, tmp_path):
    said = failing(capsys, "train", *experiment(), "--config.data.resolution=128")
    assert "resolution: expected 128, the cache has 64" in said and not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    "option, said", [("solver=foo", "there is no solver 'foo'"), ("num_inference_steps=0", "at least 1")]
)
def test_sample_grids_that_could_not_be_drawn_are_told_at_the_start(capsys, experiment, tmp_path, option, said):
    grids = ["--config.samples.every=2", "--config.samples.prompts=a", f"--config.samples.{option}"]
    assert said in failing(capsys, "train", *experiment(), *grids) and not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    "text, said",
    [
        ("import nowhere_to_be_found", "cannot be run: ModuleNotFoundError"),
        ("def get_config():\n    return {'base': ''}", "must return a ConfigDict; got dict"),
        (
            "from dmm_jax.config import options as config\ndef get_config():\n"
            "    c = config.get_config()\n    del c.teachers, c.data.cache\n    return c",
            "lacks data.cache, teachers",
        ),
    ],
)
def test_an_experiment_file_that_is_none_is_told(capsys, tmp_path, text, said):
    (tmp_path / "mine.py").write_text(text)
    found = failing(capsys, "plan", f"--config={tmp_path / 'mine.py'}")
    assert said in found and "mine.py" in found


@pytest.mark.parametrize(
    "error, code, said",
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n#0 x"), 1, "out of memory"),
        (MemoryError("Unable to allocate 9 TiB"), 1, "out of memory: Unable to allocate 9 TiB"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: E1: CompileTimeScopedVmemOom:\n"),
            1,
            "--config.attention=xla",
        ),
        (jax.errors.JaxRuntimeError("INTERNAL: gone\nframes"), 1, "the device cannot go on: INTERNAL: gone\n"),
    ],
)
def test_what_ends_a_verb_from_outside_is_said_in_a_line(capsys, monkeypatch, error, code, said):
    def fail(_):
        raise error

    monkeypatch.setattr(cli, "VERBS", [inspecting_by(fail)])
    assert said in failing(capsys, "inspect", "x", code=code)


def test_warnings_and_what_orbax_logs_are_one_clean_line_or_none(capsys, monkeypatch):
    from absl import logging as absl_logging

    def warn(_):
        absl_logging.warning("Metadata file does not exist: /a")
        absl_logging.warning("something else")
        warnings.warn("a prompt was cut", stacklevel=1)

    monkeypatch.setattr(cli, "VERBS", [inspecting_by(warn)])
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["inspect", "x"]) == 0
    said = capsys.readouterr().err
    assert "dmm-jax inspect: warning: a prompt was cut\n" in said and "test_cli.py" not in said
    assert "Metadata file" not in said


@pytest.mark.parametrize(
    "given",
    [
        ["--config.teachers=(('new', 'a/x'), ('newer', 'y.safetensors'))"],
        ["--config.teachers=[['new', 'a/x'], ['newer', 'y.safetensors']]"],
        ["--config.teachers=new=a/x", "--config.teachers=newer=y.safetensors"],
    ],
)
def test_teachers_can_be_given_on_the_command_line(experiment, given):
    from dmm_jax.config import options as config_lib

    path = experiment()[0].removeprefix("--config=")
    config = read_config(path, given)
    assert config.teachers == (("new", "a/x"), ("newer", "y.safetensors"))
    assert config_lib.from_json(config_lib.to_json(config)).teachers == config.teachers
    assert read_config(path, ["--config.teachers=new=a/x=y"]).teachers == (("new", "a/x=y"),)


@pytest.mark.parametrize("given", ["('new', 'a/x')", "new", "(('new',),)", "(('new', 1),)", "=x", "new="])
def test_teachers_that_are_no_names_with_paths_are_told_how_to_be_given(capsys, experiment, given):
    said = failing(capsys, "train", *experiment(), f"--config.teachers={given}", code=cli.EXIT_USAGE)
    assert "--config.teachers=NAME=PATH once" in said


def test_inspect_prints_json_and_says_that_the_set_fits(capsys, tiny):
    import json

    assert cli.main(["inspect", *map(str, tiny[0].values()), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mergeable"] is True


def test_a_non_empty_output_is_left_alone(capsys, trained, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    said = failing(capsys, "export", trained, tmp_path, "--format", "dmm")
    assert "not empty" in said and [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_export_wants_a_style_where_one_is_folded_in_and_suggests_the_nearest(capsys, trained, tmp_path):
    assert "give --style" in failing(capsys, "export", trained, tmp_path / "o", "--format", "diffusers")
    assert "did you mean 'left'" in failing(
        capsys, "export", trained, tmp_path / "o", "--format", "diffusers", "--style", "lift"
    )
    assert "there are: dmm" in failing(capsys, "export", trained, tmp_path / "o", "--format", "onnx")
    assert not (tmp_path / "o").exists()


def test_export_and_sample_make_what_they_say(capsys, trained, tmp_path):
    out = tmp_path / "out"
    formats = "dmm,diffusers,single-file"
    assert (
        cli.main(
            [
                "export",
                str(trained),
                str(out),
                "--format",
                formats,
                "--style",
                "left=0.5,right=0.5",
                "--dtype",
                "float32",
            ]
        )
        == 0
    )
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "diffusers", "dmm", "model.safetensors"]
    (tmp_path / "prompts.txt").write_text("a large red circle\n\na small blue star\n")
    base = ["--prompts", str(tmp_path / "prompts.txt"), "--steps", "2", "--batch-size", "4"]
    assert (
        cli.main(
            [
                "sample",
                str(out / "dmm"),
                *base,
                "--style",
                "left",
                "--style",
                "left=0.5,right=0.5",
                "--out",
                str(tmp_path / "a"),
            ]
        )
        == 0
    )
    assert len(list((tmp_path / "a").glob("*_seed*.png"))) == 4 and (tmp_path / "a" / "grid.png").is_file()
    single = [
        "sample",
        str(out / "model.safetensors"),
        *base,
        "--base",
        str(out / "diffusers"),
        "--out",
        str(tmp_path / "b"),
    ]
    assert cli.main(single) == 0
    pictures = [sorted((tmp_path / folder).glob("*_seed*.png")) for folder in ("a", "b")]
    from PIL import Image

    mixed, folded = (np.asarray(Image.open(path), np.int32) for path in (pictures[0][1], pictures[1][0]))
    assert np.abs(mixed - folded).max() <= 1


def test_missing_or_empty_prompts_are_told(capsys, trained, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    assert "no prompt file" in failing(
        capsys, "sample", trained, "--prompts", tmp_path / "none.txt", "--out", tmp_path / "o"
    )
    assert "holds no prompt" in failing(
        capsys, "sample", trained, "--prompts", tmp_path / "empty.txt", "--out", tmp_path / "o"
    )


@pytest.mark.parametrize("fmt", ["dmm", "diffusers", "single-file", "style-lora"])
def test_a_disk_that_fills_leaves_nothing_of_an_export_and_the_next_one_succeeds(
    capsys, trained, tmp_path, fmt, monkeypatch
):
    arguments = ["export", trained, tmp_path / "o", "--format", fmt, "--style", "left"]
    written, raw_bytes = [], safetensors_io.raw_bytes

    def full(array):
        written.append(array)
        if len(written) > (0 if fmt == "style-lora" else 100):
            raise OSError(28, "No space left on device")
        return raw_bytes(array)

    with monkeypatch.context() as patched:
        patched.setattr(safetensors_io, "raw_bytes", full)
        assert "No space left" in failing(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []
    assert cli.main(list(map(str, arguments))) == 0


def test_a_style_is_exported_as_a_small_file_for_the_tools_that_are_named(capsys, trained, tmp_path):
    arguments = ["export", trained, tmp_path / "o", "--format", "style-lora"]
    assert "give --style" in failing(capsys, *arguments)
    arguments += ["--style", "left"]
    assert "got forge" in failing(capsys, *arguments, "--lora-for", "forge")
    assert (
        "did you mean 'right'" in failing(capsys, *arguments, "--lora-base", "rigth") and not (tmp_path / "o").exists()
    )
    assert cli.main([str(one) for one in [*arguments, "--lora-base", "right", "--lora-for", "comfyui,diffusers"]]) == 0
    file = TensorFile(tmp_path / "o" / "style_lora.safetensors")
    assert file.path.stat().st_size - file.num_bytes < 4000  # Of metadata, recipe included.
    assert len(file) == 4 and '"style": "right=1.0"' in file.metadata["dmm_jax.lora_base"]


def test_what_a_model_takes_from_elsewhere_is_said_before_anything_is_drawn(capsys, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    opened = {}

    class Opened:
        source = types.SimpleNamespace(loans=["X holds no vae: the base's is used."])

        @property
        def schedule(self):
            raise UserError("far enough")

    def from_pretrained(path, **options):
        opened.update(options)
        return Opened()

    monkeypatch.setattr(Pipeline, "from_pretrained", from_pretrained)
    said = failing(
        capsys, "sample", "X", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "o", "--style", "a",
        "--base", "B", "--prediction-type", "v_prediction",
    )  # fmt: skip
    assert "X holds no vae: the base's is used.\n" in said and "far enough" in said
    assert (opened["base"], opened["prediction_type"]) == ("B", "v_prediction")
