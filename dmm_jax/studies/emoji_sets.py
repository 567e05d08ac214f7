"""Seven published emoji sets and the list of their concepts: packages, download, hashes, and which set draws what.

Each set is one npm package of the Iconify project. A concept is an emoji of Unicode's list of names without skin tones
and without flags; its key is the code points in hexadecimal, without variation selectors. A set draws a concept if it
has an icon of this name: "red apple" is the icon "red-apple".
"""

import base64
import hashlib
import json
import os
import pathlib
import re
import subprocess
import tarfile
import tempfile
import unicodedata
from collections.abc import Mapping
from typing import Any, NamedTuple

from dmm_jax.runtime.errors import UserError

MAX_MEMBER_BYTES = 2**27  # The largest list of icons has 104 MB.
SPLIT_SEED, HELD_OUT_SHARE = 0, 0.1
WITHOUT_GROUPS = ("Flags",)  # Every set copies the same designs.
VARIATION_SELECTOR = "\ufe0f"
SIGNS = {"#": "pound", "*": "asterisk"}  # In names of icons; other signs are left out.
DOWNLOAD_S = 600


class Package(NamedTuple):
    """One npm package: its version, the hash of its file as npm's lock files write it, its licence and author."""

    name: str
    version: str
    integrity: str
    license: str
    author: str

    @property
    def file(self) -> str:
        """The name of the file that `npm pack` writes."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def _iconify(name: str, version: str, integrity: str, license: str, author: str) -> Package:
    return Package(f"@iconify-json/{name}", version, f"sha512-{integrity}", license, author)


# Their order is the order of the student's styles. The three fluent sets share their drawings.
SETS: Mapping[str, Package] = {
    "noto": _iconify(
        "noto", "1.2.9", "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        "Apache-2.0", "Google Inc"),
    "noto-v1": _iconify(
        "noto-v1", "1.2.5", "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        "Apache-2.0", "Google Inc"),
    "twemoji": _iconify(
        "twemoji", "1.2.5", "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "CC-BY-4.0", "Twitter"),
    "fluent-emoji": _iconify(
        "fluent-emoji", "1.2.7",
        "D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
        "MIT", "Microsoft Corporation"),
    "fluent-emoji-flat": _iconify(
        "fluent-emoji-flat", "1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        "MIT", "Microsoft Corporation"),
    "fluent-emoji-high-contrast": _iconify(
        "fluent-emoji-high-contrast", "1.2.6",
        "esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX5w==",
        "MIT", "Microsoft Corporation"),
    "emojione": _iconify(
        "emojione", "1.2.3", "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        "CC-BY-4.0", "Emoji One"),
}  # fmt: skip
NAMES = Package(  # The names of Unicode's emoji-test.txt, version 17.0, as JSON.
    "unicode-emoji-json", "0.9.0",
    "sha512-HdrQW/7SdbXUsTd8uTATv7LvQJkCSgbAgRCDCtOhQ6xn3EAx+xZHQtRniOXWJK3ywIqPegkNhP4U4EbuFsiQng==",
    "MIT", "Mu-An Chiou",
)  # fmt: skip


class Icon(NamedTuple):
    """One drawing: the inner part of an SVG document, and its view box in the document's units."""

    body: str
    width: float
    height: float
    mirrored: bool = False  # Left and right are exchanged.


class Concept(NamedTuple):
    """One emoji that any set may draw."""

    key: str  # "1f34e"
    caption: str  # "red apple"
    icon: str  # The name of its icon in the sets, "red-apple".

    @property
    def is_held_out(self) -> bool:
        """Whether no teacher sees it, in any set: a tenth of the concepts, by a hash of seed and code points."""
        digest = hashlib.sha256(f"emoji {SPLIT_SEED} {self.key}".encode()).digest()
        return int.from_bytes(digest[:8]) < HELD_OUT_SHARE * 2**64


