"""The Ray actors: a process around each worker, and nothing more.

An actor is constructed empty and then told to `load`: a load that fails gives its caller the reason in one sentence,
where a failing constructor would give Ray's traceback. After a restart by Ray the supervisor loads it again.
Its methods run on several threads at once, because `sentinel` lasts as long as the worker: its failure tells of the
actor's death.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import ray

from afd_server.attention.ffn_group import Connector
from afd_server.cluster.layout import link_shape
from afd_server.cluster.workers import AttentionReplica, FFNServer, WorkerInfo, attention_name, ffn_name
from afd_server.config import ServeConfig
from afd_server.errors import ServingError, StartError, WorkerDiedError
from afd_server.models.families import read_model_spec
from afd_server.telemetry.logs import configure_logging
from afd_server.transport.base import Endpoint, Link
from afd_server.transport.connect import choose_transport, connect
from afd_server.transport.control import ControlServer
from afd_server.transport.listener import SocketListener

Result = TypeVar("Result")

logger = logging.getLogger(__name__)

# load, use_ffn, heartbeat, sentinel and stop may overlap.
ACTOR_THREADS = 6
# Between two looks whether the worker's own thread lives.
THREAD_POLL_S = 0.5
CONTROL_TIMEOUT_S = 10.0
# How long the calls to an FFN worker that is to leave may take. Past it they are sent again elsewhere.
RETIRE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Pulse:
    """What a heartbeat tells. process: names the actor's process, of whatever node; pid: its id on its node. stalled_s:
    since when its worker's thread has been at one piece of work; 0 without a worker, or when it is idle."""

    process: str
    node: str
    pid: int
    stalled_s: float


