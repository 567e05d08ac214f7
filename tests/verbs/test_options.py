"""Experiment files, and options set on the command line."""

import pytest

from dmm_jax.config import options as config_lib
from dmm_jax.config.files import read_config, shipped_configs, summary
from dmm_jax.config.serialization import from_json, to_json
from dmm_jax.runtime.home import expand_home
from dmm_jax.verbs import main as cli


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--config.learning_rat=1"], "did you mean --config.learning_rate?"),
        (["--config.data.cach=x"], "did you mean --config.data.cache?"),
        (["--config.seed=much"], "seed"),
        (["--num_steps=3"], "no option --num_steps; did you mean --config.num_steps?"),
        (["extra"], "unexpected arguments: extra"),
    ],
)
def test_unknown_options_are_wrong_usage(failing, experiment, options, expected):
    assert expected in failing("train", *experiment(), *options, code=cli.EXIT_USAGE)


def test_the_demo_takes_options_of_its_experiment(failing, tmp_path):
    error = failing("demo", "--workdir", tmp_path / "d", "--config.num_stepz=3", code=cli.EXIT_USAGE)
    assert "did you mean --config.num_steps?" in error and not (tmp_path / "d").exists()


def test_shipped_experiments_are_found_by_name_in_any_folder(tmp_path, monkeypatch, failing):
    monkeypatch.chdir(tmp_path)
    assert read_config("sd15", ["--config.seed=3"]).base == "checkpoints/stable-diffusion-v1-5"
    assert all(summary(path).endswith(".") and read_config(name) for name, path in shipped_configs().items())
    assert "did you mean --config=sd15?" in failing("plan", "--config=configs/sd_15.py")


def test_options_of_an_experiment_are_printed_by_config_and_by_help(capsys):
    assert cli.main(["config", "sd15", "--config.seed=3"]) == 0
    printed = capsys.readouterr().out
    assert "--config.seed=3  (default: 0)" in printed and "--config.base=checkpoints/stable-diffusion-v1-5" in printed
    for words in (["train", "--config=sd15", "--config.help"], ["config", "--config=sd15"]):
        assert cli.main([*words, "--config.seed=3"]) == 0
        assert capsys.readouterr().out == printed
    assert cli.main(["config", "--json"]) == 0
    assert from_json(capsys.readouterr().out) == config_lib.get_config()


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("configs", "sd15  "),
        ("solvers", "dpmpp_2m_karras"),
        ("formats", "style-lora"),
        ("devices", "NVIDIA H200"),
        ("demo", "a small red circle"),
        ("emoji", "winking face"),
    ],
)
def test_list_prints_the_names_that_options_take(kind, expected, capsys):
    assert cli.main(["list", kind]) == 0
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize("student, style", [("demo", "comic"), ("emoji", "noto")])
def test_list_prints_a_students_styles_apart_from_its_prompts(student, style, capsys):
    assert cli.main(["list", student]) == 0
    printed = capsys.readouterr()
    assert f"--style: {style}, " in printed.err and style not in printed.out.splitlines()


@pytest.mark.parametrize(
    "text, expected",
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
def test_a_broken_experiment_file_is_named(failing, tmp_path, text, expected):
    (tmp_path / "mine.py").write_text(text)
    error = failing("plan", f"--config={tmp_path / 'mine.py'}")
    assert expected in error and "mine.py" in error


@pytest.mark.parametrize(
    "options",
    [
        ["--config.teachers=(('new', 'a/x'), ('newer', 'y.safetensors'))"],
        ["--config.teachers=[['new', 'a/x'], ['newer', 'y.safetensors']]"],
        ["--config.teachers=new=a/x", "--config.teachers=newer=y.safetensors"],
    ],
)
def test_teachers_can_be_set_on_the_command_line(experiment, options):
    path = experiment()[0].removeprefix("--config=")
    config = read_config(path, options)
    assert config.teachers == (("new", "a/x"), ("newer", "y.safetensors"))
    assert from_json(to_json(config)).teachers == config.teachers
    assert read_config(path, ["--config.teachers=new=a/x=y"]).teachers == (("new", "a/x=y"),)


@pytest.mark.parametrize("path", ["a b", "a, b", "BASE + LORA.safetensors*0.8", 'it\'s "x"', "(a)", "1"])
def test_an_entry_of_a_tuple_may_hold_blanks_and_commas(experiment, path):
    options = [f"--config.teachers=left={path}", "--config.teachers=right=x", f"--config.samples.prompts={path}, red"]
    config = read_config(experiment()[0].removeprefix("--config="), options)
    assert config.teachers == (("left", path), ("right", "x")) and config.samples.prompts == (f"{path}, red",)


def test_the_home_folder_is_expanded_in_every_path(experiment, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    options = ["--config.teachers=left=~/a + ~/b*0.8", "--config.teachers=right=x~/y", "--config.data.cache=~/cache"]
    config = read_config(experiment()[0].removeprefix("--config="), options)
    assert config.teachers == (("left", "/home/me/a + /home/me/b*0.8"), ("right", "x~/y"))
    assert config.data.cache == "/home/me/cache"
    words = ["~", "--out=~/a", "inception:~/w", "a~", "~user/x", "x + ~/l*0.5"]
    expected = ["/home/me", "--out=/home/me/a", "inception:/home/me/w", "a~", "~user/x", "x + /home/me/l*0.5"]
    assert list(map(expand_home, words)) == expected


@pytest.mark.parametrize("value", ["('new', 'a/x')", "new", "(('new',),)", "(('new', 1),)", "=x", "new="])
def test_teachers_without_name_and_path_are_wrong_usage(failing, experiment, value):
    error = failing("train", *experiment(), f"--config.teachers={value}", code=cli.EXIT_USAGE)
    assert "--config.teachers=NAME=PATH once" in error
