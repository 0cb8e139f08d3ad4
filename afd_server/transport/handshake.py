"""How two ends of a new connection prove to each other that they belong to the same cluster, and agree on a link.

The server sends a random challenge; the client answers with a hello (what link it wants) signed with the cluster's
secret over challenge and hello; the server checks it in constant time and signs its reply. The secret never travels, and
an old recording is worthless against a new challenge. The connection is not encrypted: the network is the cluster's own.

What lives here: the messages, and the client's side over a blocking socket. What does not: the servers' reading, which
differs (listener.py: a selector; control.py: asyncio).
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
import time
from typing import Literal

import msgspec

from afd_server.errors import ConfigError, ProtocolError, WorkerDiedError, WorkerTimeoutError
from afd_server.transport.base import LinkShape

PROTOCOL_VERSION = 2
# A server gives up on a connection that has not introduced itself after this long.
HANDSHAKE_TIMEOUT_S = 5.0
# Connections that a server holds at most before they have introduced themselves; one more ends the oldest of them.
MAX_CANDIDATES = 64

_MAGIC = b"AFDh"
_NONCE_BYTES = 32
_MAC_BYTES = 32
_PREFIX = struct.Struct("<4sI")
_MAX_BODY_BYTES = 2048
_MAX_REASON_CHARACTERS = 256
CHALLENGE_BYTES = len(_MAGIC) + _NONCE_BYTES
DEVICE_HANDLE_BYTES = 64


class HandshakeError(Exception):
    """The peer does not speak this protocol or does not know the secret. The message says which."""


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a client wants: an activation link (with its shape and, for shm, a descriptor beside it) or the control channel.

    device_handle: of memory on the client's GPU that the link may use in place of the descriptor's; empty without one.
    """

    purpose: Literal["shm", "tcp", "control"]
    nonce: bytes
    replica: int = 0
    shape: LinkShape | None = None
    device_handle: bytes = b""
    version: int = PROTOCOL_VERSION

    def __post_init__(self) -> None:
        if len(self.device_handle) not in (0, DEVICE_HANDLE_BYTES):
            raise ValueError(f"{len(self.device_handle)} bytes for a handle of device memory")
        if self.device_handle and self.purpose != "shm":
            raise ValueError(f"device memory for a link of kind {self.purpose}")


