"""Who did what when, for the picture of a few steps.

What lives here: the record. What does not: the drawing (plots.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Span:
    """lane: whose time it is. hop: the layer."""

    lane: str
    began_s: float
    ended_s: float
    micro_batch: int
    hop: int


@dataclass
class Spans:
    """Of the time between two moments only: a run has millions."""

    from_s: float
    to_s: float
    spans: list[Span] = field(default_factory=list)

    def add(self, lane: str, began_s: float, ended_s: float, micro_batch: int, hop: int) -> None:
        if self.from_s <= began_s < self.to_s:
            self.spans.append(Span(lane, began_s, ended_s, micro_batch, hop))
