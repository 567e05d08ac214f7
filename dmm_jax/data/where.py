"""Conditions on the columns of a data set, such as "aesthetic > 6 and width >= 512"."""

import operator
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from dmm_jax.runtime.errors import UserError

OPERATORS = {
    "<=": operator.le, ">=": operator.ge, "==": operator.eq, "!=": operator.ne, "<": operator.lt, ">": operator.gt,
}  # fmt: skip
_TERM = re.compile(r"\s*(\w+)\s*(<=|>=|==|!=|<|>)\s*(?:(-?\d+(?:\.\d+)?)|'([^']*)')\s*")


class Term(NamedTuple):
    """One comparison of a column with a number or a text."""

    column: str
    sign: str
    value: float | str


class Where:
    """The terms of a condition, all of which a row must fulfil; without a text every row does."""

    def __init__(self, text: str):
        """Reads a condition.

        Raises:
          UserError: it is not COLUMN SIGN VALUE, joined by "and".
        """
        self.text, self.terms = text.strip(), []
        for part in re.split(r"\band\b", self.text) if self.text else []:
            if not (match := _TERM.fullmatch(part)):
                raise UserError(
                    f"data.where cannot be read at {part.strip()!r}: write COLUMN > NUMBER (or <, <=, >=, ==, !=), or "
                    "COLUMN == 'text', joined by 'and'."
                )
            column, sign, number, quoted = match.groups()
            self.terms.append(Term(column, sign, quoted if number is None else float(number)))

    def __bool__(self) -> bool:
        return bool(self.terms)

    @property
    def columns(self) -> list[str]:
        """Returns the names of the columns."""
        return [term.column for term in self.terms]

    def reason(self, row: Mapping[str, Any]) -> str:
        """Returns why a row is not wanted, or ""."""
        for column, sign, expected in self.terms:
            value = row.get(column)
            if isinstance(expected, float):
                try:
                    value = float(value)
                except (TypeError, ValueError):
                    return f"without a number {column!r}"
            elif not isinstance(value, str):
                return f"without a text {column!r}"
            if not OPERATORS[sign](value, expected):
                return f"not {column} {sign} {expected!r}"
        return ""
