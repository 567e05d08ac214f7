"""The report of `inspect` as a text for people: one table, a line for each hash and each damage, and the verdict."""

from collections.abc import Iterator, Mapping, Sequence

from dmm_jax.checkpoints.naming import listed, printable

COLUMNS = ("checkpoint", "kind", "architecture", "predicts", "network", "parameters", "tensors", "contents")
RIGHT = ("parameters",)
SHOWN_DIGITS = 10  # Of a digest; two networks whose digits are equal are equal.
GAP = "  "
SAMPLE = "sample"  # What "read" says of a checkpoint that was not read whole.


def render(report: Mapping) -> str:
    """Returns the text of a report by `inspect`."""
    checkpoints = report["checkpoints"]
    rows = [row for checkpoint in checkpoints for row in _rows(checkpoint)]
    parts = ["\n".join(_table(rows)), *("\n".join(_notes(checkpoint)) for checkpoint in checkpoints), _verdict(report)]
    return "\n\n".join(parts)


def _rows(checkpoint) -> Iterator[tuple[str, ...]]:
    if checkpoint["error"]:
        yield printable(checkpoint["name"]), "cannot be opened", *("",) * (len(COLUMNS) - 2)
        return
    first = [checkpoint[name] or "-" for name in ("name", "kind", "architecture", "prediction_type")]
    first = tuple(printable(str(cell)) for cell in first)
    for component, held in checkpoint["components"].items():
        yield *first, component, *_cells(held)
        first = ("",) * len(first)


def _cells(held) -> tuple[str, ...]:
    if not held:
        return "-", "-", "-"
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in held["dtypes"].items())
    return f"{held['parameters']:,}", dtypes, (held["digest"] or "not read")[:SHOWN_DIGITS]


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    for row in (COLUMNS, tuple("-" * width for width in widths), *rows):
        cells = zip(COLUMNS, row, widths, strict=True)
        line = (cell.rjust(width) if name in RIGHT else cell.ljust(width) for name, cell, width in cells)
        yield GAP.join(line).rstrip()


def _notes(checkpoint) -> Iterator[str]:
    """Yields a heading and what no column has room for."""
    yield printable(checkpoint["path"], 1000)
    yield f"{GAP}licence: {printable(checkpoint['license'] or 'not stated')}"
    if checkpoint["styles"]:
        yield f"{GAP}styles: {', '.join(map(printable, checkpoint['styles']))}"
    if checkpoint["hash"]:
        yield f"{GAP}hash: {checkpoint['hash']} (as hubs show it)"
    for file in checkpoint["files"]:
        digest = f"SHA-256 {file['sha256']} " if file["sha256"] else ""
        yield f"{GAP}{digest}{printable(file['file'])} ({file['bytes']:,} bytes)"
    if checkpoint["read"] == SAMPLE:
        yield f"{GAP}read: the start, middle and end of every tensor; --deep reads all of it"
    if any(not file["sha256"] for file in checkpoint["files"]):
        yield f"{GAP}hash: not computed, it takes a while; --hash does"
    for line in checkpoint["loans"]:
        yield GAP + printable(line, 1000)
    for lora in checkpoint["loras"]:
        yield f"{GAP}{_lora(lora)}"
    if checkpoint["ema_tensors"]:
        yield f"{GAP}{checkpoint['ema_tensors']} EMA tensors beside the weights; not used"
    if checkpoint["unused_tensors"]:
        yield f"{GAP}{checkpoint['unused_tensors']} tensors that belong to no network; not used"
    for damage in checkpoint["damage"]:
        weight = "damaged" if damage["matters"] else "damaged, but harmless"
        of = f" {listed(damage['tensors'])}" if damage["tensors"] else ""
        meaning = printable(damage["meaning"], 1000)
        yield f"{GAP}{weight}: {damage['component']}, {damage['kind']}{of} ({meaning})"


def _lora(lora) -> str:
    layers = ", ".join(f"{count} of {network}" for network, count in lora["networks"].items())
    ranks = ("rank " if len(lora["ranks"]) == 1 else "ranks ") + ", ".join(map(str, lora["ranks"]))
    file = printable(lora["file"])
    return f"LoRA {file} * {lora['weight']:g}: {ranks}, layers: {layers}; hash {lora['hash']}, SHA-256 {lora['sha256']}"


def _verdict(report) -> str:
    first, *others = (printable(checkpoint["name"]) for checkpoint in report["checkpoints"])
    if report["mergeable"]:
        said = f"These checkpoints can be merged on {first}: {', '.join(others)}" if others else f"{first} is sound"
        sampled = any(checkpoint["read"] == SAMPLE for checkpoint in report["checkpoints"])
        return said + (", as far as it was read." if sampled else ".")
    lines = [f"{GAP}- {line}" for line in report["obstacles"]]
    heading = "These checkpoints cannot be merged:" if others else f"{first} cannot be used:"
    return "\n".join([heading, *lines])
