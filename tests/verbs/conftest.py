"""Fixtures of the command line: an experiment file on the tiny world, and a verb that must fail."""

import pytest

from dmm_jax.verbs import main as cli
from tests.experiments import write_experiment


@pytest.fixture
def experiment(tiny, tmp_path):
    """Returns a function that writes an experiment and returns --config and --workdir; it takes other teachers."""

    def write(**teachers):
        config = tiny[1].copy_and_resolve_references()
        config.teachers = tuple((name, str(teachers.get(name, path))) for name, path in config.teachers)
        return [
            f"--config={write_experiment(tmp_path / 'experiment.py', config)}",
            f"--workdir={tmp_path / 'work'}",
        ]

    return write


@pytest.fixture
def failing(capsys):
    """Returns a function that runs a verb, checks its exit code, and returns the error: a message, not a traceback."""

    def run(*arguments, code=cli.EXIT_ERROR):
        assert cli.main([str(argument) for argument in arguments]) == code
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error

    return run
