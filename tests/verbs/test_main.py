"""The command line itself: exit codes, errors and warnings in one line, and what it imports."""

import io
import os
import shlex
import subprocess
import sys
import warnings

import jax
import pytest

import dmm_jax
from dmm_jax.planning import devices
from dmm_jax.runtime import processes, terminal
from dmm_jax.runtime.errors import Preempted, UserError
from dmm_jax.verbs import inspect as inspect_verb
from dmm_jax.verbs import main as cli


@pytest.fixture(autouse=True)
def _normal_verbosity():
    yield
    terminal.set_verbosity(terminal.NORMAL)


def raising(error):
    def function(*_):
        raise error

    return function


def test_a_missing_verb_is_wrong_usage(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == 2 and "VERB" in capsys.readouterr().err


def test_unknown_arguments_of_a_verb_are_wrong_usage(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["inspect", "x", "--config.seed=1"])
    assert stopped.value.code == 2 and "unrecognized arguments: --config.seed=1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "word, expected", [("trian", "did you mean train?"), ("zzz", "no verb 'zzz'. `dmm-jax --help`")]
)
def test_a_mistyped_verb_is_wrong_usage_with_the_nearest(word, expected, capsys):
    assert stopped(word, "x") == 2 and expected in capsys.readouterr().err


def test_a_mistyped_option_of_a_verb_is_wrong_usage_with_the_nearest(capsys):
    for arguments in (["inspect", "x", "--jsom"], ["train", "--config=sd15", "--workdir=w", "--distribute"]):
        assert stopped(*arguments) == 2 and "did you mean --" in capsys.readouterr().err


def test_an_unknown_option_gets_the_verbs_usage_and_near_names(capsys):
    assert stopped("evaluate", "run", "--num-samples", "16") == 2
    error = capsys.readouterr().err
    assert error.startswith("usage: dmm-jax evaluate") and "did you mean --n" in error
    assert stopped("evaluate", "run", "--zzz") == 2
    error = capsys.readouterr().err
    assert error.startswith("usage: dmm-jax evaluate") and "unrecognized arguments: --zzz" in error


def stopped(*arguments):
    with pytest.raises(SystemExit) as error:
        cli.main(list(arguments))
    return error.value.code


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_a_help_text_with_examples_that_parse(verb, capsys):
    assert stopped(verb, "--help") == 0
    printed = capsys.readouterr().out
    assert cli.VERBS[verb] in " ".join(printed.split())
    lines = printed.partition("examples:\n")[2].splitlines()
    assert lines
    for line in lines:
        program, *words = shlex.split(line.partition(" > ")[0])
        _, unknown = cli.build_parser(words[0]).parse_known_args(words)
        assert program == "dmm-jax" and words[0] == verb
        assert [word for word in unknown if not word.startswith("--config.")] == []


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_option_has_a_help_text_that_states_its_default(verb):
    (verbs,) = [action for action in cli.build_parser(verb)._actions if action.dest == "verb"]
    formatter = cli.HelpFormatter("dmm-jax")
    for action in verbs.choices[verb]._actions:
        assert action.help, action.dest
        if action.option_strings and action.nargs != 0 and not action.required:
            assert "default" in formatter._expand_help(action), action.option_strings


def test_versions_are_printed_without_importing_jax(capsys):
    assert stopped("--version") == 0
    assert capsys.readouterr().out.startswith(f"dmm_jax {dmm_jax.__version__} (jax {jax.__version__}, Python ")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_verbs_and_options(shell, capsys):
    pytest.importorskip("shtab", reason="launch/requirements-test.txt installs it")
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(verb in script for verb in cli.VERBS) and "--workdir" in script and "task_arithmetic" in script


