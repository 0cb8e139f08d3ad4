"""The attention side of a link over a socket, shm or tcp: one class, since they differ only in where payloads lie.

Used by one thread, the engine's. What does not live here: opening it (connect.py), encoding (wire.py).
"""

from __future__ import annotations

import select
import socket
import time

from afd_server.errors import ProtocolError, WorkerDiedError, WorkerFailedError, WorkerTimeoutError
from afd_server.kernels.hop import CallPlace
from afd_server.models.ffn_call import FFNCall
from afd_server.transport.base import NUM_SLOTS, Answer, CallTag, Link
from afd_server.transport.device_memory import keep_until_dropped
from afd_server.transport.frames import MAX_MESSAGE_BYTES, FrameError, FrameReader, Header, Kind, Outbox
from afd_server.transport.wire import Slots

# How long `send` goes on offering bytes to a peer that takes none, and to one that takes them slowly. The rest is sent
# by the next send or receive; the latter has a deadline.
_SEND_PATIENCE_S = 0.05
_SEND_TIME_S = 1.0


class SocketLink(Link):
    """A connected link after its handshake.

    payload_on_socket: whether activations follow their header (tcp); else both ends see the same slots (shm).
    """

    def __init__(
        self, worker: str, sock: socket.socket, slots: Slots, replica: int, payload_on_socket: bool
    ) -> None:
        self.worker = worker
        self._socket: socket.socket | None = sock
        self._slots = slots
        self._replica = replica
        self._payload_on_socket = payload_on_socket
        sock.setblocking(False)
        self._reader = FrameReader(sock)
        self._outbox = Outbox(sock)
        self._poll = select.poll()
        self._awaited = 0  # the events that the socket is registered for
        self._sequence = 0
        self._sent: list[Header | None] = [None] * NUM_SLOTS
        self._arrived: list[Header | None] = [None] * NUM_SLOTS
        self._messages: dict[int, bytearray] = {}  # reasons of failures, by micro-batch

    def send(self, tag: CallTag, call: FFNCall) -> None:
        sock = self._open_socket(tag)
        assert tag.replica == self._replica
        micro_batch, rows, routed = tag.micro_batch, call.x.shape[0], call.topk_ids is not None
        self._sequence += 1
        slots = self._slots
        slots.write_call(micro_batch, call)
        slots.settle()
        header = self._call_header(tag, rows, routed, self._sequence)
        self._sent[micro_batch], self._arrived[micro_batch] = header, None
        pieces: list[bytes | memoryview] = [header.pack()]
        if self._payload_on_socket:
            pieces += slots.call_buffers(micro_batch, rows, routed)
        try:
            if not self._outbox.send(pieces):
                self._send_rest(sock)
        except OSError as error:
            raise self._died(tag, error) from None

    def receive(self, tag: CallTag, timeout_s: float) -> Answer:
        micro_batch = tag.micro_batch
        sent = self._sent[micro_batch]
        assert sent is not None, "a call must be sent before its answer is received"
        assert sent.tag == tag, f"{tag} is not the call under way, {sent.tag} is"
        header = self._arrived[micro_batch] or self._read_until(tag, micro_batch, timeout_s)
        if header.kind is Kind.FAILURE:
            reason = self._messages.pop(micro_batch).decode("utf-8", "replace")
            raise WorkerFailedError(self.worker, reason, layer=tag.layer, step=tag.step)
        y_TH = self._slots.answer(micro_batch, sent.rows)
        return Answer(y_TH, header.ffn_us, header.queue_us, header.batch_rows)

    def begin_run(self, tag: CallTag, rows: int) -> CallPlace | None:
        sock, slots = self._socket, self._slots
        usual = slots.shape.wire_dtype == "float32" and slots.on_host and not self._payload_on_socket
        if not usual or sock is None or len(self._outbox) or self._reader.has_part:
            return None
        frame = self._call_header(tag, rows, False, self._sequence + 1).pack()
        views, layout = slots.views(tag.micro_batch, rows), slots.layout
        return CallPlace(sock.fileno(), frame, layout.call_bytes(1, False), layout.call_bytes(1, True), views.x,
                         views.topk_ids, views.topk_weights, views.y)  # fmt: skip

    def end_run(self, tag: CallTag, rows: int, num_sent: int, torn: bool) -> None:
        self._sequence += num_sent
        micro_batch = tag.micro_batch
        self._sent[micro_batch] = self._call_header(tag, rows, False, self._sequence)
        self._arrived[micro_batch] = None
        if torn:
            self.close()

    def _call_header(self, tag: CallTag, rows: int, routed: bool, sequence: int) -> Header:
        slots = self._slots
        payload_bytes = slots.layout.call_bytes(rows, routed)
        return Header(Kind.CALL, tag, sequence, rows, routed, slots.shape.wire_dtype, payload_bytes)

    def close(self) -> None:
        sock, self._socket = self._socket, None
        if sock is None:
            return
        if self._slots.on_host:
            sock.close()
        else:
            keep_until_dropped(sock, self._slots)

    def _send_rest(self, sock: socket.socket) -> None:
        """Goes on with a call that the peer does not take at once, for a while."""
        give_up_at = time.monotonic() + _SEND_TIME_S
        while time.monotonic() < give_up_at and self._wait(sock, select.POLLOUT, _SEND_PATIENCE_S):
            if self._outbox.flush():
                return

    def _read_until(self, tag: CallTag, micro_batch: int, timeout_s: float) -> Header:
        """Takes in answers, and writes on what is left of calls, until the micro-batch's own answer is there."""
        sock = self._open_socket(tag)
        deadline = time.monotonic() + timeout_s
        left_s = timeout_s
        in_time = True  # at least one look, however late: the answer may be there
        try:
            while True:
                events = select.POLLIN | (select.POLLOUT if len(self._outbox) else 0)
                if not in_time or not self._wait(sock, events, left_s):
                    problem = f"no answer within {timeout_s:g} s"
                    raise WorkerTimeoutError(self.worker, problem, layer=tag.layer, step=tag.step)
                if len(self._outbox):
                    self._outbox.flush()
                for header in self._reader.read(self._payload_of):
                    sent = self._sent[header.tag.micro_batch]
                    if sent is not None and header.sequence == sent.sequence:
                        self._arrived[header.tag.micro_batch] = header
                    # else: the answer to a call that was sent again, or given up, meanwhile
                answer = self._arrived[micro_batch]
                if answer is not None:
                    return answer
                left_s = deadline - time.monotonic()
                in_time = left_s > 0
        except FrameError as error:
            self.close()
            raise ProtocolError(self.worker, f"{error}", layer=tag.layer, step=tag.step) from None
        except (EOFError, OSError) as error:
            raise self._died(tag, error) from None

    def _payload_of(self, header: Header) -> list[memoryview]:
        micro_batch = header.tag.micro_batch
        sent = self._sent[micro_batch]
        if header.kind is Kind.CALL or sent is None or header.sequence > sent.sequence:
            raise FrameError(f"answer {header.sequence} to a call that was not sent")
        if header.wire_dtype != self._slots.shape.wire_dtype or header.rows > self._slots.shape.max_rows:
            raise FrameError(f"{header.rows} rows of {header.wire_dtype} do not fit the link")
        if header.sequence == sent.sequence and (header.tag != sent.tag or header.rows != sent.rows):
            raise FrameError(
                f"answer to {header.tag} with {header.rows} rows, asked was {sent.tag} with {sent.rows}"
            )
        if header.kind is Kind.FAILURE:
            if header.payload_bytes > MAX_MESSAGE_BYTES:
                raise FrameError(f"a reason of {header.payload_bytes} bytes")
            self._messages[micro_batch] = bytearray(header.payload_bytes)
            return [memoryview(self._messages[micro_batch])]
        if header.payload_bytes != self._slots.layout.answer_bytes(header.rows):
            raise FrameError(f"{header.payload_bytes} bytes for {header.rows} rows")
        return self._slots.answer_buffers(micro_batch, header.rows) if self._payload_on_socket else []

    def _wait(self, sock: socket.socket, events: int, timeout_s: float) -> bool:
        """Whether the socket became ready (or broke, which the next read or write tells) within the time."""
        if events != self._awaited:
            self._poll.register(sock, events)
            self._awaited = events
        return bool(self._poll.poll(max(0.0, timeout_s) * 1000))

    def _open_socket(self, tag: CallTag) -> socket.socket:
        if self._socket is None:
            raise WorkerDiedError(self.worker, "the link is closed", layer=tag.layer, step=tag.step)
        return self._socket

    def _died(self, tag: CallTag, error: Exception) -> WorkerDiedError:
        self.close()
        what = "the connection ended" + (f" ({error})" if str(error) else "")
        return WorkerDiedError(self.worker, what, layer=tag.layer, step=tag.step)
