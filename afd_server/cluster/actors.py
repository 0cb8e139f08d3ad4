"""The Ray actors: a process around each worker, and nothing more.

An actor is constructed empty, within a moment, and then told to `load`: a load that fails gives its caller the reason in one
sentence, where a failing constructor would give Ray's traceback. After a restart by Ray the supervisor loads it again.
torch is imported by the load (hosting.py), so that a process answers heartbeats before, and one that dies or raises in
its imports is known like one that does so later.
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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from afd_server.cluster.groups import remove_abandoned_groups
from afd_server.cluster.names import attention_name, ffn_name
from afd_server.config import ServeConfig
from afd_server.errors import ServingError, StartError
from afd_server.telemetry.logs import configure_logging
from afd_server.types import HopSpan, WorkerTotals

if TYPE_CHECKING:
    from afd_server.cluster.hosting import AttentionHost, FFNHost, Loaded
    from afd_server.transport.base import Endpoint

logger = logging.getLogger(__name__)

# load, use_ffn, heartbeat, describe, sentinel, stop and what is asked of its hops may overlap.
ACTOR_THREADS = 7
# Between two looks whether the worker's own thread lives.
THREAD_POLL_S = 0.5
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


@dataclass(frozen=True, slots=True)
class Server:
    """What all workers of a server share. namespace: of their names in Ray. settings: of the command that started it; see
    attaching.py."""

    namespace: str
    settings: dict[str, Any]
    secret: bytes


@dataclass(frozen=True, slots=True)
class Description:
    """What a worker tells a front-end that has not started it. loaded: None when it is empty.

    silent_s: how long ago a front-end last spoke to it. ffn_version: of the list of FFN workers that it knows.
    """

    server: Server
    group: PlacementGroup
    silent_s: float
    loaded: Loaded | None
    ffn_version: int


@dataclass(frozen=True, slots=True)
class FFNList:
    """The FFN workers as attention workers are told of them, by index: where each listens, or listened last, why some will not
    come back, and what the cluster lacks for others to be placed. version: a later list has a higher one."""

    version: int
    endpoints: Mapping[int, Endpoint]
    given_up: Mapping[int, str]
    unplaced: Mapping[int, str]


class WorkerActor:
    """What both kinds have in common: being there, being spoken to, and being gone."""

    def __init__(self, config: ServeConfig, index: int, server: Server) -> None:
        self._config, self._index, self._server = config, index, server
        self._host: FFNHost | AttentionHost | None = None
        self._loaded: Loaded | None = None
        self._loading = threading.Lock()
        self._ffn_version = 0  # attention workers have a list of FFN workers
        self._process = secrets.token_hex(8)
        self._sentinels = 0
        self._group: PlacementGroup = ray.util.get_current_placement_group()
        self._heard_at = time.monotonic()
        threading.Thread(target=self._end_when_orphaned, name="orphan", daemon=True).start()

    def describe(self) -> Description:
        """For a front-end that might attach. Not a sign of one that has."""
        return Description(self._server, self._group, self._silent_s(), self._loaded, self._ffn_version)

    def heartbeat(self) -> Pulse:
        """Answers at once, whatever the worker does: the process is up. And it hears that there is a front-end."""
        self._heard_at = time.monotonic()
        host = self._host
        return Pulse(self._process, _node(), os.getpid(), host.worker.stalled_s() if host is not None else 0.0)

    def clock(self) -> float:
        """This process's monotonic seconds, for whoever brings them together with his own."""
        return time.monotonic()

    def begin_recording(self, seconds: float) -> int | None:
        """Its hops are recorded from now on, for so long. Gives a number for `end_recording`; None without a worker."""
        host = self._host
        return host.worker.recorder.begin(seconds) if host is not None else None

    def end_recording(self, number: int) -> tuple[list[HopSpan], int]:
        """See HopRecorder.end."""
        host = self._host
        return host.worker.recorder.end(number) if host is not None else ([], 0)

    def totals(self) -> WorkerTotals | None:
        """What its worker has done since it was loaded; None without one."""
        host = self._host
        return host.worker.totals() if host is not None else None

    def sentinel(self) -> str:
        """Fails with the process. Returns, with the reason, when the worker's thread has ended by itself: the process is
        to be ended then, and started again. A later call takes the place of an earlier one, which returns nothing."""
        self._sentinels += 1
        mine = self._sentinels
        while True:
            time.sleep(THREAD_POLL_S)
            if self._sentinels != mine:
                return ""
            host = self._host
            if host is not None and not host.worker.is_alive():
                reason = host.worker.failure or "its thread has ended"
                logger.critical("%s; this process is to be started again", reason)
                return reason

    def share_host(self, config: ServeConfig) -> None:
        """There are other numbers of workers now, those of `config`, by which they share the cores of their hosts."""
        self._config = config
        if self._host is not None:
            self._host.worker.share_host(config)

    def stop(self) -> None:
        """Ends the worker after the step or batch under way."""
        host, self._host, self._loaded = self._host, None, None
        if host is not None:
            host.stop()

    def _silent_s(self) -> float:
        """How long no front-end has spoken to it. One that waits for it to load need not."""
        return 0.0 if self._loading.locked() else time.monotonic() - self._heard_at

    def _end_when_orphaned(self) -> None:
        timeout_s = self._config.orphan_timeout
        while self._silent_s() < timeout_s:
            time.sleep(min(1.0, timeout_s / 10))
        logger.critical("no front-end has spoken to this worker for %g s: it ends", timeout_s)
        myself = ray.get_runtime_context().current_actor
        try:
            remove_abandoned_groups(self._server.namespace)
        finally:
            remove_placement_group(self._group)  # and with its resources, this process
            ray.kill(myself)  # for good: else its name would be kept for another one

    def _load_once(self, load: Callable[[], Loaded]) -> Loaded:
        """Carries a load out. Raises StartError with the reason."""
        with self._loading:
            try:
                self._loaded = load()
            except ServingError as error:
                raise StartError(str(error)) from None  # one argument: it crosses processes as it is
            except Exception as error:
                logger.exception("the worker could not start")
                raise StartError(f"{type(error).__name__}: {error}") from None
            finally:
                self._heard_at = time.monotonic()
            return self._loaded


