"""Reads captions from lists (JSON lines, CSV, Parquet) and from text files, in UTF-8 or UTF-16, within fixed bounds."""

import codecs
import csv
import io
import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from dmm_jax.data.files import DataFile, open_regular
from dmm_jax.runtime.errors import UserError

MAX_LINE_CHARS, MAX_CAPTION_CHARS = 100_000, 10_000
JOURNEYDB = ("train_anno_realease_repath.jsonl", "train_anno.jsonl", "valid_anno_repath.jsonl")  # The published names.
LISTS = tuple(f"{name}.{kind}" for name in ("captions", "metadata") for kind in ("jsonl", "csv", "parquet")) + JOURNEYDB
FILE_KEYS, CAPTION_KEYS = ("file", "file_name", "image", "img_path"), ("caption", "text", "prompt")


def read_list(path: pathlib.Path, columns: Sequence[str] = ()) -> Iterator[tuple[str, str, dict]]:
    """Yields (file, caption, row) of each row of a list.

    JourneyDB's `Task2.Caption` describes the picture; `prompt` is what its author wrote.

    Args:
        columns: further columns that the rows must have, if the list has them.

    Raises:
        UserError: a row is malformed, or the file cannot be read; names the line.
    """
    wanted = (*FILE_KEYS, *CAPTION_KEYS, *columns)
    read_rows = {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": partial(_parquet_rows, wanted)}[path.suffix]
    for place, row in read_rows(path):
        fields = dict(row) if isinstance(row, dict) else {}
        if isinstance(task := fields.get("Task2"), dict) and isinstance(task.get("Caption"), str):
            fields["caption"] = task["Caption"]
        name, caption = (
            next((fields[key] for key in keys if isinstance(fields.get(key), str)), None)
            for keys in (FILE_KEYS, CAPTION_KEYS)
        )
        if name is None or caption is None:
            raise UserError(
                f'{place}: expected {{"file": "a.png", "caption": "..."}}, with file_name, image or img_path for '
                f"file, and text or prompt for caption, if you like; got {str(row)[:200]!r}."
            )
        yield name, clean_caption(caption, place), fields


def clean_caption(text: str, place: str) -> str:
    """Returns a caption without byte order marks and surrounding space.

    Raises:
        UserError: the caption is too long, or holds half of a surrogate pair, which no tokenizer can read.
    """
    caption = text.replace("\ufeff", "").strip()
    if len(caption) > MAX_CAPTION_CHARS:
        raise UserError(f"{place}: a caption of more than {MAX_CAPTION_CHARS} characters. Shorten it.")
    if not _is_unicode(caption):
        raise UserError(f"{place}: the caption is not valid Unicode (a lone surrogate). Write it again.")
    return caption


def read_caption(file: DataFile, place: str) -> str:
    """Returns the caption that is the whole text of a file."""
    if file.size > 4 * MAX_CAPTION_CHARS:
        raise UserError(f"{place}: a caption of more than {MAX_CAPTION_CHARS} characters. Shorten it.")
    return clean_caption("".join(line for _, line in text_lines(io.BytesIO(file.read()), place)), place)


def read_columns(file: DataFile | None) -> dict:
    """Returns the columns that img2dataset wrote next to an image; {} without a file, or if it is no JSON object."""
    if file is None or file.size > MAX_LINE_CHARS:
        return {}
    try:
        columns = json.loads(file.read())
    except (ValueError, RecursionError):
        return {}
    return columns if isinstance(columns, dict) else {}


def text_lines(stream: io.BufferedIOBase, name: str) -> Iterator[tuple[str, str]]:
    """Yields (place, line) of a text in UTF-8, or in UTF-16 with a byte order mark; a place is "NAME, line NUMBER".

    Raises:
        UserError: a line is overlong, or the text has another encoding; names the line.
    """
    start = stream.read(2)
    stream.seek(0)
    encoding = "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    lines = io.TextIOWrapper(stream, encoding, "surrogateescape", newline=None)
    for number in range(1, 2**63):
        place = f"{name}, line {number}"
        try:
            line = lines.readline(MAX_LINE_CHARS + 1)
        except UnicodeError:
            line = "\udcff"  # surrogateescape cannot replace half a UTF-16 unit.
        if not _is_unicode(line):
            raise UserError(f"{place}: not UTF-8 text. Save the file as UTF-8.")
        if len(line) > MAX_LINE_CHARS:
            raise UserError(f"{place}: more than {MAX_LINE_CHARS} characters. Shorten the line.")
        if not line:
            return
        yield place, line


def _is_unicode(text: str) -> bool:
    """Returns whether a text has no lone surrogates; undecodable bytes become such."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json_rows(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    with open_regular(path) as stream:
        for place, line in text_lines(stream, str(path)):
            if line.strip():
                try:
                    yield place, json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{place}: not JSON ({error}). Write one object per line.") from error


def _csv_rows(path: pathlib.Path) -> Iterator[tuple[str, dict]]:
    with open_regular(path) as stream:
        rows = csv.DictReader(line for _, line in text_lines(stream, str(path)))
        try:
            for row in rows:
                yield f"{path}, line {rows.line_num}", row
        except csv.Error as error:
            raise UserError(
                f"{path}, line {rows.line_num}: not CSV ({error}). Save it as CSV, quotes doubled."
            ) from error


def _parquet_rows(wanted: Sequence[str], path: pathlib.Path) -> Iterator[tuple[str, dict]]:
    with open_regular(path) as stream:
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as error:
            raise UserError(f"{path} needs the package pyarrow: pip install pyarrow") from error
        try:
            table = parquet.ParquetFile(stream)
            columns = [name for name in table.schema_arrow.names if name in wanted]
            batches = table.iter_batches(columns=columns)
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, row in enumerate(rows, start=1):
                yield f"{path}, row {number}", row
        except (ArrowException, OSError) as error:
            raise UserError(f"{path} is not a Parquet file ({str(error)[:200]}). Write it again.") from error
