"""No path at all: the thread that sends a call computes it, on the spot. The undivided engine, to measure a split against.

Used by the local executor (llm.py). What does not live here: the arithmetic, which is handed in.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from afd_server.errors import WorkerFailedError
from afd_server.models.ffn_call import FFNCall
from afd_server.transport.base import Answer, CallTag, Link


class DirectLink(Link):
    """compute: what the worker at the other end would make of a call, [T, H]. Several threads may be in it at once."""

    def __init__(self, worker: str, compute: Callable[[FFNCall], Tensor]) -> None:
        self.worker = worker
        self._compute = compute
        self._answers: dict[int, tuple[CallTag, Answer | str]] = {}  # or why there is none; by micro-batch

    def send(self, tag: CallTag, call: FFNCall) -> None:
        started = time.perf_counter()
        try:
            y_TH = self._compute(call)
        except Exception as error:  # as an FFN worker does: the requests of this step end, the others go on
            self._answers[tag.micro_batch] = tag, f"{type(error).__name__}: {error}"
            return
        ffn_us = round((time.perf_counter() - started) * 1e6)
        self._answers[tag.micro_batch] = tag, Answer(y_TH, ffn_us, 0, len(call.x))

    def receive(self, tag: CallTag, timeout_s: float) -> Answer:
        sent, answer = self._answers.pop(tag.micro_batch)
        assert sent == tag, f"{tag} is not the call under way, {sent} is"
        if isinstance(answer, str):
            raise WorkerFailedError(self.worker, answer, layer=tag.layer, step=tag.step)
        return answer

    def close(self) -> None:
        self._answers.clear()
