"""README and docs name files, verbs, options and public names that exist, and the site builds without a warning."""

import pathlib
import re
import subprocess
import sys

import pytest

import dmm_jax
from dmm_jax.config.options import get_config
from dmm_jax.verbs.main import build_parser

ROOT = pathlib.Path(__file__).parents[1]
OUTSIDE = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")  # mkdocs checks the links of the pages in docs/.
PAGES = (*OUTSIDE, *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
VERB = re.compile(r"dmm-jax ([a-z][a-z-]*)([^`|#\n]*)")
OPTION = re.compile(r"(?<!\S)--[a-z][\w.-]*")
FILE = re.compile(r"(?<![\w/.])(?:dmm_jax|configs|launch|tests)/[\w/.-]+\.(?:py|sh|txt)\b")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def option_names(verb: str) -> set[str]:
    (verbs,) = [action for action in build_parser(verb)._actions if action.dest == "verb"]
    return set(verbs.choices[verb]._option_string_actions)


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_verbs_and_options_that_exist(page):
    for verb, arguments in VERB.findall(text_of(page).replace("\\\n", " ")):
        for option in OPTION.findall(arguments):
            if option.startswith("--config."):
                name = option.removeprefix("--config.")
                assert name == "NAME" or name in get_config().to_dict() or _has_option(name), option
            else:
                assert option in option_names(verb), f"dmm-jax {verb} {option}"


def _has_option(name: str) -> bool:
    group, _, option = name.rpartition(".")
    return bool(group) and option in get_config()[group]


@pytest.mark.parametrize("page", PAGES)
def test_files_in_backticks_exist(page):
    assert [name for name in FILE.findall(text_of(page)) if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("page", OUTSIDE)
def test_links_outside_the_site_resolve(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text_of(page))
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_api_page_has_every_public_name():
    described = re.findall(r"^::: (dmm_jax\.\S+)$", text_of("docs/api.md"), re.MULTILINE)
    public = {f"dmm_jax.{module}.{name}" for name, module in dmm_jax._MODULES.items() if hasattr(dmm_jax, name)}
    assert set(described) == public


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="launch/requirements-test.txt installs it")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "api.html").is_file()
