"""The command line itself: exit codes, errors and warnings in one line, and what it imports."""

import os
import subprocess
import sys
import warnings

import jax
import pytest

from dmm_jax.runtime.errors import Preempted, UserError
from dmm_jax.verbs import main as cli


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


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_a_help_text(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([verb, "--help"])
    assert stopped.value.code == 0
    assert cli.VERBS[verb] in " ".join(capsys.readouterr().out.split())


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


@pytest.mark.parametrize(
    "error, code, expected",
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (UserError("name another file"), 1, "dmm-jax inspect: error: name another file\n"),
        (FileNotFoundError(2, "No such file", "a.txt"), 1, "error: a.txt: No such file\n"),
        (FloatingPointError("step 3: the loss is not finite"), 1, "error: step 3: the loss is not finite\n"),
        (MemoryError("Unable to allocate 9 TiB"), 1, "out of memory: Unable to allocate 9 TiB"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n#0 x"), 1, "out of memory"),
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
