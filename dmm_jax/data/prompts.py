"""Prompts without images: reads them from a file, and assigns a teacher and a seed to each picture to draw."""

import dataclasses
import io
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dmm_jax.data.captions import clean_caption, text_lines
from dmm_jax.data.files import open_regular
from dmm_jax.runtime.errors import UserError


def read_prompts(path: str | pathlib.Path) -> list[str]:
    """Reads a text file, or standard input for "-", with one prompt per line; empty lines are skipped.

    Raises:
        ValueError: the file is missing, not UTF-8 or UTF-16 text, has an overlong line, or has no prompt.
    """
    path = pathlib.Path(path)
    is_stdin = str(path) == "-"
    if not is_stdin and not path.exists():
        raise UserError(f"there is no prompt file {path}. Give a text file with one prompt per line.")
    with io.BytesIO(sys.stdin.buffer.read()) if is_stdin else open_regular(path) as stream:
        prompts = [clean_caption(line, place) for place, line in text_lines(stream, str(path))]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise UserError(f"{path} holds no prompt. Write one per line.")
    return prompts


class Draw(NamedTuple):
    """One picture to draw."""

    prompt: str
    teacher: int
    seed: int
    bucket: int


@dataclasses.dataclass(frozen=True)
class Draws:
    """The prompt, teacher and seed of each of `count` pictures; picture k depends only on k and `seed`.

    With P prompts and N teachers, picture k has prompt k mod P, seed `seed` + k (as in `dmm-jax sample --seed`) and
    teacher (k + r) mod N, where r counts the complete rounds of lcm(P, N) pictures. Without r, a teacher would only
    ever draw some of the prompts. All teachers draw equally many pictures, up to one; all prompts are drawn equally
    often, up to one. Each picture has a random bucket.
    """

    prompts: Sequence[str]
    num_teachers: int
    count: int
    seed: int = 0
    num_buckets: int = 1

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
        bucket = int(np.random.default_rng([self.seed, index]).integers(self.num_buckets))
        return Draw(self.prompts[index % len(self.prompts)], teacher, self.seed + index, bucket)
