"""Hugging Face data sets that `save_to_disk` wrote: Arrow files whose images are read at their place in the file."""

from collections.abc import Iterator, Sequence

import numpy as np

from dmm_jax.data.captions import CAPTION_KEYS, clean_caption
from dmm_jax.data.files import DataFile, open_regular
from dmm_jax.runtime.errors import UserError


def read_table(table: DataFile, columns: Sequence[str] = ()) -> Iterator[tuple[DataFile | None, str, dict]]:
    """Yields (image, caption, row) of each row; the image is None if the file does not hold its bytes.

    The column `image` has the files' bytes; `caption`, `text` or `prompt` has the caption.

    Args:
      columns: further columns that the rows must have.

    Raises:
      UserError: the file is damaged, or has other columns; or the package pyarrow is missing.
    """
    with open_regular(table.path):
        pass
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(f"{table.path} needs the package pyarrow: pip install pyarrow") from error
    try:
        with pyarrow.memory_map(str(table.path)) as stream:
            contents = stream.read_buffer()
            reader = pyarrow.ipc.open_stream(contents)
            names = reader.schema.names
            caption_key = next((key for key in CAPTION_KEYS if key in names), None)
            if "image" not in names or caption_key is None:
                raise UserError(
                    f"{table.path} has the columns {', '.join(names)[:200]}: expected image, and caption, text or "
                    "prompt."
                )
            missing = [name for name in columns if name not in names]
            if missing:
                raise UserError(f"{table.path} has no column {missing[0]!r}; it has {', '.join(names)[:200]}.")
            number = 0
            for batch in reader:
                images = _place_images(batch.column("image"), contents, table)
                wanted = batch.select([caption_key, *columns]).to_pylist()
                for image, row in zip(images, wanted, strict=True):
                    caption = clean_caption(str(row[caption_key] or ""), f"{table.path}, row {number}")
                    yield image and image._replace(name=f"{table.name}/{number}{image.name}"), caption, row
                    number += 1
    except (pyarrow.ArrowException, OSError, AttributeError) as error:
        raise UserError(f"{table.path} is not an Arrow file of images ({str(error)[:200]}). Write it again.") from error


def _place_images(column, contents, table: DataFile) -> Iterator[DataFile | None]:
    """Yields the place of each image's bytes in the file; names are their endings."""
    values, paths = column.field("bytes"), column.field("path")
    _, offsets, data = values.buffers()
    width = np.int64 if str(values.type).startswith("large") else np.int32
    ends = np.frombuffer(offsets, width)[values.offset : values.offset + len(values) + 1]
    first = data.address - contents.address
    for row in range(len(values)):
        if not values[row].is_valid or not 0 <= first <= first + int(ends[row + 1]) <= contents.size:
            yield None
            continue
        path = str(paths[row].as_py() or "")
        suffix = path[path.rfind(".") :] if "." in path else ""
        yield DataFile(table.path, suffix, int(ends[row + 1] - ends[row]), first + int(ends[row]))