class FFNActor(WorkerActor):
    """Process of one FFN worker."""

    def __init__(self, config: ServeConfig, index: int, server: Server) -> None:
        configure_logging(ffn_name(index), config.log_level, config.log_format)
        super().__init__(config, index, server)

    def load(self, config: ServeConfig) -> Loaded:
        """Loads the shard and starts to serve, instead of what was served before. Raises StartError with the reason."""
        self._config = config
        return self._load_once(self._load)

    def _load(self) -> Loaded:
        from afd_server.cluster.hosting import FFNHost

        self.stop()
        host = FFNHost(self._config, self._index, self._server.secret, _node(), _address())
        self._host = host
        return host.loaded


class AttentionActor(WorkerActor):
    """Process of one attention worker: an engine thread, and an event loop for the channel to the router."""

    _host: AttentionHost | None

    def __init__(self, config: ServeConfig, index: int, server: Server) -> None:
        configure_logging(attention_name(index), config.log_level, config.log_format)
        super().__init__(config, index, server)
        # The FFN workers in use, or to be used by a load under way, by index, and the version of that list; see Supervisor.
        self._ffn: dict[int, Endpoint] = {}
        self._ffn_lock = threading.Lock()
        self._events = asyncio.new_event_loop()
        threading.Thread(target=self._events.run_forever, name="control", daemon=True).start()

    def load(self, config: ServeConfig, ffn: FFNList) -> Loaded:
        """Loads, connects to the FFN workers and starts the engine, instead of what ran before. Raises StartError with the
        reason."""
        self._config = config
        with self._ffn_lock:  # before the imports, which take seconds: news of them come meanwhile
            self._ffn, self._ffn_version = dict(ffn.endpoints), ffn.version
        loaded = self._load_once(partial(self._load, ffn.endpoints))
        self._note_missing(ffn)
        return loaded

    def _load(self, ffn: Mapping[int, Endpoint]) -> Loaded:
        from afd_server.cluster.hosting import AttentionHost

        self.stop()
        host = AttentionHost(
            self._config,
            self._index,
            self._server.secret,
            _node(),
            _address(),
            ffn=ffn,
            endpoint_of=lambda index: self._ffn.get(index),
            events=self._events,
            workers_per_gpu=_workers_per_gpu(),
        )
        with self._ffn_lock:
            self._host = host
        return host.loaded

    def use_ffn(self, ffn: FFNList) -> None:
        """These are the FFN workers now, all of them; ignored when a later version is known.

        Returns when no call is under way to one that is missing from them.
        """
        with self._ffn_lock:
            host = self._host
            if ffn.version <= self._ffn_version:
                return
            if host is None:
                # A load under way dials there, too. Who has come or gone it is told again when it is loaded.
                self._ffn |= {
                    index: endpoint for index, endpoint in ffn.endpoints.items() if index in self._ffn
                }
                return
            before, self._ffn, self._ffn_version = self._ffn, dict(ffn.endpoints), ffn.version
            for index, endpoint in ffn.endpoints.items():
                if before.get(index) != endpoint:
                    host.replace_ffn(index)
            self._note_missing(ffn)
        for index in before.keys() - ffn.endpoints.keys():
            if not host.worker.retire_ffn(index, RETIRE_TIMEOUT_S):
                logger.warning("FFN worker %d leaves with a call under way, which is sent again", index)

    def _note_missing(self, ffn: FFNList) -> None:
        if self._host is not None:
            self._host.worker.note_unplaced_ffn(ffn.unplaced)
            for index, reason in ffn.given_up.items():
                self._host.worker.give_up_ffn(index, reason)


def _workers_per_gpu() -> int:
    """From the share of a GPU that Ray gave this actor; see placement.py."""
    share = ray.get_runtime_context().get_assigned_resources().get("GPU", 0.0)
    return math.floor(1 / share) if 0 < share <= 1 else 1


def _node() -> str:
    return ray.get_runtime_context().get_node_id()


def _address() -> str:
    return ray.util.get_node_ip_address()
