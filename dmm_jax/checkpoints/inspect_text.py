"""Renders a report of `inspect` as text for people: one table, lines about hashes and damage, and the verdict."""

from collections.abc import Iterator, Mapping, Sequence

from dmm_jax.checkpoints.naming import listed, printable

COLUMNS = ("checkpoint", "kind", "architecture", "predicts", "network", "parameters", "tensors", "weights hash")
RIGHT_ALIGNED = ("parameters",)
SHOWN_DIGITS = 10  # Digits of a digest in the table.
LEGEND = "weights hash: networks with equal weights have equal ones, whatever the kind of file."
GAP = "  "
SAMPLE = "sample"  # The value of "read" if only pieces of a checkpoint were read.


def render(report: Mapping) -> str:
    """Returns the text of a report by `inspect`."""
    checkpoints = report["checkpoints"]
    rows = [row for checkpoint in checkpoints for row in _rows(checkpoint)]
    legend = [LEGEND] if any(checkpoint["components"] for checkpoint in checkpoints) else []
    notes = ["\n".join(_notes(checkpoint)) for checkpoint in checkpoints]
    return "\n\n".join(["\n".join(_table(rows)), *legend, *notes, _verdict(report)])


def _rows(checkpoint) -> Iterator[tuple[str, ...]]:
    """Yields one row per network, the checkpoint's own columns in the first of them."""
    if checkpoint["error"]:
        kind = "adapter" if checkpoint["adapter"] else "cannot be opened"
        yield printable(checkpoint["name"]), kind, *("",) * (len(COLUMNS) - 2)
        return
    columns = [checkpoint[name] or "-" for name in ("name", "kind", "architecture", "prediction_type")]
    columns = tuple(printable(str(cell)) for cell in columns)
    for component, contents in checkpoint["components"].items():
        yield *columns, component, *_cells(contents)
        columns = ("",) * len(columns)


def _cells(contents) -> tuple[str, ...]:
    if not contents:
        return "-", "-", "-"
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in contents["dtypes"].items())
    return f"{contents['parameters']:,}", dtypes, (contents["digest"] or "not read")[:SHOWN_DIGITS]


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    for row in (COLUMNS, tuple("-" * width for width in widths), *rows):
        cells = zip(COLUMNS, row, widths, strict=True)
        line = (cell.rjust(width) if name in RIGHT_ALIGNED else cell.ljust(width) for name, cell, width in cells)
        yield GAP.join(line).rstrip()


def _notes(checkpoint) -> Iterator[str]:
    """Yields the path, and one line for each fact that has no column."""
    yield printable(checkpoint["path"], 1000)
    yield f"{GAP}licence: {printable(checkpoint['license'] or 'not stated')}"
    if checkpoint["styles"]:
        yield f"{GAP}styles: {', '.join(map(printable, checkpoint['styles']))}"
    if checkpoint["hash"]:
        yield f"{GAP}AutoV2 hash: {checkpoint['hash']} (of the file, as hubs show it)"
    for file in checkpoint["files"]:
        digest = f"SHA-256 {file['sha256']} " if file["sha256"] else ""
        yield f"{GAP}{digest}{printable(file['file'])} ({file['bytes']:,} bytes)"
    if checkpoint["read"] == SAMPLE:
        yield f"{GAP}read: the start, middle and end of every tensor; --deep reads all of it"
    if any(not file["sha256"] for file in checkpoint["files"]):
        yield f"{GAP}SHA-256: not computed, it takes a while; --hash does"
    if checkpoint["float8"]:
        yield f"{GAP}float8: {checkpoint['float8']}; read in float16, or with the scale in float32"
    for sentence in (*checkpoint["loans"], *checkpoint["advice"]):
        yield GAP + printable(sentence, 1000)
    for lora in checkpoint["loras"]:
        yield f"{GAP}{_lora(lora)}"
    if checkpoint["ema_tensors"]:
        yield f"{GAP}{checkpoint['ema_tensors']} EMA tensors next to the weights; not used"
    if checkpoint["unused_tensors"]:
        yield f"{GAP}{checkpoint['unused_tensors']} tensors that belong to no network; not used"
    for damage in checkpoint["damage"]:
        severity = "damaged" if damage["matters"] else "damaged, but harmless"
        tensors = f" {listed(damage['tensors'])}" if damage["tensors"] else ""
        meaning = printable(damage["meaning"], 1000)
        yield f"{GAP}{severity}: {damage['component']}, {damage['kind']}{tensors} ({meaning})"


def _lora(lora) -> str:
    layers = ", ".join(f"{count} of {network}" for network, count in lora["networks"].items())
    kinds, ranks = ", ".join(lora["kinds"]), lora["ranks"]
    rank = ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks)) if ranks else "no rank"
    file = printable(lora["file"])
    return (
        f"{kinds} {file} * {lora['weight']:g}: {rank}, tensors: {layers}; hash {lora['hash']}, SHA-256 {lora['sha256']}"
    )


def _verdict(report) -> str:
    base, *teachers = (printable(checkpoint["name"]) for checkpoint in report["checkpoints"])
    if report["mergeable"]:
        text = f"These checkpoints can be merged on {base}: {', '.join(teachers)}" if teachers else f"{base} is sound"
        sampled = any(checkpoint["read"] == SAMPLE for checkpoint in report["checkpoints"])
        return text + (", as far as it was read." if sampled else ".")
    alone = f"{base} is a sound adapter:" if report["sound"] else f"{base} cannot be used:"
    heading = "These checkpoints cannot be merged:" if teachers else alone
    return "\n".join([heading, *(f"{GAP}- {sentence}" for sentence in report["obstacles"])])
