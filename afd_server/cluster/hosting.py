"""What an actor's process holds once it is loaded: a worker, and the ports at which others reach it.

What lives here: everything that needs torch. actors.py imports it when it is told to load, and has the rest: the calls by
which a front-end speaks to the process. Imports no ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable

from afd_server.attention.ffn_group import Connector
from afd_server.cluster.layout import link_shape, torch_device
from afd_server.cluster.names import attention_name, ffn_name
from afd_server.cluster.workers import AttentionReplica, FFNServer, WorkerInfo
from afd_server.config import ServeConfig
from afd_server.errors import WorkerDiedError
from afd_server.models.families import read_model_spec
from afd_server.transport.base import Endpoint, Link
from afd_server.transport.connect import choose_transport, connect
from afd_server.transport.control import ControlServer
from afd_server.transport.listener import SocketListener

# Of a worker: where it listens, what it tells of itself, and the transport to each FFN worker that an attention worker uses.
Loaded = tuple[Endpoint, WorkerInfo, list[str]]

CONTROL_TIMEOUT_S = 10.0


class FFNHost:
    """An FFN worker that serves at `loaded`. node: Ray's name of it; address: of this host, for peers elsewhere."""

    def __init__(self, config: ServeConfig, index: int, secret: bytes, node: str, address: str) -> None:
        """Raises whatever the load does."""
        listener = SocketListener(ffn_name(index), node, secret, host=address, device=torch_device(config))
        self.worker = FFNServer(config, index, listener)
        self.loaded: Loaded = (listener.endpoint, self.worker.info, [])

    def stop(self) -> None:
        """Ends the worker after the batch under way."""
        self.worker.stop()


class AttentionHost:
    """An attention worker, and its channel to the router at `loaded`.

    ffn: the FFN workers to connect to. endpoint_of: where one of them listens now, None when it has left. events: a running
    event loop for the channel.
    """

    def __init__(
        self,
        config: ServeConfig,
        index: int,
        secret: bytes,
        node: str,
        address: str,
        *,
        ffn: Iterable[int],
        endpoint_of: Callable[[int], Endpoint | None],
        events: asyncio.AbstractEventLoop,
        workers_per_gpu: int,
    ) -> None:
        """Raises whatever the load does."""
        self._config, self._index, self._secret, self._node = config, index, secret, node
        self._endpoint_of = endpoint_of
        self._events = events
        self._control = ControlServer(
            secret,
            name=attention_name(index),
            node=node,
            host=address,
            on_submit=lambda request: self.worker.loop.submit(request),
            on_abort=lambda request_id: self.worker.loop.abort(request_id),
        )
        connectors = {each: self._connector(each) for each in ffn}
        self.worker = AttentionReplica(
            config, index, connectors, self._control.publish, workers_per_gpu=workers_per_gpu
        )
        try:
            self._on_events(self._control.start())
        except BaseException:
            self.worker.stop()
            raise
        endpoints = [endpoint for each in ffn if (endpoint := endpoint_of(each)) is not None]
        transports = [self._transport(endpoint) for endpoint in endpoints]
        self.loaded: Loaded = (self._control.endpoint, self.worker.info, transports)

    def replace_ffn(self, index: int) -> None:
        """FFN worker `index` is new or was restarted."""
        self.worker.replace_ffn(index, self._connector(index))

    def stop(self) -> None:
        """Ends the worker after the step under way, then the channel."""
        self.worker.stop()
        self._on_events(self._control.close())

    def _on_events(self, coroutine: Coroutine[None, None, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._events).result(CONTROL_TIMEOUT_S)

    def _transport(self, endpoint: Endpoint) -> str:
        return choose_transport(self._config.transport, self._node, endpoint)

    def _connector(self, index: int) -> Connector:
        """Dials FFN worker `index` where it listens at that moment."""
        shape = link_shape(self._config, read_model_spec(self._config.model))
        device = torch_device(self._config)

        def dial(timeout_s: float) -> Link:
            endpoint = self._endpoint_of(index)
            if endpoint is None:
                raise WorkerDiedError(ffn_name(index), "it has left")
            transport = self._transport(endpoint)
            return connect(endpoint, shape, self._index, self._secret, transport, timeout_s, device)

        return dial
