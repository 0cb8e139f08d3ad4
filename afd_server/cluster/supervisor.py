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
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError, RayTaskError

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


@dataclass(slots=True, eq=False)
class Member:
    """One actor of the cluster.

    life: a call that ends only with the actor's process, taken before that process is loaded. down_since (monotonic
    seconds) and reason while it is not serving.
    """

    name: str
    actor: Any
    life: Any
    endpoint: Endpoint | None = None
    down_since: float | None = None
    reason: str = ""


Connect = Callable[[Member], Awaitable[ControlClient]]


class Supervisor:
    """Watches over loaded members. connect: opens a control connection to an attention worker."""

    def __init__(self, ffn: Sequence[Member], attention: Sequence[Member], connect: Connect) -> None:
        self._ffn = ffn
        self._attention = attention
        self._connect = connect

    async def run(self, router: Router) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as watches:
            for index, member in enumerate(self._ffn):
                watches.create_task(self._watch(member, lambda at=index: self._restore_ffn(at)))  # type: ignore[misc]
            for member in self._attention:
                watches.create_task(self._watch(member, lambda of=member: self._restore_attention(of, router)))  # type: ignore[misc]
            watches.create_task(self._watch_connections(router))

    def health(self) -> list[str]:
        """One sentence for each worker that is down: which, since when, why."""
        now = time.monotonic()
        return [
            f"{member.name} has been down for {now - member.down_since:.1f} s: {member.reason}"
            for member in (*self._ffn, *self._attention)
            if member.down_since is not None
        ]

    async def _watch(self, member: Member, restore: Callable[[], Awaitable[None]]) -> None:
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
                    await restore()
                except (RayError, WorkerError) as error:
                    _note(member, f"is not back yet: {first_line(error)}")
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, MAX_RETRY_AFTER_S)

    async def _restore_ffn(self, index: int) -> None:
        member = self._ffn[index]
        member.endpoint, _ = await member.actor.load.remote()
        alive = [attention for attention in self._attention if attention.down_since is None]
        await asyncio.gather(*(_tell(attention, index, member.endpoint) for attention in alive))
        _back(member)

    async def _restore_attention(self, member: Member, router: Router) -> None:
        told = self.ffn_endpoints()
        member.endpoint, _, _ = await member.actor.load.remote(told)
        client = await self._connect(member)
        # FFN workers that were restarted while this one was loading have told only those that were up.
        while (now := self.ffn_endpoints()) != told:
            changed = [index for index, endpoint in enumerate(now) if endpoint != told[index]]
            await asyncio.gather(*(_tell(member, index, now[index]) for index in changed))
            told = now
        router.replace(member.name, client)
        _back(member)

    def ffn_endpoints(self) -> list[Endpoint]:
        """Where the FFN workers listen, or listened last, by index."""
        return [member.endpoint for member in self._ffn if member.endpoint is not None]

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


async def _tell(member: Member, index: int, endpoint: Endpoint) -> None:
    """Tells an attention worker where FFN worker `index` is now.

    The call is in the worker's queue from here on. One that is slow to take it is not waited for, and one that dies
    meanwhile learns the same when it is loaded again.
    """
    try:
        async with asyncio.timeout(TELL_TIMEOUT_S):
            await member.actor.replace_ffn.remote(index, endpoint)
    except (RayError, TimeoutError) as error:
        logger.warning(
            "%s has not confirmed the restart of FFN worker %d: %s", member.name, index, first_line(error)
        )


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
