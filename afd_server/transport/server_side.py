"""One connection as the FFN worker sees it: first a candidate that must prove itself, then a link with calls to serve.

Both are driven by listener.py's loop, and neither ever blocks. What does not live here: the loop, and which
connections there are.
"""

from __future__ import annotations

import ctypes
import logging
import os
import socket
import time
from collections.abc import Callable

import torch
from torch import Tensor

from afd_server.errors import ConfigError, WorkerDiedError
from afd_server.kernels.hop import LinkPlace
from afd_server.models.ffn_call import FFNCall
from afd_server.transport.base import NUM_SLOTS, CallTag, IncomingCall
from afd_server.transport.device_memory import DeviceMemoryError, map_device_memory, pin_host_memory
from afd_server.transport.frames import MAX_MESSAGE_BYTES, FrameError, FrameReader, Header, Kind, Outbox
from afd_server.transport.handshake import (
    HandshakeError,
    Hello,
    frame_bytes,
    new_challenge,
    pack_rejection,
    pack_reply,
    unpack_hello,
)
from afd_server.transport.wire import SlotLayout, Slots

logger = logging.getLogger(__name__)


class Candidate:
    """A connection that has not proved itself. Holds no more than one hello and one descriptor of its peer: a second
    descriptor ends it, and so does a longer hello.
    """

    def __init__(self, sock: socket.socket, secret: bytes) -> None:
        """Sends the challenge. Raises OSError when the peer is gone already."""
        self.socket = sock
        self.connected_at = time.monotonic()
        self._secret = secret
        self._challenge = new_challenge()
        self._received = bytearray()
        self._descriptors: list[int] = []
        self._device_refusal = ""
        sock.send(self._challenge)  # a new socket takes these few bytes whole

    def read(self) -> Hello | None:
        """The peer's hello once it is complete and signed. Raises HandshakeError, EOFError, OSError."""
        while len(self._received) < (length := frame_bytes(self._received)):
            try:
                piece = self._receive(length - len(self._received))
            except (BlockingIOError, InterruptedError):
                return None
            if not piece:
                raise EOFError("before it introduced itself")
            self._received += piece
        try:
            return unpack_hello(self._secret, self._challenge, bytes(self._received))
        except HandshakeError:
            self._say(pack_rejection())
            raise

    def open_slots(self, hello: Hello, device: torch.device) -> Slots:
        """The link's memory: the peer's own for shm, private for tcp. Raises HandshakeError, after telling the peer.

        device: what this worker computes on. Memory of the peer's GPU is taken where it is offered and can be mapped there.
        """
        try:
            if hello.purpose == "control" or hello.shape is None:
                raise ValueError("this worker serves activation links")
            if hello.purpose == "tcp":
                return Slots(hello.shape)
            if len(self._descriptors) != 1:
                raise ValueError("a shm link passes one descriptor of shared memory over the unix socket")
            memory = self._map_device_memory(hello, SlotLayout(hello.shape).total_bytes, device)
            if memory is not None:
                return Slots(hello.shape, memory)
            from afd_server.transport.shared_memory import map_shared_memory

            with torch.inference_mode(False):  # see Slots
                memory = map_shared_memory(self._descriptors[0], SlotLayout(hello.shape).total_bytes)
            if device.type == "cuda":
                pin_host_memory(memory, device)
            return Slots(hello.shape, memory)
        except (ValueError, ConfigError, OSError, RuntimeError) as error:
            self._say(pack_reply(self._secret, self._challenge, hello.nonce, str(error)))
            raise HandshakeError(str(error)) from None

    def accept(self, hello: Hello) -> None:
        """Tells the peer that its link stands, and that this is the server it meant."""
        self._say(pack_reply(self._secret, self._challenge, hello.nonce, device_refusal=self._device_refusal))
        self.close()

    def close(self) -> None:
        """Gives back the descriptors; the socket belongs to the listener."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()

    def _map_device_memory(self, hello: Hello, size_bytes: int, device: torch.device) -> Tensor | None:
        """None, and the reason noted for the peer, where activations are to go through host memory."""
        try:
            if not hello.device_handle:
                if device.type == "cuda":  # the peer, on its CPU, sees nothing unusual
                    logger.info("%s: activations go through host memory: %s", f"attention-{hello.replica}",
                                "it offers no device memory")  # fmt: skip
                return None
            if device.type != "cuda":
                raise DeviceMemoryError("the FFN worker computes on a CPU")
            return map_device_memory(hello.device_handle, size_bytes, device)
        except DeviceMemoryError as error:
            self._device_refusal = str(error)
            return None

    def _receive(self, size: int) -> bytes:
        if self.socket.family != socket.AF_UNIX:
            return self.socket.recv(size)
        piece, descriptors, _, _ = socket.recv_fds(self.socket, size, 1)
        self._descriptors += descriptors
        if len(self._descriptors) > 1:
            raise HandshakeError("it passes more than one descriptor")
        return piece

    def _say(self, frame: bytes) -> None:
        self.socket.send(frame)


class ServedLink:
    """A link after its handshake: reads calls into their slots, writes answers as the peer takes them."""

    def __init__(
        self,
        sock: socket.socket,
        slots: Slots,
        replica: int,
        payload_on_socket: bool,
        output_pending: Callable[[socket.socket], None],
    ) -> None:
        self.replica = replica
        self.closed = False
        self.latest = (ctypes.c_uint64 * NUM_SLOTS)()  # sequence number of each micro-batch's last call
        self.watched_for_writes = False  # the listener's note
        self._socket = sock
        self._slots = slots
        self._payload_on_socket = payload_on_socket
        self._output_pending = output_pending
        self._reader = FrameReader(sock)
        self._outbox = Outbox(sock)

    @property
    def has_output(self) -> bool:
        return len(self._outbox) > 0

    def flush(self) -> None:
        self._outbox.flush()

    def read_calls(self) -> list[ServedCall]:
        """Every call that is complete. Raises EOFError, OSError, FrameError."""
        calls: list[ServedCall] = []
        for header in self._reader.read(self._payload_of):
            tag = header.tag
            call = self._slots.read_call(tag.micro_batch, tag.layer, header.rows, header.routed)
            calls.append(ServedCall(self, header, call))
        return calls

    def close(self) -> None:
        self.closed = True

    def answer_place(self, header: Header) -> Tensor:
        return self._slots.answer(header.tag.micro_batch, header.rows)

    def settle(self) -> None:
        self._slots.settle()

    def send(self, header: Header, message: bytes = b"") -> None:
        """Queues an answer and writes what the peer takes at once. Raises OSError when it is gone."""
        pieces: list[bytes | memoryview] = [header.pack()]
        if header.kind is Kind.FAILURE:
            pieces.append(message)
        elif self._payload_on_socket:
            pieces += self._slots.answer_buffers(header.tag.micro_batch, header.rows)
        if not self._outbox.send(pieces):
            self._output_pending(self._socket)

    def place(self, hidden_size: int) -> LinkPlace | None:
        """Of its slots, for a kernel that serves calls by itself. None where that cannot be."""
        slots, shape = self._slots, self._slots.shape
        usual = shape.wire_dtype == "float32" and shape.hidden_size == hidden_size and slots.on_host
        if self._payload_on_socket or not usual:
            return None
        layout, first = slots.layout, slots.views(0, 1)
        return LinkPlace(
            self._socket.fileno(), self.replica, shape.max_rows, shape.top_k, first.x.data_ptr(),
            layout.call_slot_bytes + layout.answer_slot_bytes, layout.topk_ids.offset_bytes,
            layout.topk_weights.offset_bytes, layout.call_slot_bytes, self.latest,
        )  # fmt: skip

    @property
    def is_idle(self) -> bool:
        """Whether no part of a call has been read and no part of an answer is left to send."""
        return not (self._reader.has_part or self.has_output)

    def send_rest(self, rest: bytes) -> None:
        """Queues what is left of an answer whose beginning has left. Raises OSError when the peer is gone."""
        if not self._outbox.send([rest]):
            self._output_pending(self._socket)

    @property
    def answer_bytes_per_row(self) -> int:
        return self._slots.layout.y.row_bytes

    def _payload_of(self, header: Header) -> list[memoryview]:
        shape, tag = self._slots.shape, header.tag
        if header.kind is not Kind.CALL:
            raise FrameError(f"a caller sent a frame of kind {header.kind.name}")
        if tag.replica != self.replica:
            raise FrameError(f"replica {self.replica} sent a call of replica {tag.replica}")
        if header.wire_dtype != shape.wire_dtype:
            raise FrameError(f"{header.wire_dtype} over a link for {shape.wire_dtype}")
        if header.rows > shape.max_rows:
            raise FrameError(f"{header.rows} rows over a link for {shape.max_rows}")
        if header.routed and shape.top_k == 0:
            raise FrameError("expert ids over a link without them")
        if header.payload_bytes != self._slots.layout.call_bytes(header.rows, header.routed):
            raise FrameError(f"{header.payload_bytes} bytes for {header.rows} rows")
        if header.sequence <= self.latest[tag.micro_batch]:
            raise FrameError(f"call {header.sequence} after call {self.latest[tag.micro_batch]}")
        self.latest[tag.micro_batch] = header.sequence
        if not self._payload_on_socket:
            return []
        return self._slots.call_buffers(tag.micro_batch, header.rows, header.routed)


class ServedCall(IncomingCall):
    """A call from a socket link."""

    def __init__(self, link: ServedLink, header: Header, call: FFNCall) -> None:
        self.tag: CallTag = header.tag
        self.call = call
        self._link = link
        self._header = header
        self.arrived_at = time.monotonic()
        self._buffer: Tensor | None = None
        self._finished = False
        self._answered = False

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for the answer: the link is open and the call was not sent again."""
        link, header = self._link, self._header
        return not link.closed and link.latest[header.tag.micro_batch] == header.sequence

    def answer_buffer(self) -> Tensor:
        # A superseded call must not touch the answer to its successor, which may be read this moment. A call that is
        # superseded after this line is computed before its successor, and so is written before it.
        if self._buffer is None:
            place_TH = self._link.answer_place(self._header)
            self._buffer = place_TH if self.wanted else torch.empty_like(place_TH)
        return self._buffer

    def finish(self) -> None:
        if not self._finished:
            self._link.settle()
            self._finished = True

    def answer(self, ffn_us: int, batch_rows: int) -> None:
        self.finish()
        queue_us = max(0, round((time.monotonic() - self.arrived_at) * 1e6) - ffn_us)
        payload_bytes = self._link.answer_bytes_per_row * self._header.rows
        self._reply(Kind.ANSWER, payload_bytes, b"", ffn_us, queue_us, batch_rows)

    def fail(self, message: str) -> None:
        reason = message.encode("utf-8", "replace")[:MAX_MESSAGE_BYTES]
        self._reply(Kind.FAILURE, len(reason), reason)

    def _reply(
        self,
        kind: Kind,
        payload_bytes: int,
        message: bytes,
        ffn_us: int = 0,
        queue_us: int = 0,
        batch_rows: int = 0,
    ) -> None:
        assert not self._answered, "a call is answered once"
        self._answered = True
        sent = self._header
        caller = f"attention-{sent.tag.replica}"
        if self._link.closed:
            raise WorkerDiedError(caller, "the connection is closed", layer=sent.tag.layer, step=sent.tag.step)
        if not self.wanted:
            return  # sent again meanwhile: the caller waits for the newer call's answer
        header = Header(kind, sent.tag, sent.sequence, sent.rows, sent.routed, sent.wire_dtype, payload_bytes,
                        ffn_us, queue_us, batch_rows)  # fmt: skip
        try:
            self._link.send(header, message)
        except OSError as error:
            # The listener drops the link at its next event, the end of file.
            self._link.close()
            raise WorkerDiedError(caller, f"the connection ended ({error})", layer=sent.tag.layer,
                                  step=sent.tag.step) from None  # fmt: skip
