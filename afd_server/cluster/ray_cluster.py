"""A server's workers as Ray actors: started, connected and stopped.

What lives here: the course of a start and of an end. What does not: what a worker is (workers.py), the actor around it
(actors.py), where Ray puts it (placement.py), how it is brought back when it dies (supervisor.py), or which replica
serves a request (router/). Runs in the process of the front-end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import secrets
import signal
import threading

import ray
from ray.exceptions import GetTimeoutError, RayError

from afd_server.cluster.actors import AttentionActor, FFNActor
from afd_server.cluster.loading import load_all, wait_for_processes
from afd_server.cluster.placement import Deadline, Place, place, start_ray, stop_ray, why_unplaced
from afd_server.cluster.restarts import Restarts
from afd_server.cluster.supervisor import Supervisor
from afd_server.cluster.watch import Member, Role, first_line
from afd_server.cluster.workers import Started, attention_name, ffn_name
from afd_server.config import ServeConfig
from afd_server.router.router import Router
from afd_server.telemetry.worker_metrics import WorkerMetrics
from afd_server.transport.control import ControlClient

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 10.0


class RayCluster:
    """The actors of one server. `config` is a resolved one."""

    def __init__(self, config: ServeConfig) -> None:
        """Joins or starts the Ray cluster. Raises StartError.

        To be called on the main thread, before the server sets its own signal handlers: Ray sets some, and the last
        one to do so wins.
        """
        start_ray(config)
        # The key is the front-end's alone; workers are handed the rest.
        self._config = config = dataclasses.replace(config, api_key=None)
        self._secret = secrets.token_bytes(32)
        self._places: dict[str, Place] = {}  # by worker
        self._supervisor = Supervisor(config, self)

    def start(self, cancelled: threading.Event) -> Started:
        """Places and loads every worker, FFN first. Raises StartError with the first cause, within start_timeout.

        May run on a thread of its own; it gives up soon after `cancelled` is set.
        """
        placement_deadline = Deadline(self._config.placement_timeout, cancelled)
        actors = place(self._config, FFNActor, AttentionActor, self._secret, placement_deadline)
        for index, placed in enumerate(actors.ffn):
            self._supervisor.add(self._member("ffn", index, placed))
        for index, placed in enumerate(actors.attention):
            self._supervisor.add(self._member("attention", index, placed))
        wait_for_processes(
            [*self._supervisor.members("ffn"), *self._supervisor.members("attention")], cancelled
        )
        deadline = Deadline(self._config.start_timeout, cancelled)
        ffn = load_all(self._supervisor.members("ffn"), deadline)
        for member, (endpoint, info) in zip(self._supervisor.members("ffn"), ffn, strict=True):
            member.serves_at(endpoint, info)
        told = self._supervisor.ffn_endpoints()
        attention = load_all(self._supervisor.members("attention"), deadline, *told)
        for member, (endpoint, info, _) in zip(self._supervisor.members("attention"), attention, strict=True):
            member.serves_at(endpoint, info)
        return Started(
            attention=tuple(info for _, info, _ in attention),
            ffn=tuple(info for _, info in ffn),
            transports=tuple(sorted({name for _, _, names in attention for name in names})),
        )

    def _member(self, role: Role, index: int, placed: Place) -> Member:
        name = ffn_name(index) if role == "ffn" else attention_name(index)
        self._places[name] = placed
        life = placed.actor.sentinel.remote()
        return Member(role, index, name, placed.actor, life, Restarts(self._config.max_restarts))

    async def connect(self) -> list[ControlClient]:
        """A client to each attention replica, for the router."""
        return [await self.connect_to(member) for member in self._supervisor.members("attention")]

    async def connect_to(self, member: Member) -> ControlClient:
        """See supervisor.Processes."""
        assert member.endpoint is not None
        return await ControlClient.connect(member.endpoint, self._secret, CONNECT_TIMEOUT_S)

    def end(self, member: Member, *, restart: bool) -> None:
        """See supervisor.Processes. Ray takes 5 s to end a process that is stopped; on this host it can be done at once."""
        pulse = member.pulse
        if restart and pulse is not None and pulse.node == _node():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pulse.pid, signal.SIGKILL)
        else:
            ray.kill(member.actor, no_restart=not restart)

    def why_unplaced(self, member: Member) -> str:
        """See supervisor.Processes."""
        return why_unplaced(self._places[member.name])

    async def supervise(self, router: Router, metrics: WorkerMetrics) -> None:
        """Watches over every actor until cancelled, and brings back those that die."""
        await self._supervisor.run(router, metrics)

    def health(self) -> list[str]:
        return self._supervisor.health()

    def is_serving(self) -> bool:
        return self._supervisor.is_serving()

    def refusal(self) -> str:
        return self._supervisor.refusal()

    def stop(self) -> None:
        """Asks every worker to end its work, then ends the processes. Harmless when nothing was started."""
        members = [*self._supervisor.members("attention"), *self._supervisor.members("ffn")]
        try:
            ray.get([member.actor.stop.remote() for member in members], timeout=STOP_TIMEOUT_S)
        except GetTimeoutError as error:
            logger.warning("a worker did not stop by itself: %s", first_line(error))
        except RayError as error:
            logger.info("a worker had ended already: %s", first_line(error))
        for member in members:
            ray.kill(member.actor)
        stop_ray()


def _node() -> str:
    return ray.get_runtime_context().get_node_id()
