"""Frames on a socket: a fixed binary header, then raw bytes. Reading and writing them without ever blocking.

What lives here: the header and its checks, a reader that picks up where the last byte left it, a queue of bytes to
write. What does not: what the bytes mean as tensors (wire.py) and who waits for what (link.py, listener.py).
"""

from __future__ import annotations

import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple

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


_KINDS = {int(kind): kind for kind in Kind}


class Header(NamedTuple):
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
    def unpack(cls, data: bytes | bytearray | memoryview, start: int = 0) -> Header:
        """The header that begins at byte `start`. Raises FrameError for anything that `pack` cannot have written."""
        (magic, version, kind, micro_batch, routed, dtype, replica, layer, step, sequence, rows, payload_bytes,
         ffn_us, queue_us, batch_rows) = _LAYOUT.unpack_from(data, start)  # fmt: skip
        if magic != MAGIC:
            raise FrameError(f"magic is {magic!r}")
        if version != VERSION:
            raise FrameError(f"version is {version}, not {VERSION}")
        if kind not in _KINDS:
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
        return cls(_KINDS[kind], CallTag(replica, step, layer, micro_batch), sequence, rows, routed == 1,
                   _DTYPE_NAMES[dtype], payload_bytes, ffn_us, queue_us, batch_rows)  # fmt: skip


class FrameReader:
    """Reads whole frames from a non-blocking socket, in as many pieces as they come.

    Headers are read several at a time: the usual frame, a header whose payload lies in shared memory, takes one system
    call. What follows a header on the socket is then put where it belongs, most of it without a copy.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._buffer = bytearray(NUM_SLOTS * HEADER_BYTES)
        self._view = memoryview(self._buffer)
        self._filled = 0  # bytes of the buffer that hold headers not taken yet
        self._header: Header | None = None  # the one whose payload is being read
        self._unfilled: deque[memoryview] = deque()  # where the rest of that payload goes

    @property
    def has_part(self) -> bool:
        """Whether part of a frame has been read."""
        return bool(self._filled or self._unfilled)

    def read(self, payload_of: Callable[[Header], list[memoryview]]) -> list[Header]:
        """The frames that became complete, in order; [] when more bytes must come first. One system call if possible,
        and no more of them than a peer needs who never stops sending. Raises EOFError, OSError, FrameError.

        payload_of: called with each header; checks it against the link and gives the places where the payload goes
        (none when it does not follow on the socket). May raise FrameError.
        """
        frames: list[Header] = []
        try:
            while len(frames) < NUM_SLOTS:
                place = self._unfilled[0] if self._unfilled else self._view[self._filled :]
                received = self._socket.recv_into(place)
                if received == 0:
                    raise EOFError
                if self._unfilled:
                    self._fill(received, frames)
                else:
                    self._filled += received
                    self._take_headers(frames, payload_of)
                if received < len(place):  # that was all there is
                    break
        except (BlockingIOError, InterruptedError):
            pass
        except (EOFError, OSError):
            if not frames:  # else it is met again by the next read
                raise
        return frames

    def _take_headers(self, frames: list[Header], payload_of: Callable[[Header], list[memoryview]]) -> None:
        start, end = 0, self._filled
        while end - start >= HEADER_BYTES:
            header = Header.unpack(self._buffer, start)
            start += HEADER_BYTES
            for place in payload_of(header):
                here = min(len(place), end - start)
                place[:here] = self._view[start : start + here]
                start += here
                if here < len(place):
                    self._unfilled.append(place[here:])
            if self._unfilled:
                self._header = header
                break
            frames.append(header)
        self._filled = end - start
        if self._filled and start:
            self._buffer[: self._filled] = self._buffer[start:end]

    def _fill(self, received: int, frames: list[Header]) -> None:
        rest = self._unfilled[0][received:]
        if len(rest):
            self._unfilled[0] = rest
            return
        self._unfilled.popleft()
        if not self._unfilled:
            assert self._header is not None
            frames.append(self._header)
            self._header = None


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

    def send(self, pieces: Sequence[bytes | memoryview]) -> bool:
        """Writes the pieces after what is left of earlier ones, as `flush` does; what does not leave is kept."""
        if not self._pieces and len(pieces) == 1:  # the usual case: a header alone
            try:
                written = self._socket.send(pieces[0])
            except (BlockingIOError, InterruptedError):
                written = 0
            if written == len(pieces[0]):
                return True
            pieces = [memoryview(pieces[0])[written:]]
        self._pieces.extend(view for piece in pieces if len(view := memoryview(piece)))
        return self.flush()

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
