"""How every `afd` command takes its flags: one clear line for a mistake, and a near name for a mistyped one.

What lives here: the parser that cli and the commands of single rooms share, and the checks of common kinds of values. What does
not: any flag.
"""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Mapping
from typing import Any, NoReturn

USAGE_ERROR = 2
# Nothing that is counted or measured here is larger.
MOST = 1e9


class Parser(argparse.ArgumentParser):
    """argparse with one line for a mistake. called_here: what a flag known from elsewhere is called in this project."""

    def __init__(self, *args: Any, called_here: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        kwargs["allow_abbrev"] = False
        super().__init__(*args, **kwargs)
        self._called_here = called_here or {}

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: {message}. See {self.prog} --help\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            mine = [name for action in self._actions for name in action.option_strings]
            name = unknown[0].split("=")[0]
            near = self._called_here.get(name) or next(iter(difflib.get_close_matches(name, mine, n=1)), None)
            self.error(f"unknown argument {unknown[0]!r}" + (f" (did you mean {near}?)" if near else ""))
        return known


# --- values: what a flag's `type` may be ----------------------------------------------------------------------------


def whole(text: str) -> int:
    if not text.isdecimal() or not 1 <= float(text) <= MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def whole_or_none(text: str) -> int:
    return 0 if text == "0" else whole(text)


def positive(text: str) -> float:
    value = number(text)
    if not 0 < value <= MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def not_negative(text: str) -> float:
    value = number(text)
    if not 0 <= value <= MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 up")
    return value


def number(text: str) -> float:
    """NaN for what is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan
