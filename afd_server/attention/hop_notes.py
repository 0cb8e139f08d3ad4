"""What an attention worker notes of each hop: sums by layer and by FFN worker, always; spans, while somebody records.

What lives here: the moments between which its thread computes, waits and samples. What does not: the calls (ffn_group.py), the sums of
one step (group_timing.py), and what is made of it all (telemetry/). Called on the engine's thread.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from afd_server.kernels.hop import LayerRun
from afd_server.telemetry.hop_recorder import HopRecorder
from afd_server.telemetry.layer_totals import LayerTotals
from afd_server.transport.base import Answer, CallTag
from afd_server.types import HopSpan, WaitTotal


@dataclass(slots=True)
class _Waits:
    """See types.WaitTotal."""

    calls: int = 0
    ffn_s: float = 0.0
    queue_s: float = 0.0
    waited_s: float = 0.0


class HopNotes:
    """layers: computing here, of each layer. computing_since: when the thread last had
    nothing to wait for, monotonic seconds."""

    def __init__(self, num_layers: int) -> None:
        self.recorder = HopRecorder()
        self.layers = LayerTotals(num_layers)
        self._waits: dict[int, _Waits] = {}
        self.computing_since = time.monotonic()

    def computed(self, tag: CallTag, rows: int, until: float, now: float) -> None:
        """A layer's part was computed until then, and is handed over now."""
        since, self.computing_since = self.computing_since, now
        self.layers.note(tag.layer, until - since, rows)
        if self.recorder.windows:
            at = (tag.step, tag.layer, tag.micro_batch, "", rows)
            self.recorder.note(HopSpan("attention", since, until, *at))
            self.recorder.note(HopSpan("send", until, now, *at))

    def answered(self, tag: CallTag, worker: int, answer: Answer, moments: tuple[float, float, float]) -> None:
        """moments: when the call left, when its answer began to be waited for, and when it was there."""
        sent_at, since, received_at = moments
        waits = self._of(worker)
        waits.calls += 1
        waits.ffn_s += answer.ffn_us * 1e-6
        waits.queue_s += answer.queue_us * 1e-6
        waits.waited_s += received_at - since
        if self.recorder.windows:
            at = (tag.step, tag.layer, tag.micro_batch, f"ffn-{worker}", len(answer.y))
            self.recorder.note(HopSpan("bubble", since, received_at, *at))
            self.recorder.note(HopSpan("call", sent_at, received_at, *at))

    def ran(self, tag: CallTag, worker: int, run: LayerRun, rows: int) -> None:
        """A kernel made the hops of the first layers by itself, and has added to their totals."""
        waits = self._of(worker)
        waits.calls += run.answered
        waits.ffn_s += run.ffn_s
        waits.waited_s += run.waiting_s
        if self.recorder.windows:
            for layer, times in enumerate(run.times[: run.answered]):
                at = (tag.step, layer, tag.micro_batch)
                began = times.began if layer else self.computing_since
                self.recorder.note(HopSpan("attention", began, times.computed, *at, "", rows))
                for name in ("bubble", "call"):
                    self.recorder.note(
                        HopSpan(name, times.computed, times.received, *at, f"ffn-{worker}", rows)
                    )
        self.computing_since = time.monotonic()

    def sampled(self, step: int, micro_batch: int, rows: int) -> None:
        """A micro-batch has its tokens."""
        now = time.monotonic()
        if self.recorder.windows:
            self.recorder.note(HopSpan("sampling", self.computing_since, now, step, -1, micro_batch, "", rows))
        self.computing_since = now

    def waits(self) -> tuple[WaitTotal, ...]:
        """By FFN worker. Callable from any thread."""
        return tuple(
            WaitTotal(f"ffn-{index}", each.calls, each.ffn_s, each.queue_s, each.waited_s)
            for index, each in sorted(self._waits.copy().items())
        )

    def _of(self, worker: int) -> _Waits:
        waits = self._waits.get(worker)
        if waits is None:
            waits = self._waits[worker] = _Waits()
        return waits
