"""The loop of an FFN worker: take the calls that wait, merge those of one layer, compute this shard's part, answer.

What lives here: the loop. What does not: which calls are merged (merging.py), the arithmetic (models/halves.py), the bytes
(transport/), the process around it (cluster/). It never waits for a peer that is absent: what is there is served, oldest first.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from afd_server.errors import ServingError
from afd_server.ffn.merging import next_batch
from afd_server.kernels.call_account import CallAccount
from afd_server.kernels.hop import KernelFFN
from afd_server.models.ffn_call import FFNCall
from afd_server.models.ffn_graphs import FFNGraphs
from afd_server.models.halves import FFNHalf
from afd_server.telemetry.hop_recorder import HopRecorder
from afd_server.transport.base import IncomingCall, Listener
from afd_server.types import HopSpan

logger = logging.getLogger(__name__)

# How long the loop sleeps at most before it looks whether it should stop.
IDLE_WAIT_S = 0.05


class FFNWorker:
    """Serves one shard's weights to whoever calls. `serve` runs on one thread; `stop` may come from any.

    kernels: for each layer, what the half does with a call of it, where one kernel does it all. Such calls are served without
    Python in between, where the listener can, one after the other.
    end_at_failure: whether a call that cannot be computed ends `serve`, after its caller has been told the reason. That
    is right where the worker is started afresh: what broke once (a device, memory) rarely mends itself.
    account: of what is computed, by layer and expert; recorder: of each call, while somebody records.
    threads: how many of the processor's it uses, soon after it is set by any thread; None: as torch is set.
    failure: the first such reason. progressed_at: when the thread last began to wait or to compute, monotonic seconds.
    """

    def __init__(
        self,
        name: str,
        half: FFNHalf | FFNGraphs,
        listener: Listener,
        *,
        account: CallAccount,
        kernels: Sequence[KernelFFN | None] = (),
        end_at_failure: bool = False,
    ) -> None:
        self.name = name
        self.threads: int | None = None
        self.failure = ""
        self.progressed_at = time.monotonic()
        self.account = account
        self.recorder = HopRecorder()
        self._end_at_failure = end_at_failure
        self._half = half
        self._listener = listener
        self._stopping = threading.Event()
        self._waiting: list[IncomingCall] = []
        self._kernels = kernels if any(kernels) else ()

    @torch.inference_mode()
    def serve(self) -> None:
        """Answers calls until `stop`, or a failure that ends it, then closes the listener."""
        try:
            while not (self._stopping.is_set() or (self.failure and self._end_at_failure)):
                self.serve_once(IDLE_WAIT_S)
        finally:
            self._listener.close()

    def serve_once(self, timeout_s: float) -> bool:
        """Answers the oldest call, with those that are merged with it; sleeps up to timeout_s for one. Whether one came.

        A call that cannot be computed is answered with the reason. To be called in inference mode.
        """
        self.progressed_at = time.monotonic()
        if self.threads is not None and self.threads != torch.get_num_threads():
            torch.set_num_threads(self.threads)  # counts for the thread that calls it
        if (
            self._kernels
            and not self._waiting
            and self._listener.serve_usual_calls(self._kernels, self.account, timeout_s)
        ):
            self.progressed_at = time.monotonic()
            if self.recorder.windows:
                self._record_usual_calls()
            timeout_s = 0.0
        # With calls in hand, only look at what came meanwhile; without, sleep until something comes.
        self._waiting += self._listener.wait(0.0 if self._waiting else timeout_s)
        if not self._waiting:
            return False
        batch, self._waiting = next_batch(self._waiting)
        self.progressed_at = time.monotonic()
        self._answer(batch)
        return True

    def stop(self) -> None:
        """Ends `serve` after the batch under way."""
        self._stopping.set()

    def _answer(self, batch: Sequence[IncomingCall]) -> None:
        began = time.monotonic()
        try:
            self._compute(batch)
        except (
            Exception
        ) as error:  # the worker must outlive any call: the callers are told, and the log has the rest
            if len(batch) > 1:  # one bad call is no reason to fail the others
                logger.warning(
                    "%s: %d calls together failed, each is tried by itself: %s", self.name, len(batch), error
                )
                for incoming in batch:
                    self._answer([incoming])
                return
            logger.exception("%s: layer %d failed", self.name, batch[0].call.layer)
            problem = f"{type(error).__name__}: {error}"
            self.failure = self.failure or problem
            self._reply(batch[0], 0, 0, problem)
            return
        ended = time.monotonic()
        rows = [len(incoming.call.x) for incoming in batch]
        for incoming in batch:
            self._reply(incoming, round((ended - began) * 1e6), sum(rows))
        self.account.totals.note(batch[0].tag.layer, ended - began, sum(rows))
        self.account.count()
        if self.recorder.windows:
            for incoming, own_rows in zip(batch, rows, strict=True):
                tag = incoming.tag
                at = (tag.step, tag.layer, tag.micro_batch, f"attention-{tag.replica}", own_rows)
                self.recorder.note(HopSpan("queue", min(incoming.arrived_at, began), began, *at))
                self.recorder.note(HopSpan("ffn", began, ended, *at))

    def _record_usual_calls(self) -> None:
        """Of these it is not known when they came: nobody but the kernel was there."""
        for note in self.account.notes[: self.account.num_notes]:
            at = (note.step, note.layer, note.micro_batch, f"attention-{note.replica}", note.rows)
            self.recorder.note(HopSpan("queue", note.began, note.began, *at))
            self.recorder.note(HopSpan("ffn", note.began, note.ended, *at))

    def _reply(self, incoming: IncomingCall, ffn_us: int, batch_rows: int, problem: str | None = None) -> None:
        try:
            if problem is None:
                incoming.answer(ffn_us, batch_rows)
            else:
                incoming.fail(problem)
        except ServingError as error:  # the caller is gone; whoever takes over its requests will call again
            logger.info("%s: an answer could not be delivered: %s", self.name, error)

    def _compute(self, batch: Sequence[IncomingCall]) -> None:
        if len(batch) == 1:
            call = self._routed(batch[0].call)
            self._half.forward(call, out=batch[0].answer_buffer())
            batch[0].finish()
            return
        # Each call is routed by itself, where that is done here: see FFNHalf.routed.
        y_TH = self._half.forward(merge([self._routed(incoming.call) for incoming in batch]))
        start = 0
        for incoming in batch:
            rows = len(incoming.call.x)
            incoming.answer_buffer().copy_(y_TH[start : start + rows])
            start += rows
        for incoming in batch:
            incoming.finish()

    def _routed(self, call: FFNCall) -> FFNCall:
        """The call with its experts named, which are noted."""
        call = self._half.routed(call)
        if call.topk_ids is not None:
            self.account.note(call.layer, call.topk_ids)
        return call


def merge(calls: Sequence[FFNCall]) -> FFNCall:
    """One call with the rows of all, in order. They are of one layer and one model, so all are routed or none is."""

    def rows_of(parts: list[Tensor | None]) -> Tensor | None:
        present = [part for part in parts if part is not None]
        return torch.cat(present) if present else None

    return FFNCall(
        layer=calls[0].layer,
        x=torch.cat([call.x for call in calls]),
        topk_ids=rows_of([call.topk_ids for call in calls]),
        topk_weights=rows_of([call.topk_weights for call in calls]),
    )
