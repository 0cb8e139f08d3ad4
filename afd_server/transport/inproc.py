"""The path between threads of one process: the same slots as over a socket, and queues instead of frames.

Used by the local executor (llm.py) and by tests. What does not live here: encoding (wire.py).
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from afd_server.errors import WorkerDiedError, WorkerFailedError, WorkerTimeoutError
from afd_server.models.ffn_call import FFNCall
from afd_server.transport.base import NUM_SLOTS, Answer, CallTag, IncomingCall, Link, LinkShape, Listener
from afd_server.transport.wire import Slots

_CLOSED = "the connection is closed"


@dataclass(frozen=True, slots=True)
class _Reply:
    """What an FFN worker's thread puts before an attention worker's. problem: why there is no answer, None if there is."""

    sequence: int
    micro_batch: int
    ffn_us: int
    queue_us: int
    batch_rows: int
    problem: str | None


class _Connection:
    """What the two ends of a link share. Each end's attributes are written by that end's thread alone."""

    def __init__(self, shape: LinkShape, replica: int, device: torch.device | str) -> None:
        self.slots = Slots(shape, device=device)
        self.replica = replica
        self.replies: queue.SimpleQueue[_Reply | None] = queue.SimpleQueue()  # None: the listener closed
        self.latest = [0] * NUM_SLOTS  # sequence number of each micro-batch's last call
        self.closed = threading.Event()


class InprocListener(Listener):
    """The FFN worker's end. `connect` may be called from any thread, the rest from one."""

    def __init__(self, worker: str) -> None:
        self._worker = worker
        self._calls: queue.SimpleQueue[_InprocCall] = queue.SimpleQueue()
        self._connections: list[_Connection] = []
        self._lock = threading.Lock()
        self._closed = False

    def connect(self, shape: LinkShape, replica: int, device: torch.device | str = "cpu") -> Link:
        """A new link to this listener, with its slots on `device`. Raises WorkerDiedError when it is closed."""
        connection = _Connection(shape, replica, device)
        with self._lock:
            if self._closed:
                raise WorkerDiedError(self._worker, _CLOSED)
            self._connections = [known for known in self._connections if not known.closed.is_set()]
            self._connections.append(connection)
        return _InprocLink(self._worker, connection, self._calls)

    def wait(self, timeout_s: float) -> list[IncomingCall]:
        deadline = time.monotonic() + timeout_s
        calls: list[IncomingCall] = []
        while True:
            try:
                left_s = 0.0 if calls else max(0.0, deadline - time.monotonic())
                incoming = self._calls.get(timeout=left_s) if left_s else self._calls.get_nowait()
            except queue.Empty:
                return calls
            if incoming.wanted:
                calls.append(incoming)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            connections, self._connections = self._connections, []
        for connection in connections:
            connection.closed.set()
            connection.replies.put(None)


class _InprocLink(Link):
    def __init__(self, worker: str, connection: _Connection, calls: queue.SimpleQueue[_InprocCall]) -> None:
        self.worker = worker
        self._connection = connection
        self._calls = calls
        self._sequence = 0
        self._tags: dict[int, CallTag] = {}
        self._rows: dict[int, int] = {}
        self._arrived: dict[int, _Reply] = {}

    def send(self, tag: CallTag, call: FFNCall) -> None:
        connection, micro_batch = self._connection, tag.micro_batch
        if connection.closed.is_set():
            raise WorkerDiedError(self.worker, _CLOSED, layer=tag.layer, step=tag.step)
        assert tag.replica == connection.replica
        self._sequence += 1
        # First the number, then the slot: whoever still computes the call before this one finds itself superseded.
        connection.latest[micro_batch] = self._sequence
        self._arrived.pop(micro_batch, None)
        self._tags[micro_batch], self._rows[micro_batch] = tag, call.x.shape[0]
        connection.slots.write_call(micro_batch, call)
        routed = call.topk_ids is not None
        received = connection.slots.read_call(micro_batch, call.layer, call.x.shape[0], routed)
        self._calls.put(_InprocCall(tag, received, self._sequence, connection))

    def receive(self, tag: CallTag, timeout_s: float) -> Answer:
        connection, micro_batch = self._connection, tag.micro_batch
        assert self._tags.get(micro_batch) == tag, f"{tag} is not under way on this link"
        deadline = time.monotonic() + timeout_s
        while micro_batch not in self._arrived:
            try:
                reply = connection.replies.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                problem = f"no answer within {timeout_s:g} s"
                raise WorkerTimeoutError(self.worker, problem, layer=tag.layer, step=tag.step) from None
            if reply is None:
                connection.replies.put(None)  # for the next wait
                raise WorkerDiedError(self.worker, _CLOSED, layer=tag.layer, step=tag.step)
            if reply.sequence == connection.latest[reply.micro_batch]:
                self._arrived[reply.micro_batch] = reply
        reply = self._arrived.pop(micro_batch)
        if reply.problem is not None:
            raise WorkerFailedError(self.worker, reply.problem, layer=tag.layer, step=tag.step)
        y_TH = connection.slots.answer(micro_batch, self._rows[micro_batch])
        return Answer(y_TH, reply.ffn_us, reply.queue_us, reply.batch_rows)

    def close(self) -> None:
        self._connection.closed.set()
        self._connection.replies.put(None)


class _InprocCall(IncomingCall):
    def __init__(self, tag: CallTag, call: FFNCall, sequence: int, connection: _Connection) -> None:
        self.tag = tag
        self.call = call
        self._sequence = sequence
        self._connection = connection
        self.arrived_at = time.monotonic()
        self._buffer: Tensor | None = None
        self._answered = False

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for the answer: the link is open and the call was not sent again."""
        connection = self._connection
        return not connection.closed.is_set() and connection.latest[self.tag.micro_batch] == self._sequence

    def answer_buffer(self) -> Tensor:
        # A superseded call must not touch the answer to its successor, which may be read this moment. A call that is
        # superseded after this line is computed before its successor, and so is written before it.
        if self._buffer is None:
            place_TH = self._connection.slots.answer(self.tag.micro_batch, self.call.x.shape[0])
            self._buffer = place_TH if self.wanted else torch.empty_like(place_TH)
        return self._buffer

    def finish(self) -> None:
        """The threads share the device's stream: what reads the answer comes after what writes it."""

    def answer(self, ffn_us: int, batch_rows: int) -> None:
        self._reply(ffn_us, batch_rows, None)

    def fail(self, message: str) -> None:
        self._reply(0, 0, message)

    def _reply(self, ffn_us: int, batch_rows: int, problem: str | None) -> None:
        assert not self._answered, "a call is answered once"
        self._answered = True
        if self._connection.closed.is_set():
            raise WorkerDiedError(
                f"attention-{self.tag.replica}", _CLOSED, layer=self.tag.layer, step=self.tag.step
            )
        queue_us = max(0, round((time.monotonic() - self.arrived_at) * 1e6) - ffn_us)
        self._connection.replies.put(
            _Reply(self._sequence, self.tag.micro_batch, ffn_us, queue_us, batch_rows, problem)
        )
