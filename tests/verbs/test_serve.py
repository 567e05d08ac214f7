"""`dmm-jax serve`: everything that can be refused is refused before the model is opened."""

import importlib.util

import pytest

from dmm_jax.runtime.errors import UsageError
from dmm_jax.serve.server import listen
from dmm_jax.verbs import main as cli
from dmm_jax.verbs import serve


def test_sizes_have_the_width_first():
    assert serve.parse_sizes("768x512, 64X128") == [(512, 768), (128, 64)] and serve.parse_sizes("") == []


@pytest.mark.parametrize("text", ["512", "512x", "x512", "512xa", "-1x5", "512x512x512"])
def test_other_texts_are_no_sizes(text):
    with pytest.raises(UsageError, match="is not WIDTHxHEIGHT. Write for example 512x512,768x512"):
        serve.parse_sizes(text)


def test_a_wrong_size_is_wrong_usage(failing):
    assert "--sizes" in failing("serve", "unopened", "--sizes", "big", code=cli.EXIT_USAGE)


def test_another_host_needs_a_key(failing):
    assert "give --api-key-file FILE, or --no-auth" in failing("serve", "unopened", "--host", "0.0.0.0")


def test_a_missing_key_file_is_one_line(failing, tmp_path):
    assert failing("serve", "unopened", "--api-key-file", tmp_path / "keys").count("\n") == 1


def test_a_port_in_use_is_one_line(failing):
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        error = failing("serve", "unopened", "--port", str(port))
        assert error == f"dmm-jax serve: error: port {port} is in use: choose another with --port, or stop its owner.\n"


def test_a_missing_model_is_one_line(failing):
    error = failing("serve", "unopened", "--port", "0")
    assert error.startswith("Reading unopened\n") and "there is no checkpoint unopened" in error


def test_the_page_of_the_shipped_student_has_an_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert serve.example_prompt_of("demo").startswith("a small") and serve.example_prompt_of("runs/sd15") == ""


def test_missing_packages_are_named(failing, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else object())
    assert "serve needs uvicorn: install them with pip install 'dmm-jax[serve]'" in failing("serve", "unopened")
