"""Whether a gRPC server listens at an address: asked before a library is told to connect there that would wait for minutes."""

from __future__ import annotations

import os
import socket

# What a client of HTTP/2 says first, with settings that ask for nothing (RFC 9113, 3.4). A server answers with its settings.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
FRAME_HEADER_BYTES = 9
SETTINGS = 4


def why_no_grpc(host: str, port: int, timeout_s: float, *, tls: bool = False) -> str | None:
    """The reason why nobody answers there as a gRPC server does, None when one does. Waits about timeout_s for each of its
    addresses. tls: only that a connection can be made is looked at."""
    header = b""
    try:
        with socket.create_connection((host, port), timeout_s) as connection:
            if tls:
                return None
            connection.sendall(PREFACE)
            while len(header) < FRAME_HEADER_BYTES and (part := connection.recv(FRAME_HEADER_BYTES)):
                header += part
    except TimeoutError:
        return f"no answer within {timeout_s:g} s"
    except OSError as error:
        return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
    return None if header[3:4] == bytes((SETTINGS,)) else "what listens there is not Ray"
