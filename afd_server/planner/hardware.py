"""What cards can do and cost: data/hardware.yaml, and a file of the user's beside it.

What lives here: the table and its checks. What does not: what a model does on a card (cost.py, roofline.py).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afd_server.errors import ConfigError
from afd_server.planner.yaml_file import read_yaml

BUILT_IN = Path(__file__).parent / "data" / "hardware.yaml"
NUMBERS = ("usd_per_hour", "bytes_per_s", "memory_bytes", "network_gbps")
DTYPES = ("float32", "bfloat16", "fp8")


@dataclass(frozen=True)
class Hardware:
    """One card, or a server without one. flops: dense, by type. sources: of every number, by its key."""

    name: str
    usd_per_hour: float
    flops: Mapping[str, float]
    bytes_per_s: float
    memory_bytes: float
    network_gbps: float
    sources: Mapping[str, str]

    def flop_per_s(self, dtype: str) -> float:
        """With operands of this type, or of the next larger one that the card has."""
        for larger in DTYPES[DTYPES.index(dtype) :: -1]:
            if larger in self.flops:
                return self.flops[larger]
        return max(self.flops.values())  # float32 is asked of a card that names smaller ones only

    @property
    def network_bytes_per_s(self) -> float:
        return self.network_gbps * 1e9 / 8

    @property
    def usd_per_s(self) -> float:
        return self.usd_per_hour / 3600

    def several(self, cards: int) -> Hardware:
        """So many cards that work as one."""
        return dataclasses.replace(
            self,
            name=f"{cards} x {self.name}",
            usd_per_hour=self.usd_per_hour * cards,
            flops={dtype: flops * cards for dtype, flops in self.flops.items()},
            bytes_per_s=self.bytes_per_s * cards,
            memory_bytes=self.memory_bytes * cards,
            network_gbps=self.network_gbps * cards,
        )


def read_hardware(extra: Path | None = None, network_gbps: float | None = None) -> dict[str, Hardware]:
    """Every known card by name, those of `extra` over the built-in ones. network_gbps: in place of each one's own.

    Raises ConfigError, naming file, card and key.
    """
    cards = _read_file(BUILT_IN)
    if extra is not None:
        cards |= _read_file(extra)
    if network_gbps is not None:
        source = {"network_gbps": "--network-gbps"}
        cards = {
            name: dataclasses.replace(card, network_gbps=network_gbps, sources={**card.sources, **source})
            for name, card in cards.items()
        }
    return cards


def choose(cards: Mapping[str, Hardware], names: Sequence[str]) -> dict[str, Hardware]:
    """Some of the cards, in the order of `names`; all of them without names. Raises ConfigError, with a near name."""
    chosen = {}
    for name in names or cards:
        key = name.strip().lower().replace("_", "-").replace(" ", "-")
        if key not in cards:
            near = difflib.get_close_matches(key, cards, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError("--hardware", f"unknown card {name!r}", f"{hint}known: {', '.join(cards)}; "
                              "others by --hardware-file")  # fmt: skip
        chosen[key] = cards[key]
    return chosen


def _read_file(path: Path) -> dict[str, Hardware]:
    values = read_yaml(path)
    if not isinstance(values, dict) or not values:
        raise ConfigError(str(path), "does not hold cards by name")
    return {str(name).lower(): _card(str(name).lower(), given, path) for name, given in values.items()}


def _card(name: str, given: Any, path: Path) -> Hardware:
    where = f"{path}: {name}"
    if not isinstance(given, dict):
        raise ConfigError(where, "is not a card's numbers by key")
    known = {*NUMBERS, "flops", "sources"}
    for key in (*NUMBERS, "flops"):
        if key not in given:
            raise ConfigError(where, f"{key} is missing")
    unknown = sorted(map(str, set(given) - known))
    if unknown:
        raise ConfigError(where, f"{unknown[0]} is unknown", f"known: {', '.join(sorted(known))}")
    flops = given["flops"]
    if not isinstance(flops, dict) or not flops or set(flops) - set(DTYPES):
        raise ConfigError(where, f"flops is {flops!r}, not FLOP/s by type", f"types: {', '.join(DTYPES)}")
    sources = given.get("sources") or {}
    if not isinstance(sources, dict):
        raise ConfigError(where, f"sources is {sources!r}, not texts by key")
    return Hardware(
        name,
        **{key: _number(given[key], f"{where}: {key}") for key in NUMBERS},
        flops={dtype: _number(value, f"{where}: flops {dtype}") for dtype, value in flops.items()},
        sources={str(key): str(text) for key, text in sources.items()},
    )


def _number(value: Any, where: str) -> float:
    """YAML takes 9.89e14 for a text: it wants a sign in the exponent."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not 0 < number < math.inf:
        raise ConfigError(where, f"is {value!r}, not a number above 0")
    return number
