"""One worker under watch: when it serves no more, whether it died, stands still or hangs, and when a new process is there.

What lives here: the signs of trouble. What does not: what is done about it (supervisor.py, the only caller).

Death shows by itself: the call `life` ends with the process. A process that is stopped, or whose thread hangs, does not;
it is asked every second. It has to answer within --heartbeat-timeout, and its own thread has to get on with its work. One
batch of an FFN worker may take half of --ffn-timeout, past which nobody could make use of its answer; an attention worker
may wait for one answer for --ffn-timeout and is given as much again. A worker that loads is asked, too; it is given
a little longer, because Python answers nothing while it maps a large library.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ray.exceptions import RayError, RayTaskError

from afd_server.cluster.actors import Pulse
from afd_server.cluster.recording import Recorded
from afd_server.cluster.restarts import Restarts
from afd_server.cluster.workers import WorkerInfo
from afd_server.config import ServeConfig
from afd_server.errors import WorkerFrozenError
from afd_server.transport.base import Endpoint
from afd_server.types import WorkerState

if TYPE_CHECKING:
    from afd_server.cluster.hosting import Loaded

logger = logging.getLogger(__name__)

HEARTBEAT_EVERY_S = 1.0
# Between two looks whether an answer is there. An answer is late by a number of looks, not by the clock: time in which
# this process itself stood still is nobody else's fault.
LOOK_EVERY_S = 0.25
# Shares of --ffn-timeout that a worker's thread may be at one piece of work.
FFN_STALL_SHARE = 0.5
ATTENTION_STALL_SHARE = 2.0
# For a new process to answer for the first time. It imports little; torch comes with the load.
PROCESS_TIMEOUT_S = 20.0
# The least time for an answer while a worker loads.
LOADING_HEARTBEAT_TIMEOUT_S = 10.0

Role = Literal["attention", "ffn"]
Phase = Literal["loading", "serving", "draining", "restarting"]
# frozen: the process does not answer. hung: it does, and its thread is stuck. failed: its thread ended, or a load failed.
Kind = Literal["died", "frozen", "hung", "failed", "planned"]


class Trouble(NamedTuple):
    """Why a worker serves no more."""

    kind: Kind
    reason: str


@dataclass(slots=True, eq=False)
class Member:
    """One actor of the cluster.

    index: among those of its role. life: a call that ends only with the actor's process or its worker, taken before that
    worker is loaded; None when it has ended. endpoint and info: of the last load, None before the first. pulse: of the last heartbeat, and so of
    the present process; ended: names a process that is being killed. down_since (monotonic seconds) and reason while it is not serving;
    unplaced: what it lacks to be placed; given_up: nobody brings it back. phase: what is planned for it, whatever happens to
    it meanwhile; started: how often its process has been started again.
    """

    role: Role
    index: int
    name: str
    actor: Any
    life: Any
    restarts: Restarts
    endpoint: Endpoint | None = None
    info: WorkerInfo | None = None
    pulse: Pulse | None = None
    ended: str = ""
    down_since: float | None = None
    reason: str = ""
    unplaced: str = ""
    given_up: bool = False
    phase: Phase = "loading"
    phase_since: float = field(default_factory=time.monotonic)
    started: int = 0

    def serves_at(self, endpoint: Endpoint, info: WorkerInfo) -> None:
        """It has been loaded."""
        if self.info is not None and info.pid != self.info.pid:
            self.started += 1
        self.endpoint, self.info = endpoint, info
        self.enter("serving")

    def answers(self, pulse: Pulse) -> None:
        """A process of it is there, maybe another one than before, which is watched from now on."""
        if self.life is None or self.pulse is None or pulse.process != self.pulse.process:
            self.life = self.actor.sentinel.remote()  # before anything else that is asked of it
        self.pulse = pulse

    def enter(self, phase: Phase) -> None:
        self.phase, self.phase_since = phase, time.monotonic()

    def state(self) -> WorkerState:
        """As operators see it."""
        state, since, reason = str(self.phase), self.phase_since, ""
        if self.down_since is not None and self.phase != "restarting":
            state = "down" if self.given_up or self.unplaced else "restarting"
            since, reason = self.down_since, self.unplaced or self.reason
        return WorkerState(
            self.name, self.role, state, time.monotonic() - since, self.endpoint.node if self.endpoint else None,
            self.info.pid if self.info else None, self.started, reason,
        )  # fmt: skip

    def recorded(self) -> Recorded:
        """As its hops are recorded."""
        actor = self.actor
        return Recorded(
            self.name, self.role, actor.clock.remote, actor.begin_recording.remote, actor.end_recording.remote
        )

    def problem(self, now: float) -> str:
        """What is wrong with it, since when and why, in a sentence; empty while it serves."""
        if self.down_since is None:
            return ""
        what = "cannot be placed: " + self.unplaced if self.unplaced else self.reason
        given_up = f" and is given up after {self.restarts.count} restarts" if self.given_up else ""
        return f"{self.name} has been down for {now - self.down_since:.1f} s{given_up}: {what}"


async def trouble(member: Member, config: ServeConfig) -> Trouble:
    """Returns as soon as the member serves no more."""
    signs = [
        asyncio.create_task(_last_words(member)),
        asyncio.create_task(_missed_heartbeat(member, config)),
    ]
    try:
        await asyncio.wait(signs, return_when=asyncio.FIRST_COMPLETED)
        return next(sign.result() for sign in signs if sign.done())
    finally:
        for sign in signs:
            sign.cancel()
        await asyncio.gather(*signs, return_exceptions=True)


def loading_heartbeat_timeout_s(config: ServeConfig) -> float:
    """How long a worker that loads may take to answer a heartbeat."""
    return max(config.heartbeat_timeout, LOADING_HEARTBEAT_TIMEOUT_S)


async def load(member: Member, config: ServeConfig, arguments: Callable[[], tuple[Any, ...]] = tuple) -> Loaded:
    """The member's answer to `load`. Raises RayError, and WorkerFrozenError when its process stands still before or meanwhile.

    arguments: taken when the call is made. The process may first be waited for, and what was true before that may not be now.
    """
    if await next_pulse(member, PROCESS_TIMEOUT_S) is None:
        raise WorkerFrozenError(member.name, f"no process within {PROCESS_TIMEOUT_S:g} s")
    loading = asyncio.create_task(_load(member, config, *arguments()))
    watching = asyncio.create_task(_silence(member, loading_heartbeat_timeout_s(config)))
    try:
        await asyncio.wait((loading, watching), return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            return loading.result()
        raise WorkerFrozenError(member.name, f"{watching.result()} while it loaded")
    finally:
        loading.cancel()
        watching.cancel()
        await asyncio.gather(loading, watching, return_exceptions=True)


async def _silence(member: Member, timeout_s: float) -> str:
    """Returns when a heartbeat has not been answered in time. A death is for others to notice."""
    while True:
        with contextlib.suppress(RayError):
            if await next_pulse(member, timeout_s) is None:
                return _no_answer(timeout_s)
        await asyncio.sleep(HEARTBEAT_EVERY_S)


def _no_answer(timeout_s: float) -> str:
    return f"has not answered for {timeout_s:g} s"


async def _load(member: Member, config: ServeConfig, *arguments: Any) -> Loaded:
    loaded: Loaded = await member.actor.load.remote(config, *arguments)
    return loaded


async def next_pulse(member: Member, waited_s: float) -> Pulse | None:
    """The answer to one heartbeat; None when there is none after waited_s. Raises RayError when nobody is there to ask."""
    answer = asyncio.create_task(_ask(member))
    try:
        for _ in range(max(1, round(waited_s / LOOK_EVERY_S))):
            if (await asyncio.wait({answer}, timeout=LOOK_EVERY_S))[0]:
                return answer.result()
        return None
    finally:
        answer.cancel()


async def _ask(member: Member) -> Pulse:
    pulse: Pulse = await member.actor.heartbeat.remote()
    return pulse


async def _last_words(member: Member) -> Trouble:
    try:
        reason = await member.life
    except RayError as error:
        return Trouble("died", f"died: {first_line(error)}")
    if not reason:  # another front-end has taken over the watch
        await asyncio.Event().wait()
    return Trouble("failed", reason)


async def _missed_heartbeat(member: Member, config: ServeConfig) -> Trouble:
    stalled_s = config.ffn_timeout * (FFN_STALL_SHARE if member.role == "ffn" else ATTENTION_STALL_SHARE)
    while True:
        try:
            pulse = await next_pulse(member, config.heartbeat_timeout)
        except RayError as error:  # its last words follow; if not, the network had a moment
            logger.info("a heartbeat of %s failed: %s", member.name, first_line(error))
        else:
            if pulse is None:
                return Trouble("frozen", _no_answer(config.heartbeat_timeout))
            member.pulse = pulse
            if pulse.stalled_s >= stalled_s:
                return Trouble("hung", f"its thread has been at one piece of work for {pulse.stalled_s:.1f} s")
        await asyncio.sleep(HEARTBEAT_EVERY_S)


def first_line(error: BaseException) -> str:
    """What is said of an error in a sentence. Ray's are pages long; the cause of a failed task says more than they do."""
    if isinstance(error, RayTaskError):
        error = error.cause
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1] if is_final(error) else lines[0]  # a constructor's traceback ends in the cause


def is_final(error: BaseException) -> bool:
    """Whether the actor's constructor raised. Ray starts no other process then; after any other death it does, although it
    may call the actor dead until it knows better."""
    return "creation task" in str(error)
