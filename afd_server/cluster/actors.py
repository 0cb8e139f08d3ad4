"""The Ray actors: a process around each worker, and nothing more.

An actor is constructed empty and then told to `load`: a load that fails gives its caller the reason in one sentence,
where a failing constructor would give Ray's traceback. After a restart by Ray the supervisor loads it again.
Its methods run on several threads at once, because `sentinel` never returns: its failure tells of the actor's death.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import ray

from afd_server.attention.ffn_group import Connector
from afd_server.cluster.layout import link_shape
from afd_server.cluster.workers import AttentionReplica, FFNServer, WorkerInfo, attention_name, ffn_name
from afd_server.config import ServeConfig
from afd_server.errors import ServingError, StartError
from afd_server.models.families import read_model_spec
from afd_server.telemetry.logs import configure_logging
from afd_server.transport.base import Endpoint
from afd_server.transport.connect import choose_transport, connect
from afd_server.transport.control import ControlServer
from afd_server.transport.listener import SocketListener

Result = TypeVar("Result")

# load, replace_ffn, sentinel and stop may overlap.
ACTOR_THREADS = 4


class FFNActor:
    """Process of one FFN worker."""

    def __init__(self, config: ServeConfig, index: int, secret: bytes) -> None:
        configure_logging(ffn_name(index))
        self._config, self._index, self._secret = config, index, secret
        self._server: FFNServer | None = None

    def load(self) -> tuple[Endpoint, WorkerInfo]:
        """Loads the shard and starts to serve. Raises StartError with the reason."""
        return _explained(self._load)

    def _load(self) -> tuple[Endpoint, WorkerInfo]:
        listener = SocketListener(ffn_name(self._index), _node(), self._secret, host=_address())
        self._server = FFNServer(self._config, self._index, listener)
        return listener.endpoint, self._server.info

    def sentinel(self) -> None:
        threading.Event().wait()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()


class AttentionActor:
    """Process of one attention worker: an engine thread, and an event loop for the channel to the router."""

    def __init__(self, config: ServeConfig, index: int, secret: bytes) -> None:
        configure_logging(attention_name(index))
        self._config, self._index, self._secret = config, index, secret
        self._replica: AttentionReplica | None = None
        self._events = asyncio.new_event_loop()
        threading.Thread(target=self._events.run_forever, name="control", daemon=True).start()

    def load(self, ffn: Sequence[Endpoint]) -> tuple[Endpoint, WorkerInfo, list[str]]:
        """Loads, connects to every FFN worker and starts the engine. Raises StartError with the reason.

        The list names the transport to each FFN worker, as it was chosen.
        """
        return _explained(partial(self._load, ffn))

    def _load(self, ffn: Sequence[Endpoint]) -> tuple[Endpoint, WorkerInfo, list[str]]:
        control = ControlServer(
            self._secret,
            name=attention_name(self._index),
            node=_node(),
            host=_address(),
            on_submit=lambda request: self._running.loop.submit(request),
            on_abort=lambda request_id: self._running.loop.abort(request_id),
        )
        self._replica = AttentionReplica(
            self._config, self._index, [self._connector(endpoint) for endpoint in ffn], control.publish
        )
        asyncio.run_coroutine_threadsafe(control.start(), self._events).result(
            timeout=self._config.start_timeout
        )
        return control.endpoint, self._replica.info, [self._transport(endpoint) for endpoint in ffn]

    @property
    def _running(self) -> AttentionReplica:
        assert self._replica is not None
        return self._replica

    def replace_ffn(self, index: int, endpoint: Endpoint) -> None:
        """FFN worker `index` was restarted and listens there now."""
        self._running.replace_ffn(index, self._connector(endpoint))

    def sentinel(self) -> None:
        threading.Event().wait()

    def stop(self) -> None:
        if self._replica is not None:
            self._replica.stop()

    def _transport(self, endpoint: Endpoint) -> str:
        return choose_transport(self._config.transport, _node(), endpoint)

    def _connector(self, endpoint: Endpoint) -> Connector:
        shape = link_shape(self._config, read_model_spec(self._config.model))
        transport = self._transport(endpoint)
        return lambda timeout_s: connect(endpoint, shape, self._index, self._secret, transport, timeout_s)


def _explained(load: Callable[[], Result]) -> Result:
    try:
        return load()
    except ServingError as error:
        raise StartError(str(error)) from None  # one argument: it crosses processes as it is
    except Exception as error:
        logging.getLogger(__name__).exception("the worker could not start")
        raise StartError(f"{type(error).__name__}: {error}") from None


def _node() -> str:
    return ray.get_runtime_context().get_node_id()


def _address() -> str:
    return ray.util.get_node_ip_address()
