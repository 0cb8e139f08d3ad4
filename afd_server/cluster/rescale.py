"""Changes of a running server's workers: more of them, fewer of them, each of them anew, and no request fails of it.

What lives here: the order of things. Whoever comes is loaded before anybody is told of it; whoever goes gets no new work and
ends what it has, and what takes too long is moved. What does not: placing and ending processes (ray_cluster.py), the watch
over them (supervisor.py), the requests (router/). One change at a time, on the front-end's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from typing import Any, Protocol

from ray.exceptions import RayError

from afd_server.cluster.layout import with_workers
from afd_server.cluster.placement import Deadline
from afd_server.cluster.supervisor import Supervisor, tell
from afd_server.cluster.watch import Member, Role, first_line, load
from afd_server.config import ServeConfig
from afd_server.errors import CannotScaleError, ChangeUnderWayError, ServingError
from afd_server.router.router import Router

logger = logging.getLogger(__name__)

# How long a restart looks for room for a successor before it goes without.
ROOM_TIMEOUT_S = 2.0


class Staff(Protocol):
    """Who has processes to give: ray_cluster.RayCluster. Both may block."""

    def create(
        self, workers: Sequence[tuple[Role, int]], config: ServeConfig, deadline: Deadline
    ) -> list[Member]:
        """Places workers and starts their processes, all or none. Raises StartError. config: with their numbers to be."""

    def dismiss(self, member: Member) -> None:
        """Ends a worker that is no member any more, and gives its place back."""


class Rescaler:
    """under_way: the change that is being made, in words; empty when there is none."""

    def __init__(self, config: ServeConfig, staff: Staff, supervisor: Supervisor, router: Router) -> None:
        self._config = config
        self._staff = staff
        self._supervisor = supervisor
        self._router = router
        ep, tp = config.ffn_shards
        self._shards = ep * tp
        self._apart: list[Member] = []  # coming or going: nobody watches over them
        self.under_way = ""

    def members(self) -> list[Member]:
        """All of them, by role and index."""
        return sorted([*self._supervisor.all_members(), *self._apart], key=lambda each: (each.role, each.index))

    async def scale(self, attention_workers: int | None, ffn_replicas: int | None) -> None:
        """Returns when there are so many; None leaves a number as it is.

        Raises ChangeUnderWayError, and CannotScaleError with the first cause: then nothing has changed.
        """
        attention, replicas = self._supervisor.members("attention"), self._replicas()
        num_attention = len(attention) if attention_workers is None else attention_workers
        num_replicas = len(replicas) if ffn_replicas is None else ffn_replicas
        with self._exclusively(f"scaling to {num_attention} attention workers and {num_replicas} FFN replicas"):
            new_attention = _unused([each.index for each in attention], num_attention - len(attention))
            new_replicas = _unused(list(replicas), num_replicas - len(replicas))
            await self._add(new_replicas, new_attention, num_attention, num_replicas)
            surplus = _dispensable(attention, len(attention) - num_attention)
            for first in _dispensable([group[0] for group in replicas.values()], len(replicas) - num_replicas):
                surplus += replicas[first.index // self._shards]
            await self._remove(surplus)
            await self._share_hosts(num_attention, num_replicas)

    async def restart(self) -> None:
        """Returns when every worker that there was has a new process.

        Attention workers get a successor first where there is room, and else, as FFN workers do, a new process in their
        place: others do their work meanwhile, or it waits. Raises ChangeUnderWayError, and WorkerError when one does not
        come back.
        """
        with self._exclusively("restarting every worker"):
            for member in self._supervisor.members("attention"):
                try:
                    await self._succeed(member)
                except CannotScaleError as error:
                    logger.info("%s is restarted in its place: %s", member.name, error)
                    await self._router.drain(member.name, self._config.drain_timeout)
                    await self._supervisor.restart(member)
            for member in self._supervisor.members("ffn"):
                if self._has_stand_in(member):
                    member.enter("draining")
                    await self._supervisor.tell_ffn()
                await self._supervisor.restart(member)

    # --- inside ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _exclusively(self, what: str) -> Iterator[None]:
        if self.under_way:
            raise ChangeUnderWayError(f"another change is under way: {self.under_way}")
        self.under_way = what
        logger.info("begun: %s", what)
        try:
            yield
            logger.info("done: %s", what)
        finally:
            self.under_way = ""

    def _replicas(self) -> dict[int, list[Member]]:
        """The workers of each FFN replica, by the replica's number."""
        replicas: dict[int, list[Member]] = {}
        for member in self._supervisor.members("ffn"):
            replicas.setdefault(member.index // self._shards, []).append(member)
        return replicas

    def _has_stand_in(self, member: Member) -> bool:
        """Whether another FFN worker serves the same shard."""
        return any(
            other is not member
            and other.down_since is None
            and (other.index - member.index) % self._shards == 0
            for other in self._supervisor.members("ffn")
        )

    async def _succeed(self, member: Member) -> None:
        """Another attention worker takes a member's place. Raises CannotScaleError when there is no room for one."""
        members, replicas = self._supervisor.members("attention"), self._replicas()
        new = _unused([each.index for each in members], 1)
        room_timeout_s = min(ROOM_TIMEOUT_S, self._config.placement_timeout)
        await self._add([], new, len(members), len(replicas), room_timeout_s)
        await self._remove([member])

    async def _add(
        self,
        replicas: Sequence[int],
        attention: Sequence[int],
        num_attention: int,
        num_replicas: int,
        placement_timeout_s: float | None = None,
    ) -> None:
        """Brings up FFN replicas and attention workers of these numbers, all or none. Raises CannotScaleError.

        num_attention, num_replicas: how many there will be in all, by which they share what the machine has.
        """
        wanted: list[tuple[Role, int]] = [
            *(("ffn", replica * self._shards + shard) for replica in replicas for shard in range(self._shards)),
            *(("attention", index) for index in attention),
        ]  # fmt: skip
        if not wanted:
            return
        before = self._supervisor.config
        config = self._supervisor.config = with_workers(self._config, num_attention, num_replicas)
        deadline = Deadline(placement_timeout_s or self._config.placement_timeout, threading.Event())
        new: list[Member] = []
        try:
            new = await asyncio.to_thread(self._staff.create, wanted, config, deadline)
            self._apart += new
            async with asyncio.timeout(self._config.start_timeout):
                await _all(self._load_ffn(member) for member in new if member.role == "ffn")
                if replicas:
                    await self._supervisor.tell_ffn()
                await _all(self._load_attention(member) for member in new if member.role == "attention")
        except (ServingError, RayError, TimeoutError) as error:
            late = f"not loaded within {self._config.start_timeout:g} s (see --start-timeout)"
            reason = late if isinstance(error, TimeoutError) else first_line(error)
            self._supervisor.config = before
            await self._remove(new)
            raise CannotScaleError(f"nothing has changed: {reason}") from None

    async def _load_ffn(self, member: Member) -> None:
        endpoint, info, _ = await load(member, self._supervisor.config)
        member.serves_at(endpoint, info)
        self._admit(member)

    async def _load_attention(self, member: Member) -> None:
        client = await self._supervisor.load_attention(member)
        self._admit(member)
        self._router.add(client)

    def _admit(self, member: Member) -> None:
        self._apart.remove(member)
        self._supervisor.add(member)

    async def _share_hosts(self, num_attention: int, num_replicas: int) -> None:
        """Tells every worker how many there are now: by that they share the cores of their hosts, from their next step on."""
        config = self._supervisor.config = with_workers(self._config, num_attention, num_replicas)
        await asyncio.gather(
            *(
                tell(member, member.actor.share_host.remote(config), "the new numbers of workers")
                for member in self._supervisor.all_members()
            )
        )

    async def _remove(self, members: Sequence[Member]) -> None:
        """Takes workers out of service, whether they are in it already or not; of FFN workers, whole replicas."""
        serving = [member for member in members if member not in self._apart]
        for member in members:
            member.enter("draining")
        attention = [member for member in serving if member.role == "attention"]
        await asyncio.gather(*(self._router.drain(each.name, self._config.drain_timeout) for each in attention))
        if len(attention) < len(serving):
            await self._supervisor.tell_ffn()
        for member in serving:
            self._supervisor.remove(member)
            self._apart.append(member)
        for member in attention:
            self._router.remove(member.name)
        await asyncio.gather(*(asyncio.to_thread(self._staff.dismiss, member) for member in members))
        for member in members:
            self._apart.remove(member)


def _unused(used: Sequence[int], number: int) -> list[int]:
    """The lowest numbers that are free."""
    free = [index for index in range(len(used) + max(0, number)) if index not in used]
    return free[: max(0, number)]


def _dispensable(members: Sequence[Member], number: int) -> list[Member]:
    """Those to do without: first those that are down, then the highest numbers."""
    by_use = sorted(members, key=lambda each: (each.down_since is None, -each.index))
    return by_use[: max(0, number)]


async def _all(loads: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Waits for all of them, then raises the first failure."""
    for result in await asyncio.gather(*loads, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