def test_colours_are_for_terminals_that_want_them(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen = type("Screen", (io.StringIO,), {"isatty": lambda _: True})()
    assert terminal.paint("a", "red", screen) == "\x1b[31ma\x1b[0m" and terminal.paint("a", "red", io.StringIO()) == "a"
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        monkeypatch.setenv(name, value)
        assert terminal.paint("a", "red", screen) == "a"


def test_quiet_hides_progress_and_verbose_shows_tracebacks(capsys, monkeypatch):
    def main(args):
        processes.say("progress")
        raise UserError("name another file")

    monkeypatch.setattr(inspect_verb, "main", main)
    printed = {}
    for flag in ("--quiet", "--json", "--verbose"):
        assert cli.main(["inspect", "x", flag]) == 1
        printed[flag] = capsys.readouterr().err
    assert printed["--quiet"] == "dmm-jax inspect: error: name another file\n"
    assert printed["--json"] == "progress\n" + printed["--quiet"]
    assert "Traceback" in printed["--verbose"] and printed["--verbose"].endswith(printed["--quiet"])


def test_the_home_folder_is_expanded_in_arguments(monkeypatch):
    arguments = []
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(inspect_verb, "main", lambda args: arguments.append(str(vars(args))))
    assert cli.main(["inspect", "~/a"]) == 0 and "/home/me/a" in arguments[0]


HELP = """
import sys
from dmm_jax.verbs.main import VERBS, main

for arguments in (["--help"], *([verb, "--help"] for verb in VERBS)):
    try:
        main(arguments)
    except SystemExit:
        pass
assert "jax" not in sys.modules
main(["--help"])
"""


def test_help_texts_do_not_import_jax():
    process = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("user_share", ["", "0.5"])
def test_jax_takes_the_share_of_a_gpu_that_plan_counts_on(user_share, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", user_share)
    if not user_share:
        monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
    shares = []
    take_share = lambda args: shares.append(os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"])  # noqa: E731
    monkeypatch.setattr(inspect_verb, "main", take_share)
    assert cli.main(["inspect", "a"]) == 0
    assert shares == [user_share or str(devices.DEVICES["H200"].memory / 141e9)]


@pytest.mark.parametrize(
    "error, code, expected",
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (UserError("name another file"), 1, "dmm-jax inspect: error: name another file\n"),
        (UserError("a name with \x1b[31mred"), 1, "error: a name with \\x1b[31mred\n"),
        (FileNotFoundError(2, "No such file", "a.txt"), 1, "error: a.txt: No such file\n"),
        (FloatingPointError("step 3: the loss is not finite"), 1, "error: step 3: the loss is not finite\n"),
        (MemoryError("Unable to allocate 9 TiB"), 1, "out of memory: Unable to allocate 9 TiB"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 bytes.\n#0 x"), 1, "bytes. Where it computes images: fewer"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: E1: CompileTimeScopedVmemOom:\n"), 1, "config.attention=xla"),
        (
            RuntimeError("Unable to initialize backend 'tpu': busy"),
            1,
            "error: Unable to initialize backend 'tpu': busy",
        ),
        (jax.errors.JaxRuntimeError("INTERNAL: gone\nframes"), 1, "the device cannot continue: INTERNAL: gone\n"),
    ],
)
def test_errors_of_user_and_machine_are_one_line(capsys, error, code, expected):
    assert cli.exit_code("inspect", raising(error)) == code
    printed = capsys.readouterr().err
    assert expected in printed and printed.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("not a user error"), KeyError("key"), TypeError("type")])
def test_any_other_error_prints_its_traceback_and_asks_for_a_report(capsys, error):
    assert cli.exit_code("inspect", raising(error)) == 1
    *trace, report = capsys.readouterr().err.splitlines()
    assert trace[0].startswith("Traceback") and trace[-1].startswith(type(error).__name__)
    assert report.startswith("dmm-jax inspect: error: ") and "open an issue with your command" in report


def test_a_run_that_a_signal_stopped_says_how_to_resume(capsys):
    assert cli.exit_code("train", raising(Preempted("stopped by Ctrl-C after step 3, which is saved.", 130))) == 130
    assert capsys.readouterr().err == (
        "dmm-jax train: stopped by Ctrl-C after step 3, which is saved. Run it again to resume.\n"
    )


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_pipe_ends_with_the_code_of_sigpipe(stream, monkeypatch, capfd):
    reader, writer = os.pipe()
    os.close(reader)
    pipe, redirected = open(writer, "w"), []  # noqa: SIM115
    monkeypatch.setattr(sys, stream, pipe)
    monkeypatch.setattr(os, "dup2", lambda *files: redirected.append(files))
    assert cli.exit_code("inspect", lambda: print("x", file=getattr(sys, stream))) == cli.EXIT_PIPE == 141
    assert len(redirected) == 2 and capfd.readouterr() == ("", "")
    with pytest.raises(BrokenPipeError):
        pipe.close()


def test_ctrl_c_while_a_verb_is_imported_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_module", raising(KeyboardInterrupt()))
    assert cli.main(["inspect", "x"]) == 130 and capsys.readouterr().err == "dmm-jax inspect: interrupted\n"


def test_messages_do_not_repeat_long_texts(capsys):
    cli.exit_code("inspect", raising(UserError("a" * 5000 + "\nb")))
    first, second = capsys.readouterr().err.splitlines()
    assert len(first) < 1100 and first.endswith("…") and second == "b"


def test_warnings_are_one_line_and_one_of_orbax_is_dropped(capsys):
    from absl import logging as absl_logging

    def warn():
        absl_logging.warning("Metadata file does not exist: /a")
        absl_logging.warning("something else")
        try:
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device")
        except ValueError:
            absl_logging.exception("Save Finalize thread failed.")
        warnings.warn("a prompt was cut", stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.exit_code("inspect", warn) == 0
    printed = capsys.readouterr().err
    assert "dmm-jax inspect: warning: a prompt was cut\n" in printed and "test_main.py" not in printed
    assert "Metadata file" not in printed and "Finalize" not in printed and "Traceback" not in printed
