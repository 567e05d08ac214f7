"""Prompts without images: reading them, and which teacher draws which with which seed."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from dmm_jax.runtime.errors import UserError

MAX_FILE_BYTES = 2**28
MAX_LINE_CHARS = 100_000


def read_prompts(path: str | pathlib.Path) -> list[str]:
    """Reads a text file of prompts, one a line; empty lines are passed over.

    Raises:
        ValueError: the file is missing, too large, no UTF-8 text, has an overlong line, or holds no prompt.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"there is no prompt file {path}. Give a text file with one prompt a line.")
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise UserError(f"{path} has {size} bytes; at most {MAX_FILE_BYTES} are read. Give fewer prompts.")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8.") from None
    for number, line in enumerate(lines, start=1):
        if len(line) > MAX_LINE_CHARS:
            raise UserError(f"{path}, line {number}: more than {MAX_LINE_CHARS} characters. Write one prompt a line.")
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(f"{path} holds no prompt. Write one a line.")
    return lines


class Draw(NamedTuple):
    """One picture to draw."""

    prompt: str
    teacher: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Draws:
    """`count` pictures over prompts and teachers; the k-th follows from k and the seed alone.

    Prompt k mod P, teacher k mod N, seed + k, so that `dmm-jax sample --seed` draws the same. Each time prompts and
    teachers fall together again the teachers move on by one, so that every teacher gets every prompt in the end. Shares
    of teachers, and of prompts, differ by one picture at most.
    """

    prompts: Sequence[str]
    num_teachers: int
    count: int
    seed: int = 0

    def __post_init__(self):
        if self.count < 1:
            raise UserError(f"expected a positive number of pictures to draw; got {self.count}. Set num_examples.")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Draw:
        if not 0 <= index < self.count:
            raise IndexError(index)
        rounds = index // math.lcm(len(self.prompts), self.num_teachers)
        teacher = (index + rounds) % self.num_teachers
        return Draw(self.prompts[index % len(self.prompts)], teacher, self.seed + index)
