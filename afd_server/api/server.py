"""The front-end's port and its end: bind early, serve, and on a signal let running requests finish.

What lives here: uvicorn, the listening socket, the signals. What does not: routes (app.py), workers. Called by serving.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import uvicorn
from starlette.types import ASGIApp

from afd_server.api.connection import Connection
from afd_server.errors import ConfigError

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
BACKLOG = 2048
CLIENT_TIMEOUT_S = 60.0


def bind_port(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises ConfigError naming the flag when that cannot be.

    Clients that come before `serve` wait in the backlog.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError("--host", f"{host!r} is no address: {error.strerror or error}") from error
    family, kind, protocol, _, address = found[0]
    listening = socket.socket(family, kind, protocol)
    try:
        # A port is free again at once after a server ended, although its connections linger in the kernel.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        reason = os.strerror(error.errno) if error.errno else str(error)
        if error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError("--host", f"{host} is not an address of this machine") from error
        raise ConfigError(
            "--port", f"cannot listen on {host} port {port}: {reason}", "choose another"
        ) from error
    listening.setblocking(False)
    return listening


class _Server(uvicorn.Server):
    """uvicorn that leaves the process alive after a signal, and takes a second one as: now."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        if not self.should_exit:
            logger.info("ending: no new requests, %d running ones may finish", len(self.server_state.tasks))
            self.should_exit = True
            return
        logger.warning("ending at once: %d requests are cut off", len(self.server_state.tasks))
        self.force_exit = True
        for task in self.server_state.tasks:
            task.cancel()


async def serve(
    app: ASGIApp,
    host: str,
    port: int,
    shutdown_timeout_s: float,
    sockets: Sequence[socket.socket] | None = None,
    *,
    client_timeout_s: float = CLIENT_TIMEOUT_S,
    tls: ssl.SSLContext | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT, then lets running requests finish within the timeout, and returns.

    sockets: from `bind_port`, instead of host and port. client_timeout_s: see Connection. tls: for https. Must run on the main thread.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        # The event loop is the caller's choice: it is running already. The timeout may be a fraction, whatever the
        # annotation says.
        loop="none",
        http=partial(Connection, timeout_s=client_timeout_s),  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=shutdown_timeout_s,  # type: ignore[arg-type]
    )
    config.load()
    config.ssl = tls
    await _Server(config).serve(sockets=None if sockets is None else list(sockets))
