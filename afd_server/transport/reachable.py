"""Whether anybody listens at an address: asked before a library is told to connect there that would wait for minutes."""

from __future__ import annotations

import os
import socket


def why_unreachable(host: str, port: int, timeout_s: float) -> str | None:
    """The reason why no TCP connection can be made, None when one can. Waits at most timeout_s for each of its addresses."""
    try:
        socket.create_connection((host, port), timeout_s).close()
    except TimeoutError:
        return f"no answer within {timeout_s:g} s"
    except OSError as error:
        return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
    return None