class Reply(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The server's word: refusal says why not, in a sentence; empty when the connection stands.

    device_refusal: why the link does not use the device memory that the client offered; empty when it does.
    """

    refusal: str = ""
    device_refusal: str = ""


def new_challenge() -> bytes:
    """What a server sends first: magic and a fresh nonce."""
    return _MAGIC + secrets.token_bytes(_NONCE_BYTES)


def new_hello(
    purpose: Literal["shm", "tcp", "control"],
    replica: int = 0,
    shape: LinkShape | None = None,
    device_handle: bytes = b"",
) -> Hello:
    return Hello(purpose, secrets.token_bytes(_NONCE_BYTES), replica, shape, device_handle)


def check_challenge(challenge: bytes) -> None:
    if challenge[: len(_MAGIC)] != _MAGIC:
        raise HandshakeError(f"it sent {challenge[:8]!r} instead of a challenge")


def pack_hello(secret: bytes, challenge: bytes, hello: Hello) -> bytes:
    return _pack(secret, b"client", challenge, msgspec.msgpack.encode(hello))


def unpack_hello(secret: bytes, challenge: bytes, frame: bytes) -> Hello:
    """Raises HandshakeError. The body is not looked at before its signature."""
    body = _checked(secret, b"client", challenge, frame)
    try:
        hello = msgspec.msgpack.decode(body, type=Hello)
    except (msgspec.MsgspecError, ConfigError, ValueError) as error:
        raise HandshakeError(f"its hello cannot be read: {error}") from None
    if hello.version != PROTOCOL_VERSION:
        raise HandshakeError(f"it speaks version {hello.version} of the protocol, this side {PROTOCOL_VERSION}")
    return hello


def pack_reply(
    secret: bytes, challenge: bytes, nonce: bytes, refusal: str = "", device_refusal: str = ""
) -> bytes:
    reply = Reply(refusal, device_refusal[:_MAX_REASON_CHARACTERS])
    return _pack(secret, b"server", challenge + nonce, msgspec.msgpack.encode(reply))


def pack_rejection() -> bytes:
    """The reply to a peer without the secret: nothing in it is signed."""
    body = msgspec.msgpack.encode(Reply("the secrets differ"))
    return _PREFIX.pack(_MAGIC, len(body)) + body + bytes(_MAC_BYTES)


def unpack_reply(secret: bytes, challenge: bytes, hello: Hello, frame: bytes) -> Reply:
    """Raises HandshakeError when the server cannot prove itself, or refuses."""
    body = _checked(secret, b"server", challenge + hello.nonce, frame)
    try:
        reply = msgspec.msgpack.decode(body, type=Reply)
    except (msgspec.MsgspecError, ValueError) as error:
        raise HandshakeError(f"its reply cannot be read: {error}") from None
    if reply.refusal:
        raise HandshakeError(reply.refusal)
    return reply


def frame_bytes(received: bytes | bytearray) -> int:
    """Length of the hello or reply that begins with these bytes, as far as they tell: at least that of a prefix.

    Raises HandshakeError as soon as it cannot be one.
    """
    if received[: len(_MAGIC)] != _MAGIC[: len(received)]:
        raise HandshakeError(f"it sent {bytes(received[:8])!r} instead of a handshake")
    if len(received) < _PREFIX.size:
        return _PREFIX.size
    _, body_bytes = _PREFIX.unpack_from(received)
    if body_bytes > _MAX_BODY_BYTES:
        raise HandshakeError(f"it announces a handshake of {body_bytes} bytes")
    return _PREFIX.size + int(body_bytes) + _MAC_BYTES


def shake_hands(
    sock: socket.socket, worker: str, secret: bytes, hello: Hello, descriptors: list[int], deadline: float
) -> Reply:
    """The client's side on a connected socket, until `deadline` (time.monotonic). Passes descriptors with the hello.

    Raises ProtocolError (also when the server refuses), WorkerDiedError or WorkerTimeoutError.
    """
    try:
        challenge = _receive(sock, CHALLENGE_BYTES, deadline)
        check_challenge(challenge)
        _set_timeout(sock, deadline)
        frame = pack_hello(secret, challenge, hello)
        # A stream may take only part of the bytes; the descriptors go with the first of them.
        sent = socket.send_fds(sock, [frame], descriptors) if descriptors else 0
        if sent < len(frame):
            sock.sendall(frame[sent:])
        reply = b""
        while len(reply) < (length := frame_bytes(reply)):
            reply += _receive(sock, length - len(reply), deadline)
        return unpack_reply(secret, challenge, hello, reply)
    except HandshakeError as error:
        raise ProtocolError(worker, f"no link: {error}") from None
    except TimeoutError:
        raise WorkerTimeoutError(worker, "did not complete the handshake in time") from None
    except (EOFError, OSError) as error:
        raise WorkerDiedError(worker, f"the connection ended during the handshake: {error}") from None


def _pack(secret: bytes, label: bytes, context: bytes, body: bytes) -> bytes:
    return _PREFIX.pack(_MAGIC, len(body)) + body + _sign(secret, label, context, body)


def _checked(secret: bytes, label: bytes, context: bytes, frame: bytes) -> bytes:
    body, signature = frame[_PREFIX.size : -_MAC_BYTES], frame[-_MAC_BYTES:]
    if not hmac.compare_digest(signature, _sign(secret, label, context, body)):
        raise HandshakeError("it does not know the cluster's secret")
    return body


def _sign(secret: bytes, label: bytes, context: bytes, body: bytes) -> bytes:
    # Label and context have fixed lengths, so no two different triples make the same bytes.
    return hmac.digest(secret, label + context + body, "sha256")


def _receive(sock: socket.socket, size: int, deadline: float) -> bytes:
    received = b""
    while len(received) < size:
        _set_timeout(sock, deadline)
        piece = sock.recv(size - len(received))
        if not piece:
            raise EOFError("end of file")
        received += piece
    return received


def _set_timeout(sock: socket.socket, deadline: float) -> None:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    sock.settimeout(left_s)
