"""The front-end on a real port in this process, with a scripted service behind it."""

import asyncio
import os
import signal
import socket

import httpx

from afd_server.api.server import bind_port, serve
from tests.unit.api.scripted_service import app_for

DEADLINE_S = 20


class Running:
    """`async with Running(service) as running:` serves on a free port; `signal` ends it as an operator does."""

    def __init__(
        self,
        service,
        shutdown_timeout_s=DEADLINE_S,
        client_timeout_s=DEADLINE_S,
        tls=None,
        verify=True,
        **settings,
    ):
        self._listening = bind_port("127.0.0.1", 0)
        self._listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # what nobody reads, shows soon
        self.port = self._listening.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        self._app = app_for(service, **settings)
        self._verify = verify
        self._tls = tls
        self._timeouts = {"shutdown_timeout_s": shutdown_timeout_s, "client_timeout_s": client_timeout_s}

    async def __aenter__(self):
        self.task = asyncio.create_task(
            serve(self._app, "", 0, sockets=[self._listening], tls=self._tls, **self._timeouts)
        )
        self.client = httpx.AsyncClient(base_url=self.url, timeout=DEADLINE_S, verify=self._verify)
        assert (await self.client.get("/health")).status_code == 200
        return self

    def signal(self, number=signal.SIGTERM):
        os.kill(os.getpid(), number)

    async def ended(self):
        await asyncio.wait_for(self.task, DEADLINE_S)

    async def __aexit__(self, *_):
        await self.client.aclose()
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
