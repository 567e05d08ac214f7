"""Draws the emoji sets as one folder of captioned pictures, which `dmm-jax prepare` reads, and counts them.

Every concept that a set draws gives two pictures of 64 pixels: on white, with the concept's name as caption, and on one
of six pale colours, "red apple on pale blue". captions.jsonl has the columns set, concept and split, for `data.where`:

- "train" is shown to the base and to the set's teacher;
- "witness" is a held-out concept of the set WITNESS. The base sees it, and so knows its words; no teacher does;
- "held-out" is a held-out concept of any other set. Only the classifier sees it.
"""

import hashlib
import io
import json
import pathlib
from collections.abc import Mapping, Sequence

from PIL import Image

from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.processes import say
from dmm_jax.runtime.storage import check_output, staged_folder
from dmm_jax.studies.emoji_sets import NAMES, SETS, Concept, Icon, Package, download, read_concepts, read_icons

SIZE_PX = 64
WITNESS = "noto"
TRAIN, WITNESSED, HELD_OUT = "train", "witness", "held-out"
PALE_COLOURS = {  # Their names begin with "pale" in captions.
    "red": (247, 205, 205),
    "yellow": (248, 240, 190),
    "green": (208, 236, 205),
    "blue": (203, 224, 247),
    "purple": (226, 211, 244),
    "grey": (222, 222, 222),
}
PICTURES, LIST, PACKAGES = "pictures", "captions.jsonl", "packages"


def fetch(folder: pathlib.Path, sets: Mapping[str, Package] = SETS, names: Package = NAMES) -> pathlib.Path:
    """Downloads the packages to FOLDER/packages and draws them to FOLDER/pictures; returns the latter.

    Args:
      sets: {name of a set: its package}.
      names: the package of concepts.

    Raises:
      UserError: a package cannot be downloaded or has another hash, resvg is not installed, or pictures exist.
    """
    _resvg()
    check_output(folder / PICTURES)
    paths = {package: download(folder / PACKAGES, package) for package in (*sets.values(), names)}
    concepts = read_concepts(paths[names])
    with staged_folder(folder / PICTURES) as stage, (stage / LIST).open("x", encoding="utf-8") as listing:
        for name, package in sets.items():
            say(f"drawing {name}, {package.license}, by {package.author}")
            (stage / name).mkdir()
            for row in draw_set(stage, name, read_icons(paths[package]), concepts):
                listing.write(json.dumps(row) + "\n")
    return folder / PICTURES


def draw_set(stage: pathlib.Path, name: str, icons: Mapping[str, Icon], concepts: Sequence[Concept]):
    """Draws the concepts of a set to files, and yields their rows for captions.jsonl."""
    for concept in concepts:
        if not (icon := icons.get(concept.icon)):
            continue
        drawing = rasterise(icon)
        colour = colour_of(name, concept)
        backgrounds = {"": ("white", concept.caption), "_pale": (PALE_COLOURS[colour], f" on pale {colour}")}
        for suffix, (background, text) in backgrounds.items():
            file = f"{name}/{concept.key}{suffix}.webp"
            picture = Image.alpha_composite(Image.new("RGBA", drawing.size, background), drawing).convert("RGB")
            picture.save(stage / file, "WEBP", lossless=True)
            yield {
                "file": file,
                "caption": concept.caption + text * bool(suffix),
                "set": name,
                "concept": concept.key,
                "split": split_of(name, concept),
            }


def split_of(name: str, concept: Concept) -> str:
    """Returns the split of a set's pictures of a concept."""
    if not concept.is_held_out:
        return TRAIN
    return WITNESSED if name == WITNESS else HELD_OUT


def colour_of(name: str, concept: Concept) -> str:
    """Returns the pale background of a set's second picture of a concept, by a hash of both."""
    number = int.from_bytes(hashlib.sha256(f"{name} {concept.key}".encode()).digest()[:8])
    return list(PALE_COLOURS)[number % len(PALE_COLOURS)]


def svg_of(icon: Icon) -> str:
    """Returns an icon as an SVG document of SIZE_PX pixels; an oblong view box is centred."""
    body = icon.body
    if icon.mirrored:
        body = f'<g transform="translate({icon.width:g} 0) scale(-1 1)">{body}</g>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{SIZE_PX}" '
        f'height="{SIZE_PX}" viewBox="0 0 {icon.width:g} {icon.height:g}">{body}</svg>'
    )


def rasterise(icon: Icon) -> Image.Image:
    """Returns an icon as an RGBA picture of SIZE_PX pixels.

    Raises:
      UserError: the icon would read another file, is not SVG, or resvg is not installed.
    """
    if "<image" in icon.body:
        raise UserError("an icon holds a picture of another file, which is not read. Leave its package out.")
    try:
        png = bytes(_resvg().svg_to_bytes(svg_string=svg_of(icon), skip_system_fonts=True))
    except ValueError as error:
        raise UserError(f"an icon cannot be drawn ({str(error)[:200]}). Leave its package out.") from None
    return Image.open(io.BytesIO(png)).convert("RGBA")


def _resvg():
    try:
        import resvg_py
    except ImportError:
        raise UserError("the emoji sets are drawn by the package resvg-py: pip install 'dmm-jax[emoji]'") from None
    return resvg_py


def read_rows(folder: pathlib.Path) -> list[dict]:
    """Returns the rows of a folder's pictures.

    Raises:
      UserError: there are none.
    """
    path = folder / PICTURES / LIST
    if not path.is_file():
        raise UserError(f"{path} is missing: python -m dmm_jax.studies.emoji fetch {folder}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def counts(folder: pathlib.Path, sets: Mapping[str, Package] = SETS) -> str:
    """Returns a Markdown table: the concepts of each set, by split, and how many concepts of the list it lacks."""
    rows = read_rows(folder)
    held_out = {row["concept"] for row in rows if row["split"] != TRAIN}
    by_set = {name: {row["concept"] for row in rows if row["set"] == name} for name in sets}
    every = set.union(*by_set.values())
    lines = [(name, package.license, package.author, by_set[name]) for name, package in sets.items()]
    lines += [("every set has", "", "", set.intersection(*by_set.values())), ("any set has", "", "", every)]
    text = ["| set | licence | author | concepts | train | held out | lacks |", "|---|---|---|---|---|---|---|"]
    for *cells, concepts in lines:
        numbers = (concepts, concepts - held_out, concepts & held_out, every - concepts)
        text.append(f"| {' | '.join([*cells, *(f'{len(part):,}' for part in numbers)])} |")
    return "\n".join(text)


def lacking(folder: pathlib.Path, name: str) -> list[str]:
    """Returns the captions of the concepts that a set lacks and another set has."""
    rows = [row for row in read_rows(folder) if " on pale " not in row["caption"]]
    own = {row["concept"] for row in rows if row["set"] == name}
    return sorted({row["caption"] for row in rows if row["concept"] not in own})
