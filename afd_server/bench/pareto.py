"""Servers under growing loads: points of tokens a second against time per token, and which of them are best.

What lives here: the points, the front, results of earlier sweeps. What does not: the picture (plot.py), how a load is put on
a server (probe.py). Called by command.py.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from afd_server.bench.client import BenchError, Target
from afd_server.bench.dataset import DatasetSettings
from afd_server.bench.session import Session, opened
from afd_server.errors import ConfigError

HEADS = f"{'server':<16} {'clients':>7} {'output tok/s':>13} {'TPOT p50 ms':>12} {'p99':>8} {'TTFT p50 ms':>12} {'failed':>7}"


@dataclass(frozen=True)
class Point:
    """One server under one load. Times are medians over its requests."""

    server: str
    max_concurrency: int
    output_throughput: float
    median_tpot_ms: float
    p99_tpot_ms: float
    median_ttft_ms: float
    failed: int

    @classmethod
    def of(cls, server: str, summary: Mapping[str, Any]) -> Self:
        """Raises BenchError."""
        if summary["median_tpot_ms"] is None:
            raise BenchError(f"{server}: answers of a single token have no time per token")
        names = [field.name for field in fields(cls) if field.name != "server"]
        values: dict[str, Any] = {name: summary[name] for name in names}
        return cls(server, **values)

    def line(self) -> str:
        return (f"{self.server:<16} {self.max_concurrency:>7} {self.output_throughput:>13.1f} {self.median_tpot_ms:>12.1f} "
                f"{self.p99_tpot_ms:>8.1f} {self.median_ttft_ms:>12.0f} {self.failed:>7}")  # fmt: skip


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other one beats in tokens a second and in time per token at once, from the fastest token on."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.median_tpot_ms, -point.output_throughput)):
        if not best or point.output_throughput > best[-1].output_throughput:
            best.append(point)
    return best


def by_server(points: Sequence[Point]) -> dict[str, list[Point]]:
    """In the order in which they come, each by load."""
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(point.server, []).append(point)
    return {name: sorted(own, key=lambda point: point.max_concurrency) for name, own in found.items()}


def result(points: Sequence[Point]) -> list[dict[str, Any]]:
    """is_best: on the front of all servers together."""
    best = set(front(points))
    return [{**asdict(point), "is_best": point in best} for point in points]


def read(file: Path) -> list[Point]:
    """The points of a saved result. Raises ConfigError."""
    names = [field.name for field in fields(Point)]
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        return [Point(**{name: point[name] for name in names}) for point in saved["points"]]
    except OSError as error:
        raise ConfigError("--with", f"cannot read {file}: {error.strerror}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError("--with", f"{file} is not a result of `afd bench pareto`") from error


def check_names(names: Sequence[str]) -> None:
    """Raises ConfigError where two servers have one name."""
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                "--server", f"two are called {name!r}", "give each a name: NAME=URL, or --label NAME"
            )


@asynccontextmanager
async def all_opened(
    targets: Mapping[str, Target], settings: DatasetSettings, tokenizer: str | None
) -> AsyncIterator[dict[str, Session]]:
    """A session with each server. Raises BenchError."""
    async with AsyncExitStack() as stack:
        yield {
            name: await stack.enter_async_context(opened(target, settings, tokenizer))
            for name, target in targets.items()
        }
