"""Requests over time: arrival processes, lengths, and traces of real services, read from CSV files.

What lives here: when requests come and how long they are. What does not: what they say, and who serves them. Called by
bench, which sends them, and by the simulator, which only imagines them.

Two formats of traces are known, by the names of their columns; others that a file has besides are ignored:

    Azure LLM inference traces (2023 and 2024)    TIMESTAMP, ContextTokens, GeneratedTokens
    BurstGPT                                      Timestamp, Request tokens, Response tokens
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from afd_server.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: when it comes, in seconds from the first one's, and its lengths."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


# Time, tokens of the prompt, tokens of the output.
TRACE_COLUMNS = (
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    ("Timestamp", "Request tokens", "Response tokens"),
)


def read_trace(path: Path, most: int | None = None) -> list[Arrival]:
    """The first `most` requests of a trace, in the order of their times, from 0 s on.

    Rows without a prompt or an answer are left out: BurstGPT's failures. Raises ConfigError naming file and line.
    """
    found: list[Arrival] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            columns = _columns_of(path, rows.fieldnames or ())
            for row in rows:
                arrival = _arrival(path, rows.line_num, [row[column] for column in columns])
                if arrival.prompt_tokens > 0 and arrival.output_tokens > 0:
                    found.append(arrival)
                if len(found) == most:
                    break
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(str(path), f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not found:
        raise ConfigError(str(path), "holds no request with a prompt and an answer")
    found.sort(key=lambda arrival: arrival.at_s)
    return [replace(arrival, at_s=arrival.at_s - found[0].at_s) for arrival in found]


def _columns_of(path: Path, header: object) -> tuple[str, str, str]:
    names = set(header) if isinstance(header, list) else set()
    for columns in TRACE_COLUMNS:
        if names.issuperset(columns):
            return columns
    known = " nor ".join(", ".join(columns) for columns in TRACE_COLUMNS)
    raise ConfigError(str(path), f"has neither the columns {known}")


def _arrival(path: Path, line: int, cells: list[str | None]) -> Arrival:
    try:
        time, prompt, output = (cell or "" for cell in cells)
        return Arrival(_seconds(time), _tokens(prompt), _tokens(output))
    except ValueError as error:
        raise ConfigError(str(path), f"line {line}: {error}") from None


def _seconds(cell: str) -> float:
    """BurstGPT counts seconds, Azure writes dates, which are UTC where they do not say."""
    try:
        seconds = float(cell)
    except ValueError:
        moment = datetime.fromisoformat(cell)
        seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if not math.isfinite(seconds):
        raise ValueError(f"{cell!r} is no time")
    return seconds


def _tokens(cell: str) -> int:
    number = float(cell)  # pandas writes whole numbers as 12.0 where a column had gaps
    if not number.is_integer() or number < 0:
        raise ValueError(f"{cell!r} is no number of tokens")
    return int(number)


def arrival_times(rate: float, burstiness: float, generator: random.Random) -> Iterator[float]:
    """Seconds from the start at which requests come, without end: `rate` a second on average.

    burstiness: shape of the gamma distribution of the intervals, as vLLM's benchmark has it. 1 is a Poisson process, less
    comes in bursts, more comes evenly, inf at equal intervals.
    """
    now_s = 0.0
    while True:
        if math.isinf(burstiness):
            now_s += 1.0 / rate
        else:
            now_s += generator.gammavariate(burstiness, 1.0 / (rate * burstiness))
        yield now_s


def length_between(mean: int, range_ratio: float, generator: random.Random) -> int:
    """A number of tokens, evenly from mean * (1 - range_ratio) to mean * (1 + range_ratio), at least 1."""
    least, greatest = math.floor(mean * (1 - range_ratio)), math.ceil(mean * (1 + range_ratio))
    return max(1, generator.randint(least, greatest))