class WorkerActor:
    """What both kinds have in common: being there, and being gone."""

    def __init__(self, config: ServeConfig, index: int, secret: bytes) -> None:
        self._config, self._index, self._secret = config, index, secret
        self._worker: FFNServer | AttentionReplica | None = None
        self._process = secrets.token_hex(8)
        self._sentinels = 0

    def heartbeat(self) -> Pulse:
        """Answers at once, whatever the worker does: the process is up."""
        worker = self._worker
        return Pulse(self._process, _node(), os.getpid(), worker.stalled_s() if worker is not None else 0.0)

    def sentinel(self) -> str:
        """Fails with the process. Returns, with the reason, when the worker's thread has ended by itself: the process is
        to be ended then, and started again. A later call takes the place of an earlier one, which returns nothing."""
        self._sentinels += 1
        mine = self._sentinels
        while True:
            time.sleep(THREAD_POLL_S)
            if self._sentinels != mine:
                return ""
            worker = self._worker
            if worker is not None and not worker.is_alive():
                reason = worker.failure or "its thread has ended"
                logger.critical("%s; this process is to be started again", reason)
                return reason

    def stop(self) -> None:
        """Ends the worker after the step or batch under way."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.stop()


class FFNActor(WorkerActor):
    """Process of one FFN worker."""

    def __init__(self, config: ServeConfig, index: int, secret: bytes) -> None:
        configure_logging(ffn_name(index))
        super().__init__(config, index, secret)

    def load(self) -> tuple[Endpoint, WorkerInfo]:
        """Loads the shard and starts to serve, instead of what was served before. Raises StartError with the reason."""
        return _explained(self._load)

    def _load(self) -> tuple[Endpoint, WorkerInfo]:
        self.stop()
        listener = SocketListener(ffn_name(self._index), _node(), self._secret, host=_address())
        server = FFNServer(self._config, self._index, listener)
        self._worker = server
        return listener.endpoint, server.info


class AttentionActor(WorkerActor):
    """Process of one attention worker: an engine thread, and an event loop for the channel to the router."""

    def __init__(self, config: ServeConfig, index: int, secret: bytes) -> None:
        configure_logging(attention_name(index))
        super().__init__(config, index, secret)
        self._control: ControlServer | None = None
        # The FFN workers in use, or to be used by a load under way, by index, and the version of that list; see Supervisor.
        self._ffn: dict[int, Endpoint] = {}
        self._ffn_version = 0
        self._ffn_lock = threading.Lock()
        self._events = asyncio.new_event_loop()
        threading.Thread(target=self._events.run_forever, name="control", daemon=True).start()

    def load(
        self, version: int, ffn: Mapping[int, Endpoint], given_up: Mapping[int, str]
    ) -> tuple[Endpoint, WorkerInfo, list[str]]:
        """Loads, connects to the FFN workers and starts the engine, instead of what ran before.

        ffn: where they listen, by index; given_up: why some of them will not come back; version: of both. The answer's list names the transport to each of them, as it
        was chosen. Raises StartError with the reason.
        """
        loaded = _explained(partial(self._load, version, ffn))
        self._give_up(given_up)
        return loaded

    def _load(self, version: int, ffn: Mapping[int, Endpoint]) -> tuple[Endpoint, WorkerInfo, list[str]]:
        self.stop()
        with self._ffn_lock:
            self._ffn, self._ffn_version = dict(ffn), version
        connectors = {index: self._connector(index) for index in ffn}
        replica: AttentionReplica
        control = ControlServer(
            self._secret,
            name=attention_name(self._index),
            node=_node(),
            host=_address(),
            on_submit=lambda request: replica.loop.submit(request),
            on_abort=lambda request_id: replica.loop.abort(request_id),
        )
        replica = AttentionReplica(
            self._config, self._index, connectors, control.publish, workers_per_gpu=_workers_per_gpu()
        )
        with self._ffn_lock:
            self._worker, self._control = replica, control
        self._on_events(control.start())
        return control.endpoint, replica.info, [self._transport(endpoint) for endpoint in ffn.values()]

    def use_ffn(self, version: int, ffn: Mapping[int, Endpoint], given_up: Mapping[int, str]) -> None:
        """These are the FFN workers now, all of them, and those among them that are given up; ignored when a later version is known.

        Returns when no call is under way to one that is missing from them.
        """
        with self._ffn_lock:
            replica = self._worker
            if version <= self._ffn_version:
                return
            if not isinstance(replica, AttentionReplica):
                # A load under way dials there, too. Who has come or gone it is told again when it is loaded.
                self._ffn |= {index: endpoint for index, endpoint in ffn.items() if index in self._ffn}
                return
            before, self._ffn, self._ffn_version = self._ffn, dict(ffn), version
            for index, endpoint in ffn.items():
                if before.get(index) != endpoint:
                    replica.replace_ffn(index, self._connector(index))
            self._give_up(given_up)
        for index in before.keys() - ffn.keys():
            if not replica.retire_ffn(index, RETIRE_TIMEOUT_S):
                logger.warning("FFN worker %d leaves with a call under way, which is sent again", index)

    def _give_up(self, given_up: Mapping[int, str]) -> None:
        for index, reason in given_up.items():
            if isinstance(self._worker, AttentionReplica):
                self._worker.give_up_ffn(index, reason)

    def stop(self) -> None:
        super().stop()
        control, self._control = self._control, None
        if control is not None:
            self._on_events(control.close())

    def _on_events(self, coroutine: Coroutine[None, None, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._events).result(CONTROL_TIMEOUT_S)

    def _transport(self, endpoint: Endpoint) -> str:
        return choose_transport(self._config.transport, _node(), endpoint)

    def _connector(self, index: int) -> Connector:
        """Dials FFN worker `index` where it listens at that moment."""
        shape = link_shape(self._config, read_model_spec(self._config.model))

        def dial(timeout_s: float) -> Link:
            endpoint = self._ffn.get(index)
            if endpoint is None:
                raise WorkerDiedError(ffn_name(index), "it has left")
            return connect(endpoint, shape, self._index, self._secret, self._transport(endpoint), timeout_s)

        return dial


def _explained(load: Callable[[], Result]) -> Result:
    try:
        return load()
    except ServingError as error:
        raise StartError(str(error)) from None  # one argument: it crosses processes as it is
    except Exception as error:
        logger.exception("the worker could not start")
        raise StartError(f"{type(error).__name__}: {error}") from None


def _workers_per_gpu() -> int:
    """From the share of a GPU that Ray gave this actor; see placement.py."""
    share = ray.get_runtime_context().get_assigned_resources().get("GPU", 0.0)
    return math.floor(1 / share) if 0 < share <= 1 else 1


def _node() -> str:
    return ray.get_runtime_context().get_node_id()


def _address() -> str:
    return ray.util.get_node_ip_address()