def download(folder: pathlib.Path, package: Package) -> pathlib.Path:
    """Returns the file of a package in `folder`, of the right hash; npm downloads it if the folder lacks it.

    Raises:
      UserError: npm is not installed or cannot download it, or its hash is wrong; nothing is written then.
    """
    path = folder / package.file
    if path.is_file():
        check_hash(path, package)
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as part:
        options = ["--ignore-scripts", "--silent", "--pack-destination", part]
        command = ["npm", "pack", f"{package.name}@{package.version}", *options]
        advice = f"Put {package.file}, the file of {package.name} {package.version}, into {folder} yourself."
        try:
            done = subprocess.run(command, cwd=part, capture_output=True, text=True, timeout=DOWNLOAD_S)
        except FileNotFoundError:
            raise UserError(f"npm is not installed, and would download {package.name}. {advice}") from None
        except subprocess.TimeoutExpired:
            raise UserError(f"npm did not download {package.name} in {DOWNLOAD_S} s. {advice}") from None
        packed = pathlib.Path(part) / package.file
        if done.returncode or not packed.is_file():
            reason = " ".join((done.stderr or done.stdout).split())[-300:]
            raise UserError(f"npm cannot download {package.name} {package.version} ({reason}). {advice}")
        check_hash(packed, package)
        os.replace(packed, path)
    return path


def check_hash(path: pathlib.Path, package: Package) -> None:
    """Raises UserError unless a file has the hash of a package."""
    with path.open("rb") as file:
        actual = "sha512-" + base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()
    if actual != package.integrity:
        raise UserError(
            f"{path} is not {package.name} {package.version}: expected {package.integrity}, got {actual}. Delete the "
            "file and give the command again."
        )


def read_member(path: pathlib.Path, member: str) -> Any:
    """Returns the contents of a JSON file in a package; nothing is unpacked to disk.

    Raises:
      UserError: the package has no regular file of this name, the file is too large, or is not JSON.
    """
    try:
        with tarfile.open(path, "r:gz") as tar:
            for info in tar:
                if info.name == f"package/{member}" and info.isreg() and info.size <= MAX_MEMBER_BYTES:
                    return json.loads(tar.extractfile(info).read())
    except (tarfile.TarError, EOFError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {member} cannot be read ({str(error)[:200]}). Delete the file.") from None
    raise UserError(f"{path} has no file {member} of at most {MAX_MEMBER_BYTES} bytes. Delete the file.")


def read_concepts(path: pathlib.Path) -> list[Concept]:
    """Returns the concepts of the package NAMES, in Unicode's order.

    Raises:
      UserError: the package is damaged, or two concepts have the same key or icon.
    """
    entries = read_member(path, "data-by-emoji.json")
    concepts = [
        Concept(key_of(emoji), caption_of(entry["name"]), icon_name(entry["name"]))
        for emoji, entry in entries.items()
        if entry["group"] not in WITHOUT_GROUPS
    ]
    for field in ("key", "icon"):
        values = [getattr(concept, field) for concept in concepts]
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise UserError(f"{path}: several concepts have the {field} {', '.join(twice[:5])}. Delete the file.")
    return concepts


def key_of(emoji: str) -> str:
    """Returns the code points of an emoji in hexadecimal, joined by hyphens, without variation selectors."""
    return "-".join(f"{ord(character):x}" for character in emoji if character != VARIATION_SELECTOR)


def _plain(name: str) -> str:
    """Returns a name in lower-case ASCII."""
    text = unicodedata.normalize("NFKD", name.replace("\u2019", "'")).encode("ascii", "ignore").decode()
    return text.lower()


def caption_of(name: str) -> str:
    """Returns the caption of a picture: the name in lower-case ASCII, with signs as words."""
    text = "".join(f"{SIGNS[letter]} " if letter in SIGNS else letter for letter in _plain(name))
    return " ".join(re.sub(r"[^a-z0-9' -]+", " ", text).split())


def icon_name(name: str) -> str:
    """Returns the name of a concept's icon: the words of its name joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", caption_of(name).replace("'", "")).strip("-")


def read_icons(path: pathlib.Path) -> dict[str, Icon]:
    """Returns the icons of a set's package by name, aliases included.

    Raises:
      UserError: the package is damaged.
    """
    contents = read_member(path, "icons.json")
    sizes = {side: contents.get(side, 16) for side in ("width", "height")}
    icons = {}
    for name, icon in contents["icons"].items():
        icons[name] = Icon(icon["body"], *(float(icon.get(side, size)) for side, size in sizes.items()))
    for name, alias in contents.get("aliases", {}).items():
        parent = icons.get(alias["parent"])
        if parent and not {"rotate", "vFlip"} & set(alias):
            icons[name] = parent._replace(mirrored=bool(alias.get("hFlip")))
    return icons
