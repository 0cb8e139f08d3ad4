"""A number together with how it comes about, so that what is shown is what was computed.

What lives here: that pair. What does not: any formula (attention_kinds.py, ffn_kinds.py and counts.py hold them).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

NAME = re.compile(r"[a-z_]+")
FUNCTIONS = {"min": min}


@dataclass(frozen=True)
class Formula:
    """Sums, products and minima of named numbers. text is written in this package, never read from a file."""

    text: str
    numbers: tuple[tuple[str, int], ...]

    @cached_property
    def value(self) -> int:
        return int(eval(self.text, {"__builtins__": {}}, {**FUNCTIONS, **dict(self.numbers)}))

    def __str__(self) -> str:
        """`heads * head_dim = 64 * 128 = 8192`."""
        numbers = dict(self.numbers)
        filled = NAME.sub(lambda match: str(numbers.get(match[0], match[0])), self.text)
        shown = f"{self.value:,}" if self.value < 1e7 else f"{self.value:.4g}"
        return " = ".join(dict.fromkeys((self.text, filled, shown)))


def formula(text: str, **numbers: int) -> Formula:
    return Formula(text, tuple(numbers.items()))


NOTHING = formula("0")
