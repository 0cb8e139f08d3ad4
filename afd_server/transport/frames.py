"""Frames on a socket: a fixed binary header, then raw bytes. Reading and writing them without ever blocking.

What lives here: the header and its checks, a reader that picks up where the last byte left it, a queue of bytes to
write. What does not: what the bytes mean as tensors (wire.py) and who waits for what (link.py, listener.py).
"""

from __future__ import annotations

import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum

from afd_server.transport.base import MAX_ROWS, NUM_SLOTS, CallTag

MAGIC = b"AFDc"
VERSION = 1
MAX_LAYERS = 1 << 12
MAX_MESSAGE_BYTES = 4096

# magic, version, kind, micro-batch, routed, wire dtype | replica, layer, step, sequence, rows | payload bytes |
# ffn_us, queue_us, batch_rows. Little-endian; the three pad bytes are zero.
_LAYOUT = struct.Struct("<4sBBBBB3xIIQQIQIII")
HEADER_BYTES = _LAYOUT.size
_UINT32_MAX = (1 << 32) - 1

DTYPE_CODES = {"float32": 1, "bfloat16": 2, "fp8": 3}
_DTYPE_NAMES = {code: name for name, code in DTYPE_CODES.items()}


class FrameError(Exception):
    """The bytes are not a frame of this protocol. Becomes a ProtocolError where the peer's name is known."""


class Kind(IntEnum):
    CALL = 1
    ANSWER = 2
    FAILURE = 3  # payload: the reason, UTF-8


@dataclass(frozen=True, slots=True)
class Header:
    """What precedes every payload.

    sequence: counts a link's sends; an answer repeats its call's, so that a late answer to a call that was sent again is
    told apart from the one waited for. payload_bytes: the payload's size, wherever it lies (after the header or in
    shared memory). ffn_us, queue_us, batch_rows: see base.Answer; 0 in a call.
    """

    kind: Kind
    tag: CallTag
    sequence: int
    rows: int
    routed: bool
    wire_dtype: str
    payload_bytes: int
    ffn_us: int = 0
    queue_us: int = 0
    batch_rows: int = 0

    def pack(self) -> bytes:
        tag = self.tag
        return _LAYOUT.pack(
            MAGIC, VERSION, self.kind, tag.micro_batch, self.routed, DTYPE_CODES[self.wire_dtype],
            tag.replica, tag.layer, tag.step, self.sequence, self.rows, self.payload_bytes,
            min(self.ffn_us, _UINT32_MAX), min(self.queue_us, _UINT32_MAX), min(self.batch_rows, _UINT32_MAX),
        )  # fmt: skip

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> Header:
        """Raises FrameError for anything that `pack` cannot have written."""
        (magic, version, kind, micro_batch, routed, dtype, replica, layer, step, sequence, rows, payload_bytes,
         ffn_us, queue_us, batch_rows) = _LAYOUT.unpack(data)  # fmt: skip
        if magic != MAGIC:
            raise FrameError(f"magic is {magic!r}")
        if version != VERSION:
            raise FrameError(f"version is {version}, not {VERSION}")
        if not Kind.CALL <= kind <= Kind.FAILURE:
            raise FrameError(f"unknown kind {kind}")
        if micro_batch >= NUM_SLOTS:
            raise FrameError(f"micro-batch {micro_batch} of {NUM_SLOTS}")
        if routed > 1:
            raise FrameError(f"flag is {routed}")
        if dtype not in _DTYPE_NAMES:
            raise FrameError(f"unknown dtype {dtype}")
        if layer >= MAX_LAYERS:
            raise FrameError(f"layer {layer}")
        if not 1 <= rows <= MAX_ROWS:
            raise FrameError(f"{rows} rows")
        return cls(Kind(kind), CallTag(replica, step, layer, micro_batch), sequence, rows, bool(routed),
                   _DTYPE_NAMES[dtype], payload_bytes, ffn_us, queue_us, batch_rows)  # fmt: skip


class FrameReader:
    """Reads whole frames from a non-blocking socket, in as many pieces as they come."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._header_bytes = memoryview(bytearray(HEADER_BYTES))
        self._header: Header | None = None
        self._unfilled: deque[memoryview] = deque([self._header_bytes])

    def next_frame(self, payload_of: Callable[[Header], list[memoryview]]) -> Header | None:
        """The next complete frame, or None when more bytes must come first. Raises EOFError, OSError, FrameError.

        payload_of: called with each header; checks it against the link and gives the places where the payload goes
        (none when it does not follow on the socket). May raise FrameError.
        """
        while True:
            while self._unfilled:
                try:
                    received = self._socket.recv_into(self._unfilled[0])
                except (BlockingIOError, InterruptedError):
                    return None
                if received == 0:
                    raise EOFError
                self._advance(received)
            if self._header is not None:
                header, self._header = self._header, None
                self._unfilled.append(self._header_bytes)
                return header
            self._header = Header.unpack(self._header_bytes)
            self._unfilled.extend(piece for piece in payload_of(self._header) if len(piece))

    def _advance(self, received: int) -> None:
        rest = self._unfilled[0][received:]
        if len(rest):
            self._unfilled[0] = rest
        else:
            self._unfilled.popleft()


class Outbox:
    """Bytes on their way out of a non-blocking socket. Payloads are not copied: their memory is read when they leave."""

    # More pieces than this in one system call are refused by the kernel (IOV_MAX is 1024).
    _PIECES_PER_WRITE = 64

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._pieces: deque[memoryview] = deque()

    def __len__(self) -> int:
        """Pieces still to be written."""
        return len(self._pieces)

    def put(self, pieces: Iterable[bytes | memoryview]) -> None:
        self._pieces.extend(view for piece in pieces if len(view := memoryview(piece)))

    def flush(self) -> bool:
        """Writes what the peer takes now; whether nothing is left. Raises OSError when the connection is gone."""
        while self._pieces:
            try:
                pieces = [
                    self._pieces[index] for index in range(min(len(self._pieces), self._PIECES_PER_WRITE))
                ]
                written = self._socket.sendmsg(pieces)
            except (BlockingIOError, InterruptedError):
                return False
            while written:
                size = len(self._pieces[0])
                if written < size:
                    self._pieces[0] = self._pieces[0][written:]
                    break
                written -= size
                self._pieces.popleft()
        return True
