"""The highest load under which a server keeps its promises.

What lives here: the search, which knows loads and whether they hold, and what is said of its end. How a load is put on a
server is probe.py's business. Called by command.py.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from afd_server.bench.dataset import DatasetSettings
from afd_server.bench.probe import Prober

VARIABLES = ("max_concurrency", "request_rate")
HEADS = f"{'load':>9} {'output tok/s':>13} {'requests':>9} {'failed':>7} {'TTFT ms':>9} {'TPOT ms':>9}   holds"
LONGEST_ANSWER_TOKENS = 2048  # where a file says how long answers are


@dataclass(frozen=True)
class Promises:
    """Milliseconds; percentile: of the requests, for each promise. Whoever fails has broken them all."""

    tpot_ms: float
    ttft_ms: float | None
    percentile: float

    def hold(self, summary: dict[str, Any]) -> bool:
        if summary["failed"]:
            return False
        return self.tpot(summary) <= self.tpot_ms and (
            self.ttft_ms is None or self.ttft(summary) <= self.ttft_ms
        )

    def tpot(self, summary: dict[str, Any]) -> float:
        """0 where every answer was a single token."""
        return summary[f"p{self.percentile:g}_tpot_ms"] or 0.0

    def ttft(self, summary: dict[str, Any]) -> float:
        return float(summary[f"p{self.percentile:g}_ttft_ms"])

    def patience_s(self, settings: DatasetSettings) -> float | None:
        """After so long a request has broken its promises anyway. None without a promise for the first token."""
        if self.ttft_ms is None:
            return None
        longest = settings.random_output_len * (1 + settings.random_range_ratio)
        tokens = longest if settings.dataset_name == "random" else LONGEST_ANSWER_TOKENS
        return 2 * (self.ttft_ms + tokens * self.tpot_ms) / 1e3


def halfway(low: float, high: float, tolerance: float) -> float | None:
    """A rate between two, None where they are near enough."""
    return None if high <= low * (1 + tolerance) else math.sqrt(low * high)


def whole_halfway(low: float, high: float, tolerance: float) -> float | None:
    """A whole number between two, None where there is none or they are near enough."""
    return None if high - low <= max(1.0, tolerance * low) else (low + high) // 2


async def highest(
    holds: Callable[[float], Awaitable[bool]],
    first: float,
    most: float,
    between: Callable[[float, float], float | None],
) -> float | None:
    """The highest load found to hold, twice; None when not even the first does.

    Doubles the load until it does not hold or `most` is reached, goes to the middle until `between` is content, then tries
    the best again: measurements scatter, and the best of many was lucky. One that fails then bounds the search from above.
    """
    held: list[float] = []
    limit: float | None = None
    load = first
    while limit is None and (not held or held[-1] < most):
        if await holds(load):
            held.append(load)
            load = min(most, 2 * load)
        else:
            limit = load
    while held:
        middle = None if limit is None else between(held[-1], limit)
        load = held[-1] if middle is None else middle
        if await holds(load):
            if middle is None:
                return load
            held.append(load)
        else:
            limit = load
            if middle is None:
                held.pop()
    return None


@dataclass
class Search:
    """One search on one server, and all that it measured."""

    prober: Prober
    promises: Promises
    variable: str
    most: float
    tolerance: float
    alone: dict[str, Any] | None = None  # the least load: one client
    best: dict[str, Any] | None = None
    probes: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        percentiles = {*self.prober.percentiles, self.promises.percentile}
        self.prober.percentiles = tuple(sorted(percentiles))

    async def run(self) -> None:
        """Raises BenchError when the server cannot be measured."""
        load: float | None = None
        if self.variable == "max_concurrency":
            load = await highest(self._holds, 1, max(1.0, self.most // 1), self._whole_halfway)
        else:
            self.alone = await self.prober.closed(1)
            if self._told("1 client", self.alone):  # its rate is one to begin with
                first = min(1e3 / self.alone["median_e2el_ms"], self.most)
                load = await highest(self._holds, first, self.most, self._halfway)
        if load is not None:
            self.best = next(probe for probe in reversed(self.probes) if probe["load"] == load)

    async def _holds(self, load: float) -> bool:
        if self.variable == "max_concurrency":
            summary = await self.prober.closed(int(load))
        else:
            summary = await self.prober.open(load)
        holds = self._told(f"{load:.4g}", summary)
        self.alone = self.alone or summary
        self.probes.append({"load": load, "holds": holds, **summary})
        return holds

    def _told(self, load: str, summary: dict[str, Any]) -> bool:
        holds = self.promises.hold(summary)
        print(f"{load:>9} {summary['output_throughput']:>13.1f} {summary['completed']:>9} {summary['failed']:>7} "
              f"{self.promises.ttft(summary):>9.1f} {self.promises.tpot(summary):>9.1f}   {'yes' if holds else 'no'}",
              flush=True)  # fmt: skip
        return holds

    def _halfway(self, low: float, high: float) -> float | None:
        return halfway(low, high, self.tolerance)

    def _whole_halfway(self, low: float, high: float) -> float | None:
        return whole_halfway(low, high, self.tolerance)

    @property
    def fastest(self) -> dict[str, Any] | None:
        """The probe with the most tokens a second of those that hold. Beyond it, more load only waits longer."""
        holding = [probe for probe in self.probes if probe["holds"]]
        return max(holding, key=lambda probe: probe["output_throughput"], default=None)

    def verdict(self) -> str:
        """One sentence. Where nothing holds: what is in the way, and what could be promised instead."""
        what = {"max_concurrency": "clients", "request_rate": "requests/s"}[self.variable]
        if self.best is not None and self.fastest is not None:
            reached = "" if self.best["load"] < self.most else ", the most that was tried (--max-load)"
            return (
                f"highest load that holds: {self.best['load']:.4g} {what}{reached}, "
                f"{self.best['output_throughput']:.1f} output tokens/s; most tokens while it holds: "
                f"{self.fastest['output_throughput']:.1f}/s at {self.fastest['load']:.4g}"
            )
        alone = self.alone
        assert alone is not None
        if alone["failed"]:
            kind = next(iter(alone["errors"]))
            return f"no load holds: {alone['failed']} requests of one client alone failed: {kind}: {alone['error_messages'][kind]}"
        needed = f"--tpot-sla-ms {math.ceil(self.promises.tpot(alone))}"
        if self.promises.ttft_ms is not None:
            needed += f" --ttft-sla-ms {math.ceil(self.promises.ttft(alone))}"
        share = f"{self.promises.percentile:g} %"
        return f"no load holds; what {share} of the requests keep for one client alone is {needed}"

    def result(self) -> dict[str, Any]:
        kept = ("load", "holds", "output_throughput", "request_throughput", "completed", "failed", "errors", "duration",
                f"p{self.promises.percentile:g}_tpot_ms", f"p{self.promises.percentile:g}_ttft_ms")  # fmt: skip
        return {
            "tpot_sla_ms": self.promises.tpot_ms, "ttft_sla_ms": self.promises.ttft_ms,
            "sla_percentile": self.promises.percentile, "workload_var": self.variable,
            "highest_load": self.best["load"] if self.best else None,
            "output_throughput": self.best["output_throughput"] if self.best else None,
            "fastest_load": self.fastest["load"] if self.fastest else None, "best": self.best,
            "probes": [{name: probe[name] for name in kept} for probe in self.probes],
        }  # fmt: skip
