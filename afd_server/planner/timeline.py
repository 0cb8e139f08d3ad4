"""One step, played through: when each micro-batch is in attention, on the wire and in the FFN, by the server's own hop order.

What lives here: three resources and who has them when. What does not: how long a visit takes (times.py by way of layout.py),
and many requests over time, which is the simulator's. The attention side works in `hop_order` and waits for the answer that is
next, whatever else has come; wire and FFN take what arrives first. Both directions share the wire, as in the paper's budget.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from afd_server.pipeline import hop_order

LANES = ("attention", "wire", "FFN")
PLAYED_LAYERS = 24


@dataclass(frozen=True, slots=True)
class HopTimes:
    """Seconds that one micro-batch takes of each resource in one layer. wire_s: of one direction. latency_s: from the wire's end
    to the other side, in which nobody else is kept waiting."""

    attention_s: float
    wire_s: float
    ffn_s: float
    latency_s: float = 0.0

    @property
    def pass_s(self) -> float:
        """Of one layer with nobody in the way."""
        return self.attention_s + 2 * (self.wire_s + self.latency_s) + self.ffn_s

    @property
    def lanes_s(self) -> dict[str, float]:
        """What a layer of one micro-batch takes of each lane."""
        return {"attention": self.attention_s, "wire": 2 * self.wire_s, "FFN": self.ffn_s}


@dataclass(frozen=True, slots=True)
class Piece:
    """A micro-batch in a lane. layer counts from 0."""

    lane: str
    micro_batch: int
    layer: int
    start_s: float
    end_s: float


def play_step(times: HopTimes, micro_batches: int, layers: int) -> list[Piece]:
    """All pieces of one step, which starts at 0 and ends with the last answer on the attention side."""
    pieces: list[Piece] = []
    free_s = dict.fromkeys(LANES, 0.0)
    arrived: dict[tuple[int, int], float] = {(batch, 0): 0.0 for batch in range(micro_batches)}
    order = list(hop_order(micro_batches, layers - 1))
    coming: list[tuple[float, int, int, int]] = []  # when a piece may start, its stage, layer and micro-batch
    wire = "wire", times.wire_s, times.latency_s
    stages = (wire, ("FFN", times.ffn_s, 0.0), wire)

    def take(lane: str, ready_s: float, seconds: float, batch: int, layer: int) -> float:
        start_s = max(ready_s, free_s[lane])
        free_s[lane] = start_s + seconds
        pieces.append(Piece(lane, batch, layer, start_s, free_s[lane]))
        return free_s[lane]

    following = 0
    while following < len(order) or coming:
        while following < len(order) and order[following] in arrived:
            batch, layer = order[following]
            sent_s = take("attention", arrived[order[following]], times.attention_s, batch, layer)
            heapq.heappush(coming, (sent_s, 0, layer, batch))
            following += 1
        ready_s, stage, layer, batch = heapq.heappop(coming)
        lane, seconds, latency_s = stages[stage]
        end_s = take(lane, ready_s, seconds, batch, layer) + latency_s
        if stage + 1 < len(stages):
            heapq.heappush(coming, (end_s, stage + 1, layer, batch))
        else:
            arrived[batch, layer + 1] = end_s
    return pieces


def step_s(times: HopTimes, micro_batches: int, layers: int) -> float:
    """Seconds of a step, fill and drain of the pipeline included. Long ones are played in part: once the pipeline is full, each
    layer is as long as the one before."""
    if layers <= PLAYED_LAYERS:
        return _played_s(times, micro_batches, layers)
    half_s, whole_s = (_played_s(times, micro_batches, n) for n in (PLAYED_LAYERS // 2, PLAYED_LAYERS))
    return whole_s + (layers - PLAYED_LAYERS) * (whole_s - half_s) / (PLAYED_LAYERS - PLAYED_LAYERS // 2)


def _played_s(times: HopTimes, micro_batches: int, layers: int) -> float:
    return max(piece.end_s for piece in play_step(times, micro_batches, layers)) + times.latency_s


def least_step_s(times: HopTimes, micro_batches: int, layers: int) -> float:
    """What a step takes at least: the busiest lane's work, or one micro-batch's own way."""
    return layers * max(micro_batches * max(times.lanes_s.values()), times.pass_s)
