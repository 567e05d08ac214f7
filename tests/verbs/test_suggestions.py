"""What a wrong command line answers: the option, the value or the argument that was probably meant."""

import pytest

from dmm_jax.verbs import main as cli


@pytest.fixture
def refused(capsys):
    """Returns a function that runs a wrong command line and returns the last line that it prints."""

    def run(*words):
        with pytest.raises(SystemExit) as stopped:
            cli.main(list(words))
        assert stopped.value.code == cli.EXIT_USAGE
        return capsys.readouterr().err.splitlines()[-1]

    return run


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("--cfg", "--guidance-scale"),
        ("--cfg_scale", "--guidance-scale"),
        ("--guidance", "--guidance-scale or --guidance-rescale"),
        ("--num_inference_steps", "--steps"),
        ("--sampler_name", "--solver"),
        ("--scheduler", "--solver"),
        ("--W", "--width"),
        ("-H", "--height"),
        ("-n", "--prompt, once or several times"),
        ("--n_iter", "--prompt, once or several times"),
        ("--outdir", "--out"),
        ("--output-path", "--out"),
        ("--ckpt", "MODEL without an option"),
        ("--model", "MODEL without an option"),
        ("--network_weights", "--lora, once or several times"),
        ("--vae-path", "--vae"),
        ("--negative", "--negative-prompt"),
    ],
)
def test_options_of_other_programs_are_suggested(typed, meant, refused):
    assert refused("sample", "demo", typed, "7").endswith(f"there is no option {typed}; did you mean {meant}?")


@pytest.mark.parametrize("words", [["plan", "sd15_24gb"], ["train", "--workdir", "w", "sd15"], ["prepare", "my.py"]])
def test_an_experiment_without_its_option_is_recognised(words, refused):
    assert "is an experiment; did you mean --config=" in refused(*words)


def test_values_that_look_like_experiments_or_options_are_left_alone(failing, tmp_path):
    assert "is an experiment" not in failing("plan", "--serve", "sd15", "--topology", "no")
    assert "no option" not in failing("sample", "no-model", "--seed", "-1", "--prompt", "- a", "--out", tmp_path / "o")


@pytest.mark.parametrize(
    "words, expected",
    [
        (["list", "samplers"], "'samplers'; did you mean solvers? Choose one of configs, solvers"),
        (["sample", "demo", "--dtype", "bf16"], "'bf16'; did you mean bfloat16?"),
        (["average", "o", "--method", "Task-Arithmetic"], "did you mean task_arithmetic?"),
        (["bench", "zzzz"], "there is no 'zzzz'. Choose one of train"),
    ],
)
def test_the_nearest_choice_is_suggested(words, expected, refused):
    assert expected in refused(*words)


@pytest.mark.parametrize(
    "option, value",
    [("--steps", "0"), ("--height", "7"), ("--guidance-rescale", "3"), ("--batch-size", "0"), ("--clip-skip", "9")],
)
def test_errors_name_the_option_that_was_typed(option, value, failing, tmp_path):
    error = failing("sample", "demo", "--prompt", "x", option, value, "--out", tmp_path / "o")
    assert f"error: {option} must be " in error


@pytest.mark.parametrize(
    "words, expected",
    [
        (["no model"], "MODEL: there is no checkpoint no model. Give a diffusers"),
        (["no model"], "the workdir of a training run, demo or emoji"),
        (["demo", "--base", "nowhere"], "--base: there is no checkpoint nowhere."),
        (["demo", "--vae", "a.safetensors"], "--vae: there is no file a.safetensors."),
        (["demo", "--embedding", "w=a.safetensors"], "--embedding: there is no file a.safetensors."),
        (["demo", "--lora", "a.safetensors*0.8"], "--lora: there is no file a.safetensors."),
        (["demo", "--lora", "a.safetensors:0.8"], "a.safetensors:0.8; did you mean a.safetensors*0.8"),
        (["demo", "--lora", "<lora:a:0.8>"], "did you mean a*0.8"),
        ([__file__], "is a text and not a checkpoint"),
    ],
)  # fmt: skip
def test_a_missing_file_is_named_with_its_option(words, expected, failing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expected in failing("sample", *words, "--prompt", "x", "--out", "o")
