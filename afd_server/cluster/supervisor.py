"""The watch over a server's actors: every death and every freeze is noticed, and whoever died is brought back.

What lives here: the course of a restart, and its end when the restarts are used up (restarts.py has the account). Ray
starts the process of a dead actor again, empty; here it is loaded, and its peers are told. What does not: how trouble
shows (watch.py), the first start and the end (ray_cluster.py), what the requests of a dead worker do meanwhile (router/,
attention/ffn_group.py). Runs on the front-end's event loop. Whatever happens to one worker, at any moment of its restart,
is no reason to leave the others alone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Sequence
from contextvars import Context
from typing import Protocol

from ray.exceptions import RayError

from afd_server.cluster.actors import FFNList
from afd_server.cluster.watch import (
    PROCESS_TIMEOUT_S,
    Kind,
    Member,
    Role,
    first_line,
    is_final,
    load,
    next_pulse,
    trouble,
)
from afd_server.config import ServeConfig
from afd_server.errors import WorkerError, WorkerFrozenError
from afd_server.router.router import Router
from afd_server.telemetry.worker_metrics import WorkerMetrics
from afd_server.transport.control import ControlClient

logger = logging.getLogger(__name__)

# Between two looks for a new process, or for attention workers that live and are not connected.
NEW_PROCESS_POLL_S = 0.2
RECONNECT_POLL_S = 1.0
# How long a new process may take before it is asked why.
EXPLAIN_AFTER_S = 2.0
# How long a worker may take to hear of another one's restart before the next ones go on without it.
TELL_TIMEOUT_S = 10.0


class Processes(Protocol):
    """The actors' processes, as Ray has them."""

    async def connect_to(self, member: Member) -> ControlClient:
        """A control connection to an attention worker. Raises WorkerError."""

    def end(self, member: Member, *, restart: bool) -> None:
        """Ends the process for certain, also one that is stopped. restart: whether Ray is to start another."""

    def why_unplaced(self, member: Member) -> str:
        """What is missing in the cluster for the member to be placed; empty when it has its place. One that has given its place
        back, as an orphan does, gets another. May block."""


