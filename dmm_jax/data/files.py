"""Lists the files of a data folder or a tar file, and counts those that are not used."""

import collections
import io
import os
import pathlib
import stat
import tarfile
from typing import NamedTuple

from dmm_jax.runtime.errors import UserError

IGNORED = "ignored by name"
IGNORED_NAMES = (".ds_store", "thumbs.db", "desktop.ini")  # And "._*", which macOS writes next to every file.
MAX_NAME_CHARS = 1000  # Of a member of a tar file, whose format has no bound.


class DataFile(NamedTuple):
    """The place of a file, which may be a part of a tar file."""

    path: pathlib.Path
    name: str  # Relative to the data folder; TAR/MEMBER for a part of a tar file.
    size: int  # Bytes.
    offset: int = 0

    @property
    def stem(self) -> str:
        """The name without its ending."""
        return os.path.splitext(self.name)[0]

    @property
    def suffix(self) -> str:
        """The ending in lower case, with its dot."""
        return os.path.splitext(self.name)[1].lower()

    def read(self) -> bytes:
        """Returns the file's contents."""
        with self.path.open("rb") as stream:
            stream.seek(self.offset)
            return stream.read(self.size)


class Unused:
    """How many files are not used, by reason, with the first example of each reason."""

    def __init__(self):
        """Counts nothing yet."""
        self.counts: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, str] = {}

    def add(self, reason: str, example: str = "", count: int = 1) -> None:
        """Counts files that are not used for one reason."""
        self.counts[reason] += count
        self.examples.setdefault(reason, example)

    def lines(self, but: str = "") -> list[str]:
        """Returns one line for each reason except `but`, the most frequent reason first."""
        examples = {reason: f", for example {name!r}" if name else "" for reason, name in self.examples.items()}
        counts = self.counts.most_common()
        return [f"{count:9,d} not used: {reason}{examples[reason]}" for reason, count in counts if reason != but]


def open_regular(path: pathlib.Path) -> io.BufferedReader:
    """Opens a file for reading bytes.

    Raises:
        UserError: it is missing or not a regular file: a FIFO blocks for ever, a device may have no end.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path} is missing or not a regular file. Give a regular file.")
    return path.open("rb")


def list_folder(folder: pathlib.Path, unused: Unused) -> list[DataFile]:
    """Returns the regular files below a folder, sorted by path; counts the other entries as unused."""
    files, folders = [], [folder]
    while folders:  # os.walk calls itself for every level, and a folder may have thousands of them.
        parent = folders.pop()
        try:
            names = os.listdir(parent)
        except OSError:
            unused.add("folder that cannot be read", os.path.relpath(parent, folder))
            continue
        for path in (parent / name for name in names):
            name = str(path.relative_to(folder))
            try:
                mode, size = (status := path.stat()).st_mode, status.st_size
            except OSError:
                mode, size = 0, 0
            if stat.S_ISDIR(mode):
                if path.is_symlink():
                    unused.add("link to a folder", name)
                else:
                    folders.append(path)
            elif path.name.startswith("._") or path.name.lower() in IGNORED_NAMES:
                unused.add(IGNORED, name)
            elif not stat.S_ISREG(mode):
                unused.add("not a regular file", name)
            elif path.is_symlink() and not path.resolve().is_relative_to(folder):
                unused.add("link to a file outside the folder", name)
            else:
                files.append(DataFile(path, name, size))
    return sorted(files)


def list_tar(tar: DataFile, unused: Unused) -> list[DataFile]:
    """Returns the files in a tar file, in its order; counts links, devices and members outside its root as unused.

    Nothing is extracted: a member is read at its offset.

    Raises:
        UserError: the tar file is compressed or damaged.
    """
    files = []
    with open_regular(tar.path) as stream:
        try:
            for member in (archive := tarfile.open(fileobj=stream, mode="r:")):
                name = f"{tar.name}/{member.name}"
                if len(member.name) > MAX_NAME_CHARS:
                    unused.add("tar member with an overlong name", name[:100])
                elif ".." in pathlib.PurePath(member.name).parts or member.name.startswith("/"):
                    unused.add("tar member outside the tar's root", name)
                elif not member.isreg() or member.issparse():
                    if not member.isdir():
                        unused.add("tar member that is not a regular file", name)
                else:
                    files.append(DataFile(tar.path, name, member.size, member.offset_data))
            stream.seek(archive.offset)
            if any(stream.read(tarfile.BLOCKSIZE)):  # tarfile stops in silence where a later header is damaged.
                raise tarfile.ReadError(f"no header at byte {archive.offset}")
        except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
            raise UserError(f"{tar.path} is damaged or compressed ({error}). Write it again, uncompressed.") from error
    return files
