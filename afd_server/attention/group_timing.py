"""What the answers of one step tell of its time: FFN, wire, rows.

What lives here: the sums. What does not: the calls (ffn_group.py), and the times that the attention side takes itself
(worker.py).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from afd_server.kernels.hop import LayerRun
from afd_server.transport.base import Answer


@dataclass(slots=True)
class GroupTiming:
    """What the answers of one step told, in seconds and rows."""

    ffn_s: float = 0.0
    wire_s: float = 0.0
    ffn_rows: int = 0
    num_hops: int = 0
    num_resent: int = 0

    def note(self, answers: Collection[Answer], round_trip_s: float, waited_s: float) -> None:
        """A call was answered, by all shards that have a part in it."""
        slowest = max(answers, key=_time_at_the_worker)
        ffn_s, queue_s = slowest.ffn_us * 1e-6, slowest.queue_us * 1e-6
        self.ffn_s += ffn_s
        self.ffn_rows += slowest.batch_rows
        self.num_hops += 1
        # The round trip is the wire's only as far as this side stood waiting; else it includes other work done here.
        self.wire_s += min(waited_s, max(0.0, round_trip_s - ffn_s - queue_s))

    def note_run(self, run: LayerRun) -> None:
        """So many calls were answered one after the other; one that was not is made again, the long way."""
        self.num_resent += run.sent - run.answered
        self.ffn_s += run.ffn_s
        self.wire_s += run.wire_s
        self.ffn_rows += run.ffn_rows
        self.num_hops += run.answered


def _time_at_the_worker(answer: Answer) -> int:
    return answer.ffn_us + answer.queue_us
