"""Drawn stand-ins for the emoji sets' packages: three sets of shapes in npm's files, with the hashes of their files."""

import base64
import hashlib
import io
import json
import pathlib
import tarfile
from collections.abc import Mapping

from dmm_jax.studies.emoji_sets import Package

FIRST = 0x1F60C  # The third and the fifth of ten concepts from here are held out.
NAMES = (
    "red apple", "rocket", "keycap #", "woman\u2019s hat", "pi\u00f1ata", "A button (blood type)", "dog face", "snail",
    "owl", "broom",
)  # fmt: skip
ICONS = ("red-apple", "rocket", "keycap-pound", "womans-hat", "pinata", "a-button-blood-type", "dog-face", "snail",
         "owl", "broom")  # fmt: skip
DRAWINGS = {
    "round": '<circle cx="16" cy="16" r="{size}" fill="{colour}"/>',
    "square": '<path d="M4 4h{size}v{size}H4z" fill="{colour}"/>',
    "outline": '<path d="M4 4h{size}v{size}z" fill="none" stroke="black"/>',
}


def icons_of(name: str) -> dict[str, dict]:
    """Returns the icons of a set; "outline" lacks the last concept, and has one alias, which is mirrored."""
    icons = {
        icon: {"body": DRAWINGS[name].format(size=4 + place, colour=f"#{place * 25:02x}60{255 - place * 20:02x}")}
        for place, icon in enumerate(ICONS)
    }
    if name == "outline":
        del icons["broom"], icons["owl"]
    return icons


def contents_of(name: str) -> dict[str, object]:
    """Returns the files of a set's package."""
    aliases = {"owl": {"parent": "snail", "hFlip": True}} if name == "outline" else {}
    return {"icons.json": {"icons": icons_of(name), "aliases": aliases, "width": 32, "height": 32}}


def write_package(folder: pathlib.Path, name: str, contents: Mapping[str, object]) -> Package:
    """Writes the file of a package and returns its entry of the list."""
    folder.mkdir(parents=True, exist_ok=True)
    package = Package(name, "1.0.0", "", "MIT", f"who draws {name}")
    with tarfile.open(folder / package.file, "w:gz") as tar:
        for file, value in contents.items():
            raw = json.dumps(value).encode()
            info = tarfile.TarInfo(f"package/{file}")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    digest = hashlib.sha512((folder / package.file).read_bytes()).digest()
    return package._replace(integrity="sha512-" + base64.b64encode(digest).decode())


def write_packages(folder: pathlib.Path) -> tuple[dict[str, Package], Package]:
    """Writes the packages of all sets and of the names; returns the arguments of `fetch`."""
    sets = {name: write_package(folder, f"@test/{name}", contents_of(name)) for name in DRAWINGS}
    entries = {chr(FIRST + place): {"name": name, "group": "Objects"} for place, name in enumerate(NAMES)}
    entries |= {"\U0001f1e6\U0001f1f1": {"name": "flag Albania", "group": "Flags"}}
    return sets, write_package(folder, "names", {"data-by-emoji.json": entries})