class Supervisor:
    """Watches over loaded members, which may come and go. config: with the numbers of workers that there are, or will be.

    Attention workers are told the whole list of FFN workers whenever it changes, with a version that grows, so that news
    which overtakes other news does no harm.
    """

    def __init__(self, config: ServeConfig, processes: Processes, ffn_version: int = 0) -> None:
        self.config = config
        self._processes = processes
        self._members: list[Member] = []
        self._ffn_version = ffn_version + 1
        self._tasks: asyncio.TaskGroup | None = None  # while it runs
        self._watches: dict[Member, asyncio.Task[None]] = {}
        self._loading: set[Member] = set()  # attention workers, members or to become ones
        self._router: Router | None = None
        self._metrics: WorkerMetrics | None = None

    async def run(self, router: Router, metrics: WorkerMetrics) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as self._tasks:
            self._router, self._metrics = router, metrics
            for member in self._members:
                self._start_watch(member)
            self._tasks.create_task(self._watch_connections(router))

    # --- the members -----------------------------------------------------------------------------------------------

    def members(self, role: Role) -> list[Member]:
        """Those of a role, by index."""
        return sorted((member for member in self._members if member.role == role), key=lambda each: each.index)

    def all_members(self) -> list[Member]:
        return [*self.members("attention"), *self.members("ffn")]

    def add(self, member: Member) -> None:
        """Watches over it from now on. Attention workers hear of a new FFN worker by `tell_ffn`."""
        self._members.append(member)
        if self._tasks is not None:
            self._start_watch(member)

    def remove(self, member: Member) -> None:
        """It may end: nobody brings it back. Attention workers hear that an FFN worker leaves by `tell_ffn`."""
        self._members.remove(member)
        watch = self._watches.pop(member, None)
        if watch is not None:
            watch.cancel()
        if self._metrics is not None:
            self._metrics.forget(member.name)

    def ffn_list(self) -> FFNList:
        now, ffn = time.monotonic(), self.members("ffn")
        return FFNList(
            self._ffn_version,
            {each.index: each.endpoint for each in ffn if each.endpoint and each.phase != "draining"},
            {each.index: each.problem(now) for each in ffn if each.given_up},
            {each.index: each.unplaced for each in ffn if each.unplaced},
        )

    async def tell_ffn(self) -> None:
        """The list of FFN workers has changed: tells every attention worker, one that loads included: it may wait for them.

        Each of them has it in its queue when this returns, and if it confirms in time, no call under way to one that left.
        """
        self._ffn_version += 1
        listeners = {*self.members("attention"), *self._loading}
        await asyncio.gather(*(self._tell(member) for member in listeners))

    async def load_attention(self, member: Member) -> ControlClient:
        """Loads an attention worker and connects to it. Raises RayError or WorkerError.

        It is to be a member, and up, before anything else is awaited: until then nobody tells it of FFN workers.
        """
        version = 0  # of the list that the process knows for certain

        def list_of_ffn() -> tuple[FFNList]:
            nonlocal version
            # From here on it hears of changes: it may wait for FFN workers that restart meanwhile.
            self._loading.add(member)
            version = self._ffn_version
            return (self.ffn_list(),)

        try:
            endpoint, info, _ = await load(member, self.config, list_of_ffn)
        finally:
            self._loading.discard(member)
        member.serves_at(endpoint, info)
        client = await self._processes.connect_to(member)
        while version != self._ffn_version:  # what changed meanwhile may have been told to the process before
            version = self._ffn_version
            await self._tell(member)
        return client

    # --- what others may know --------------------------------------------------------------------------------------

    def health(self) -> list[str]:
        """One sentence for each worker that is down: which, since when, why."""
        return _problems(self._members)

    def is_serving(self) -> bool:
        """Whether requests get on: there is an attention worker, and a worker for every FFN shard."""
        return all(any(member.down_since is None for member in needed) for needed in self._one_of_each())

    def refusal(self) -> str:
        """Why no request can be served any more, in a sentence; empty as long as there is hope."""
        for needed in self._one_of_each():
            if all(member.given_up for member in needed):
                return "; ".join(_problems(needed))
        return ""

    def _one_of_each(self) -> list[list[Member]]:
        """The attention workers, and the FFN workers of each shard: of each of these groups somebody is needed."""
        ep, tp = self.config.ffn_shards
        ffn = self.members("ffn")
        shards = [[member for member in ffn if member.index % (ep * tp) == shard] for shard in range(ep * tp)]
        return [self.members("attention"), *shards]

    # --- what happens to them --------------------------------------------------------------------------------------

    def _start_watch(self, member: Member) -> None:
        assert self._tasks is not None and self._metrics is not None
        self._watches[member] = self._tasks.create_task(self._watch(member), context=Context())
        self._metrics.up(member.name, member.role)

    async def _watch(self, member: Member) -> None:
        while True:
            kind, reason = await trouble(member, self.config)
            member.life = None
            planned = member.phase == "restarting"
            self._goes_down(member, "is being restarted" if planned else reason)
            if kind == "died":
                member.pulse = None
            else:
                self._end(member, restart=True)
            if planned:
                kind = "planned"
                member.restarts.allow()
            if not await self._bring_back(member, kind):
                return

    async def restart(self, member: Member) -> None:
        """Ends a member's process; returns when its next one serves. Raises WorkerError if it is given up instead.

        It costs none of its restarts. What it was doing is done again, by others or by the new process.
        """
        member.enter("restarting")
        self._end(member, restart=True)
        while member.phase == "restarting" or member.down_since is not None:
            if member.given_up:
                raise WorkerError(member.name, member.reason)
            await asyncio.sleep(NEW_PROCESS_POLL_S)

    async def _bring_back(self, member: Member, kind: Kind) -> bool:
        """Whether the member serves again. Only its own troubles are counted against it."""
        assert self._metrics is not None
        while not member.restarts.used_up:
            await asyncio.sleep(member.restarts.pause_s)
            member.restarts.begin()
            self._metrics.restarted(member.name, kind)
            try:
                await self._find_process(member)
                await self._hopeful_ffn(member)
                restore = self._restore_ffn if member.role == "ffn" else self._restore_attention
                async with asyncio.timeout(self.config.start_timeout):
                    await restore(member)
                return True
            except (TimeoutError, WorkerFrozenError) as error:
                kind, reason = _lateness(error, self.config.start_timeout)
                _note(member, reason)
                self._end(member, restart=True)
            except (RayError, WorkerError) as error:
                kind = "failed"
                _note(member, f"is not back yet: {first_line(error)}")
                if member.role == "attention" and self._missing_ffn():  # it could not succeed
                    member.restarts.take_back()
        await self._give_up(member)
        return False

    async def _find_process(self, member: Member) -> None:
        """Returns when the member has a process, and not one that is being killed. Raises WorkerFrozenError if there is
        none in time, and RayError if there will be none.

        Ray may look for a place for as long as it takes, which is said with what is missing, and costs no restart.
        """
        since = time.monotonic()
        while not await self._has_process(member):
            if (now := time.monotonic()) - since >= EXPLAIN_AFTER_S:
                self._say_unplaced(member, await asyncio.to_thread(self._processes.why_unplaced, member))
            if member.unplaced:
                since = now - EXPLAIN_AFTER_S
            elif now - since >= PROCESS_TIMEOUT_S:
                raise WorkerFrozenError(member.name, f"no process within {PROCESS_TIMEOUT_S:g} s")
            await asyncio.sleep(NEW_PROCESS_POLL_S)
        self._say_unplaced(member, "")

    async def _has_process(self, member: Member) -> bool:
        try:
            pulse = await next_pulse(member, EXPLAIN_AFTER_S)
        except RayError as error:
            if is_final(error):
                raise
            return False
        if pulse is None or pulse.process == member.ended:
            return False
        member.answers(pulse)
        return True

    async def _hopeful_ffn(self, member: Member) -> None:
        """An attention worker is loaded when there is an FFN side to connect to, or is about to be."""
        while member.role == "attention" and (
            missing := [ffn for ffn in self._missing_ffn() if ffn.given_up or ffn.unplaced]
        ):
            _note(member, f"waits for {', '.join(ffn.name for ffn in missing)}")
            await asyncio.sleep(NEW_PROCESS_POLL_S)

    def _missing_ffn(self) -> list[Member]:
        """The workers of FFN shards that nobody serves."""
        shards = self._one_of_each()[1:]
        return [
            member for shard in shards if all(each.down_since is not None for each in shard) for member in shard
        ]

    async def _give_up(self, member: Member) -> None:
        assert self._router is not None
        member.given_up = True
        self._end(member, restart=False)
        (sentence,) = _problems([member])
        logger.error("%s (see --max-restarts)", sentence)
        if member.role == "ffn":
            await self.tell_ffn()
        else:
            self._router.give_up(member.name, sentence)

    def _end(self, member: Member, *, restart: bool) -> None:
        if member.pulse is not None:
            member.ended = member.pulse.process
        self._processes.end(member, restart=restart)
        member.pulse = None

    def _goes_down(self, member: Member, reason: str) -> None:
        assert self._metrics is not None
        member.down_since = time.monotonic()
        member.restarts.down(member.down_since)
        self._metrics.down(member.name, member.role)
        _note(member, reason)

    def _comes_back(self, member: Member) -> None:
        assert self._metrics is not None and member.down_since is not None
        now = time.monotonic()
        logger.warning("%s is back after %.1f s", member.name, now - member.down_since)
        self._metrics.recovered(member.name, member.role, now - member.down_since)
        member.down_since, member.reason = None, ""
        member.restarts.up(now)

    def _say_unplaced(self, member: Member, missing: str) -> None:
        assert self._metrics is not None and self._tasks is not None
        if missing != member.unplaced:
            member.unplaced = missing
            self._metrics.unplaced(member.name, missing)
            if missing:
                logger.error("%s cannot be placed: %s", member.name, missing)
            else:
                logger.warning("%s has been placed", member.name)
            if member.role == "ffn":  # for the errors of requests that wait for it
                self._tasks.create_task(self.tell_ffn())

    async def _restore_ffn(self, member: Member) -> None:
        endpoint, info, _ = await load(member, self.config)
        member.serves_at(endpoint, info)
        await self.tell_ffn()
        self._comes_back(member)

    async def _restore_attention(self, member: Member) -> None:
        assert self._router is not None
        client = await self.load_attention(member)
        self._router.replace(member.name, client)
        self._comes_back(member)

    async def _watch_connections(self, router: Router) -> None:
        """Connects again to attention workers that live although their control connection has ended."""
        while True:
            await asyncio.sleep(RECONNECT_POLL_S)
            for member in self.members("attention"):
                if member.name not in router.lost() or member.down_since is not None:
                    continue
                try:
                    client = await self._processes.connect_to(member)
                except WorkerError as error:
                    logger.warning("%s lives and cannot be reached: %s", member.name, error.problem)
                else:
                    router.replace(member.name, client)

    async def _tell(self, member: Member) -> None:
        """Tells an attention worker where the FFN workers are now.

        The call is in the worker's queue from here on.
        """
        await tell(member, member.actor.use_ffn.remote(self.ffn_list()), "the new FFN workers")


async def tell(member: Member, call: Awaitable[None], news: str) -> None:
    """Waits for a worker's answer to news. One that is slow to take them is not waited for, and one that dies meanwhile learns the
    same when it is loaded again."""
    try:
        async with asyncio.timeout(TELL_TIMEOUT_S):
            await call
    except (RayError, TimeoutError) as error:
        if member.down_since is None:
            logger.warning("%s has not confirmed %s: %s", member.name, news, first_line(error))


def _lateness(error: TimeoutError | WorkerFrozenError, start_timeout_s: float) -> tuple[Kind, str]:
    """Of a process that does not become a worker in time."""
    if isinstance(error, WorkerFrozenError):
        return "frozen", error.problem
    return "hung", f"has not loaded within {start_timeout_s:g} s (see --start-timeout)"


def _note(member: Member, reason: str) -> None:
    """Keeps why a member is down; the log is told when that changes."""
    if reason != member.reason:
        logger.log(
            logging.INFO if member.phase == "restarting" else logging.ERROR, "%s %s", member.name, reason
        )
    member.reason = reason


def _problems(members: Sequence[Member]) -> list[str]:
    now = time.monotonic()
    return [sentence for member in members if (sentence := member.problem(now))]
