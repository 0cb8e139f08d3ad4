"""The watch over a server's actors: every death is noticed, and whoever died is brought back.

What lives here: the course of a restart. Ray starts the process of a dead actor again, empty; here it is loaded, and its
peers are told. What does not: the first start and the end (ray_cluster.py), what the requests of a dead worker do
meanwhile (router/, attention/ffn_group.py). Runs on the front-end's event loop. Whatever happens to one worker, at any
moment of its restart, is no reason to leave the others alone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

from ray.exceptions import RayError, RayTaskError

from afd_server.cluster.workers import WorkerInfo
from afd_server.errors import WorkerError
from afd_server.router.router import Router
from afd_server.transport.base import Endpoint
from afd_server.transport.control import ControlClient

logger = logging.getLogger(__name__)

# Between two attempts to bring a worker back. Each one reads its weights again.
RETRY_AFTER_S = 0.2
MAX_RETRY_AFTER_S = 5.0
# Between two looks for attention workers that live and are not connected.
RECONNECT_POLL_S = 1.0
# How long a worker may take to hear of another one's restart before the next ones go on without it.
TELL_TIMEOUT_S = 10.0


Role = Literal["attention", "ffn"]


@dataclass(slots=True, eq=False)
class Member:
    """One actor of the cluster.

    index: among those of its role. life: a call that ends only with the actor's process, taken before that process is
    loaded. endpoint and info: of the last load, None before the first. down_since (monotonic seconds) and reason while
    it is not serving.
    """

    role: Role
    index: int
    name: str
    actor: Any
    life: Any
    endpoint: Endpoint | None = None
    info: WorkerInfo | None = None
    down_since: float | None = None
    reason: str = ""

    def serves_at(self, endpoint: Endpoint, info: WorkerInfo) -> None:
        """It has been loaded."""
        self.endpoint, self.info = endpoint, info


Connect = Callable[[Member], Awaitable[ControlClient]]


class Supervisor:
    """Watches over loaded members, which may come and go. connect: opens a control connection to an attention worker.

    Attention workers are told the whole list of FFN workers whenever it changes, with a version that grows, so that news
    which overtakes other news does no harm.
    """

    def __init__(self, connect: Connect) -> None:
        self._members: list[Member] = []
        self._connect = connect
        self._ffn_version = 1
        self._tasks: asyncio.TaskGroup | None = None  # while it runs
        self._watches: dict[Member, asyncio.Task[None]] = {}
        self._router: Router | None = None

    async def run(self, router: Router) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as self._tasks:
            self._router = router
            for member in self._members:
                self._watches[member] = self._tasks.create_task(self._watch(member))
            self._tasks.create_task(self._watch_connections(router))

    # --- the members -----------------------------------------------------------------------------------------------

    def members(self, role: Role) -> list[Member]:
        """Those of a role, by index."""
        return sorted((member for member in self._members if member.role == role), key=lambda each: each.index)

    def add(self, member: Member) -> None:
        """Watches over it from now on. Attention workers hear of a new FFN worker by `tell_ffn`."""
        self._members.append(member)
        if self._tasks is not None:
            self._watches[member] = self._tasks.create_task(self._watch(member))

    def remove(self, member: Member) -> None:
        """It may end: nobody brings it back. Attention workers hear that an FFN worker leaves by `tell_ffn`."""
        self._members.remove(member)
        watch = self._watches.pop(member, None)
        if watch is not None:
            watch.cancel()

    def ffn_endpoints(self) -> tuple[int, dict[int, Endpoint]]:
        """Where the FFN workers listen, or listened last, by index; and the version of that."""
        ffn = self.members("ffn")
        return self._ffn_version, {
            member.index: member.endpoint for member in ffn if member.endpoint is not None
        }

    async def tell_ffn(self) -> None:
        """The list of FFN workers has changed: tells every attention worker, one that loads included: it may wait for them.

        Each of them has it in its queue when this returns, and if it confirms in time, no call under way to one that left.
        """
        self._ffn_version += 1
        await asyncio.gather(*(self._tell(member) for member in self.members("attention")))

    async def load_attention(self, member: Member) -> ControlClient:
        """Loads an attention worker and connects to it. Raises RayError or WorkerError.

        It is to be a member, and up, before anything else is awaited: until then nobody tells it of FFN workers.
        """
        version, endpoints = self.ffn_endpoints()
        endpoint, info, _ = await member.actor.load.remote(version, endpoints)
        member.serves_at(endpoint, info)
        client = await self._connect(member)
        while (
            version != self._ffn_version
        ):  # those that changed meanwhile may have been told to the process before
            version = self._ffn_version
            await self._tell(member)
        return client

    def health(self) -> list[str]:
        """One sentence for each worker that is down: which, since when, why."""
        now = time.monotonic()
        return [
            f"{member.name} has been down for {now - member.down_since:.1f} s: {member.reason}"
            for member in self._members
            if member.down_since is not None
        ]

    # --- what happens to them --------------------------------------------------------------------------------------

    async def _watch(self, member: Member) -> None:
        while True:
            try:
                await member.life
                continue
            except RayError as error:
                member.down_since = time.monotonic()
                _note(member, f"died: {first_line(error)}")
            pause_s = RETRY_AFTER_S
            while member.down_since is not None:
                try:
                    await (
                        member.actor.ping.remote()
                    )  # the new process is there, and whatever is asked now is asked of it
                    member.life = member.actor.sentinel.remote()
                    if member.role == "ffn":
                        await self._restore_ffn(member)
                    else:
                        await self._restore_attention(member)
                except (RayError, WorkerError) as error:
                    _note(member, f"is not back yet: {first_line(error)}")
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, MAX_RETRY_AFTER_S)

    async def _restore_ffn(self, member: Member) -> None:
        member.serves_at(*await member.actor.load.remote())
        await self.tell_ffn()
        _back(member)

    async def _restore_attention(self, member: Member) -> None:
        assert self._router is not None
        client = await self.load_attention(member)
        self._router.replace(member.name, client)
        _back(member)

    async def _watch_connections(self, router: Router) -> None:
        """Connects again to attention workers that live although their control connection has ended."""
        while True:
            await asyncio.sleep(RECONNECT_POLL_S)
            for member in self.members("attention"):
                if member.name not in router.lost() or member.down_since is not None:
                    continue
                try:
                    client = await self._connect(member)
                except WorkerError as error:
                    logger.warning("%s lives and cannot be reached: %s", member.name, error.problem)
                else:
                    router.replace(member.name, client)

    async def _tell(self, member: Member) -> None:
        """Tells an attention worker where the FFN workers are now.

        The call is in the worker's queue from here on. One that is slow to take it is not waited for, and one that dies
        meanwhile learns the same when it is loaded again.
        """
        try:
            async with asyncio.timeout(TELL_TIMEOUT_S):
                await member.actor.use_ffn.remote(*self.ffn_endpoints())
        except (RayError, TimeoutError) as error:
            if member.down_since is None:
                logger.warning("%s has not confirmed the new FFN workers: %s", member.name, first_line(error))


def _note(member: Member, reason: str) -> None:
    """Keeps why a member is down; the log is told when that changes."""
    if reason != member.reason:
        logger.error("%s %s", member.name, reason)
    member.reason = reason


def _back(member: Member) -> None:
    assert member.down_since is not None
    logger.warning("%s is back after %.1f s", member.name, time.monotonic() - member.down_since)
    member.down_since, member.reason = None, ""


def first_line(error: BaseException) -> str:
    """What is said of an error in a sentence. Ray's are pages long; the cause of a failed task says more than they do."""
    if isinstance(error, RayTaskError):
        error = error.cause
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
