"""The emoji sets' packages: hashes before contents, names, and a split that depends on the code points alone."""

import json
import subprocess
import tarfile

import numpy as np
import pytest

from dmm_jax.runtime.errors import UserError
from dmm_jax.studies import emoji_sets
from dmm_jax.studies.emoji_sets import SETS, Concept
from tests.studies import emoji_packages


def test_a_file_with_another_hash_is_refused_before_it_is_read(tmp_path):
    sets, _ = emoji_packages.write_packages(tmp_path)
    package = sets["round"]
    assert emoji_sets.download(tmp_path, package) == tmp_path / package.file
    with (tmp_path / package.file).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(UserError, match="Delete the file"):
        emoji_sets.download(tmp_path, package)


def test_a_download_of_another_file_leaves_nothing(tmp_path, monkeypatch):
    package = SETS["noto"]

    def pack(command, cwd, **_):
        assert command[:3] == ["npm", "pack", "@iconify-json/noto@1.2.9"]
        (tmp_path / cwd / package.file).write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pack)
    with pytest.raises(UserError, match="expected sha512-DQiu"):
        emoji_sets.download(tmp_path, package)
    assert list(tmp_path.iterdir()) == []


def test_without_npm_the_error_names_the_file_to_bring(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"Put iconify-json-noto-1\.2\.9\.tgz"):
        emoji_sets.download(tmp_path / "packages", SETS["noto"])


def test_only_regular_members_of_bounded_size_are_read(tmp_path, monkeypatch):
    path = tmp_path / "links.tgz"
    with tarfile.open(path, "w:gz") as tar:
        link = tarfile.TarInfo("package/icons.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(UserError, match="has no file icons.json"):
        emoji_sets.read_member(path, "icons.json")
    sets, _ = emoji_packages.write_packages(tmp_path)
    monkeypatch.setattr(emoji_sets, "MAX_MEMBER_BYTES", 100)
    with pytest.raises(UserError, match="at most 100 bytes"):
        emoji_sets.read_member(tmp_path / sets["round"].file, "icons.json")
    path.write_bytes(b"no tar file")
    with pytest.raises(UserError, match="cannot be read"):
        emoji_sets.read_member(path, "icons.json")


def test_concepts_have_captions_and_icons_by_their_names(tmp_path):
    _, names = emoji_packages.write_packages(tmp_path)
    concepts = emoji_sets.read_concepts(tmp_path / names.file)
    assert [concept.icon for concept in concepts] == list(emoji_packages.ICONS)  # Without the flag.
    captions = {concept.icon: concept.caption for concept in concepts}
    assert captions["keycap-pound"] == "keycap pound" and captions["womans-hat"] == "woman's hat"
    assert captions["a-button-blood-type"] == "a button blood type" and captions["pinata"] == "pinata"
    assert concepts[0].key == "1f60c" and emoji_sets.key_of("\u2764\ufe0f\u200d\U0001f525") == "2764-200d-1f525"


def test_two_concepts_of_one_icon_are_refused(tmp_path):
    entries = {emoji: {"name": "red apple", "group": "Objects"} for emoji in "ab"}
    package = emoji_packages.write_package(tmp_path, "names", {"data-by-emoji.json": entries})
    with pytest.raises(UserError, match="the icon red-apple"):
        emoji_sets.read_concepts(tmp_path / package.file)


def test_an_alias_draws_its_parent_mirrored(tmp_path):
    sets, _ = emoji_packages.write_packages(tmp_path)
    icons = emoji_sets.read_icons(tmp_path / sets["outline"].file)
    assert icons["owl"] == icons["snail"]._replace(mirrored=True) and not icons["snail"].mirrored
    assert "broom" not in icons


def test_a_tenth_of_the_concepts_is_held_out_whatever_the_others_are():
    keys = [f"{code:x}" for code in range(0x1F300, 0x1F300 + 4000)]
    held_out = np.array([Concept(key, "", "").is_held_out for key in keys])
    assert held_out.mean() == pytest.approx(0.1, abs=0.015)
    assert [Concept(key, "other", "names").is_held_out for key in reversed(keys)] == held_out[::-1].tolist()


def test_no_listed_set_is_share_alike():
    assert {package.license for package in SETS.values()} == {"Apache-2.0", "CC-BY-4.0", "MIT"}
    assert json.dumps(list(SETS)).count("openmoji") == 0
