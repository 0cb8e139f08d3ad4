"""A server's workers as Ray actors: started, connected, watched, restarted and stopped.

What lives here: the course of a start and of a restart. What does not: what a worker is (workers.py), the actor around
it (actors.py), where Ray puts it (placement.py), or which replica serves a request (router/). Runs in the process of
the front-end. Ray restarts a dead actor's process; loading it again and telling its peers is done here.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from afd_server.cluster.actors import AttentionActor, FFNActor
from afd_server.cluster.placement import START_POLL_S, Deadline, place, start_ray, stop_ray
from afd_server.cluster.workers import Started, attention_name, ffn_name
from afd_server.config import ServeConfig
from afd_server.errors import StartError, WorkerError
from afd_server.router.router import Router
from afd_server.transport.base import Endpoint
from afd_server.transport.control import ControlClient

logger = logging.getLogger(__name__)

# Between two looks at an actor that Ray is restarting.
RESTART_POLL_S = 0.2
# Between two looks for attention workers that live and are not connected.
RECONNECT_POLL_S = 1.0
STOP_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 10.0


@dataclass(slots=True)
class Member:
    """One actor of the cluster. `down_since` (monotonic seconds) and `reason` while it is not serving."""

    name: str
    actor: Any
    endpoint: Endpoint | None = None
    down_since: float | None = None
    reason: str = ""


class RayCluster:
    """The actors of one server. `config` is a resolved one."""

    def __init__(self, config: ServeConfig) -> None:
        """Joins or starts the Ray cluster. Raises StartError.

        To be called on the main thread, before the server sets its own signal handlers: Ray sets some, and the last
        one to do so wins.
        """
        start_ray(config)
        self._config = config
        self._secret = secrets.token_bytes(32)
        self._ffn: list[Member] = []
        self._attention: list[Member] = []
        self._stopping = False

    def start(self, cancelled: threading.Event) -> Started:
        """Places and loads every worker, FFN first. Raises StartError with the first cause, within start_timeout.

        May run on a thread of its own; it gives up soon after `cancelled` is set.
        """
        deadline = Deadline(self._config.start_timeout, cancelled)
        actors = place(self._config, FFNActor, AttentionActor, self._secret, deadline)
        self._ffn = [Member(ffn_name(index), actor) for index, actor in enumerate(actors.ffn)]
        self._attention = [Member(attention_name(index), actor) for index, actor in enumerate(actors.attention)]
        ffn = self._load(self._ffn, deadline)
        for member, (endpoint, _) in zip(self._ffn, ffn, strict=True):
            member.endpoint = endpoint
        attention = self._load(self._attention, deadline, self._ffn_endpoints())
        for member, (endpoint, _, _) in zip(self._attention, attention, strict=True):
            member.endpoint = endpoint
        return Started(
            attention=tuple(info for _, info, _ in attention),
            ffn=tuple(info for _, info in ffn),
            transports=tuple(sorted({name for _, _, names in attention for name in names})),
        )

    def _ffn_endpoints(self) -> list[Endpoint]:
        return [member.endpoint for member in self._ffn if member.endpoint is not None]

    def _load(self, members: Sequence[Member], deadline: Deadline, *arguments: Any) -> list[Any]:
        """Every member's answer to `load`; the first failure ends the wait."""
        waiting = {member.actor.load.remote(*arguments): member for member in members}
        results: dict[str, Any] = {}
        while len(results) < len(members):
            ready, _ = ray.wait(list(waiting), timeout=START_POLL_S)
            if not ready:
                names = ", ".join(member.name for member in waiting.values())
                deadline.check(f"{names}: not loaded within {deadline.timeout_s:g} s (raise --start-timeout)")
                continue
            member = waiting.pop(ready[0])
            try:
                results[member.name] = ray.get(ready[0])
            except RayTaskError as error:
                raise StartError(f"{member.name}: {error.cause}") from None
            except RayError as error:
                raise StartError(
                    f"{member.name}: its process ended while it loaded: {_first_line(error)}"
                ) from None
        return [results[member.name] for member in members]

    async def connect(self) -> list[ControlClient]:
        """A client to each attention replica, for the router."""
        return [await self._connect(member) for member in self._attention]

    async def _connect(self, member: Member) -> ControlClient:
        assert member.endpoint is not None
        return await ControlClient.connect(member.endpoint, self._secret, CONNECT_TIMEOUT_S)

    # --- while it runs ---------------------------------------------------------------------------------------------

    async def supervise(self, router: Router) -> None:
        """Watches every actor until cancelled, and brings back those that die."""
        async with asyncio.TaskGroup() as watches:
            for index, member in enumerate(self._ffn):
                watches.create_task(self._watch_ffn(index, member))
            for member in self._attention:
                watches.create_task(self._watch_attention(member, router))
            watches.create_task(self._watch_connections(router))

    async def _watch_ffn(self, index: int, member: Member) -> None:
        while True:
            await self._until_death(member)
            member.endpoint, _ = await self._reload(member)
            for attention in self._attention:
                if attention.down_since is None:
                    await _told(attention.actor.replace_ffn.remote(index, member.endpoint))
            self._back(member)

    async def _watch_attention(self, member: Member, router: Router) -> None:
        while True:
            await self._until_death(member)
            member.endpoint, _, _ = await self._reload(member, self._ffn_endpoints())
            router.replace(member.name, await self._connect(member))
            self._back(member)

    async def _watch_connections(self, router: Router) -> None:
        """Connects again to attention workers that live although their control connection has ended."""
        while True:
            await asyncio.sleep(RECONNECT_POLL_S)
            for member in self._attention:
                if member.name not in router.lost() or member.down_since is not None:
                    continue
                try:
                    client = await self._connect(member)
                except WorkerError as error:
                    logger.warning("%s lives and cannot be reached: %s", member.name, error.problem)
                else:
                    router.replace(member.name, client)

    async def _until_death(self, member: Member) -> None:
        try:
            await member.actor.sentinel.remote()
        except RayError as error:
            if not self._stopping:
                member.down_since, member.reason = time.monotonic(), _first_line(error)
                logger.error("%s died and is being restarted: %s", member.name, member.reason)

    async def _reload(self, member: Member, *arguments: Any) -> Any:
        """Loads the actor that Ray has restarted, as often as it takes."""
        while True:
            try:
                return await member.actor.load.remote(*arguments)
            except RayTaskError as error:
                member.reason = f"cannot load: {error.cause}"
            except RayActorError as error:
                member.reason = _first_line(error)
            await asyncio.sleep(RESTART_POLL_S)

    def _back(self, member: Member) -> None:
        assert member.down_since is not None
        logger.warning("%s is back after %.1f s", member.name, time.monotonic() - member.down_since)
        member.down_since = None

    def health(self) -> list[str]:
        """One sentence for each worker that is down: which, since when, why."""
        now = time.monotonic()
        return [
            f"{member.name} has been down for {now - member.down_since:.1f} s: {member.reason}"
            for member in (*self._ffn, *self._attention)
            if member.down_since is not None
        ]

    def stop(self) -> None:
        """Asks every worker to end its work, then ends the processes. Harmless when nothing was started."""
        self._stopping = True
        members = [*self._attention, *self._ffn]
        try:
            ray.get([member.actor.stop.remote() for member in members], timeout=STOP_TIMEOUT_S)
        except (RayError, GetTimeoutError) as error:
            logger.warning("a worker did not stop by itself: %s", _first_line(error))
        for member in members:
            ray.kill(member.actor)
        stop_ray()


async def _told(reference: Any) -> None:
    """Waits for a notice to a worker. One that dies meanwhile learns the same when it is loaded again."""
    try:
        await reference
    except RayError as error:
        logger.warning("a worker could not be told of a restart: %s", _first_line(error))


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
