"""What a run has shown: a table for people, one line of JSON for machines."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.chaos.clients import Told
from tests.chaos.faults import Done
from tests.chaos.schedule import Kind


@dataclass(slots=True)
class Report:
    """One or several runs. wrong: a sentence for each request that failed or got other tokens than it should, for each
    fault the server did not recover from, and for each thing it did not give back."""

    faults: list[Done] = field(default_factory=list)
    requests: list[Told] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def add(self, other: Report) -> None:
        self.faults += other.faults
        self.requests += other.requests
        self.wrong += other.wrong

    def table(self) -> str:
        """A line for each kind of fault, then the whole."""
        by_kind: dict[str, list[Done]] = defaultdict(list)
        for done in self.faults:
            by_kind[done.fault.kind].append(done)
        rows = [("fault", "times", "kills", "detected max", "recovered p50", "p99", "max")]
        rows += [_row(kind, by_kind[kind]) for kind in Kind if kind in by_kind]
        rows.append(_row("all", self.faults))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        lines.append(f"{len(self.requests)} requests, longest pause of a stream {self.longest_pause_s:.2f} s")
        if any(done.fault.kills_front_end for done in self.faults):
            lines.append(f"{self.num_cut} streams were cut by a killed front-end, and asked for again")
        lines.append(f"{len(self.wrong)} failures" + "".join(f"\n  {sentence}" for sentence in self.wrong[:20]))
        return "\n".join(lines)

    @property
    def num_cut(self) -> int:
        return sum(len(told.cut) for told in self.requests)

    @property
    def longest_pause_s(self) -> float:
        return max((told.longest_pause_s for told in self.requests), default=0.0)

    def line(self) -> str:
        recovered = _recovered(self.faults)
        return json.dumps({
            "faults": len(self.faults),
            "requests": len(self.requests),
            "failures": len(self.wrong),
            "cut_streams": self.num_cut,
            "longest_pause_s": round(self.longest_pause_s, 3),
            "detected_max_s": _rounded(max(_detected(self.faults), default=None)),
            "recovery_p50_s": _rounded(percentile(recovered, 50)),
            "recovery_p99_s": _rounded(percentile(recovered, 99)),
        })  # fmt: skip


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The least value that at least so many percent of them do not exceed; None of none."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def _row(name: str, faults: Sequence[Done]) -> tuple[str, ...]:
    recovered = _recovered(faults)
    times = [max(_detected(faults), default=None), percentile(recovered, 50), percentile(recovered, 99)]
    times.append(max(recovered, default=None))
    shown = ["" if value is None else f"{value:.2f} s" for value in times]
    return (name, str(len(faults)), str(sum(len(done.killed) for done in faults)), *shown)


def _recovered(faults: Sequence[Done]) -> list[float]:
    return [done.recovered_s for done in faults if done.recovered_s is not None]


def _detected(faults: Sequence[Done]) -> list[float]:
    return [done.detected_s for done in faults if done.detected_s is not None]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
