"""Doing the faults of a schedule to a real server, and seeing that it has recovered from them.

What is seen is what an operator sees: processes, and /health. What does not live here: which faults (schedule.py).
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx
import psutil

from tests.chaos.clients import FrontEnd
from tests.chaos.schedule import Blow, Change, Fault, Layout, Role
from tests.server_process import Server

# For a restart on a machine that is busy with something else.
RECOVERY_TIMEOUT_S = 180.0
POLL_S = 0.05
# All of these are 0 when nothing is under way.
IDLE_METRICS = ("afd:num_requests_running", "afd:num_requests_waiting", "afd:kv_cache_usage_perc")
ACTORS = {Role.ATTENTION: "Attention", Role.FFN: "FFN"}


class NotRecoveredError(AssertionError):
    """The server is not whole again. Says what is missing."""


@dataclass(slots=True)
class Done:
    """A fault that was done. detected_s and recovered_s count from the first and from the last kill; None for a stop.

    killed: the processes that are gone now, those that were frozen and then killed by the server included.
    """

    fault: Fault
    killed: list[int] = field(default_factory=list)
    detected_s: float | None = None
    recovered_s: float | None = None


class Machine:
    """A server whose workers are to be harmed, and its front-end. What clients know of the latter is `front_end`."""

    def __init__(self, server: Server, layout: Layout, http: httpx.AsyncClient) -> None:
        self.server = server
        self.front_end = FrontEnd()
        self._layout = layout
        self._http = http

    def pids(self, role: Role) -> list[int]:
        """The processes of a role's workers, oldest first."""
        return sorted(self.server.pids(ACTORS[role]), key=_created_at)

    async def work_left(self) -> str:
        """What the server's metrics say is still under way or held; empty when it is idle."""
        text = (await self._http.get("/metrics")).text
        left = {name: value for name in IDLE_METRICS if (value := _total(text, name))}
        return ", ".join(f"{name} {value:g}" for name, value in left.items())

    async def harm(self, fault: Fault) -> Done:
        """Does a fault and waits until the server is whole again. Raises NotRecoveredError."""
        done = Done(fault)
        await asyncio.sleep(fault.pause_s)
        changing = asyncio.create_task(self._change(fault.changes))
        first_kill = last_kill = 0.0
        watch: asyncio.Task[float] | None = None
        stopped = []
        for blow in fault.blows:
            await asyncio.sleep(blow.delay_s)
            pid = self._victim(blow)
            if pid is None:
                continue  # between its end and its restart: there is nobody to harm
            if not blow.ends_it:
                stopped.append(asyncio.create_task(_stop_for(pid, blow.stopped_s)))
                continue
            os.kill(pid, signal.SIGSTOP if blow.stopped_s else signal.SIGKILL)
            last_kill = time.monotonic()
            done.killed.append(pid)
            if watch is None and not fault.kills_front_end:
                first_kill = last_kill
                watch = asyncio.create_task(self._detected())
        await asyncio.gather(*stopped)
        if fault.kills_front_end:
            last_kill = time.monotonic()
            await self._kill_front_end(done)
        if watch is not None:
            done.detected_s = await watch - first_kill
        try:
            answers = await changing
        except httpx.HTTPError as error:
            raise NotRecoveredError(f"a change has not ended: {type(error).__name__} {error}") from None
        if not fault.blows and any(answer.status_code != 200 for answer in answers):
            raise NotRecoveredError(f"a change was refused: {[answer.text for answer in answers]}")
        if fault.ends_workers or fault.kills_front_end:
            done.recovered_s = await self.whole_again(done.killed) - last_kill
        elif answers:
            await self.whole_again()
        return done

    async def _kill_front_end(self, done: Done) -> None:
        """Gives the same command again after the kill. Raises NotRecoveredError when that one does not come up, or has
        ended workers that were there."""
        left = {pid for role in Role for pid in self.pids(role)} - set(done.killed)
        done.killed.append(self.server.process.pid)
        self.front_end.is_killed()
        try:
            await asyncio.to_thread(self.server.kill_and_start_again)
        except AssertionError as error:
            raise NotRecoveredError(f"the front-end is not back: {error}") from None
        finally:
            self.front_end.up.set()
        lost = left - {pid for role in Role for pid in self.pids(role)}
        if lost:
            raise NotRecoveredError(f"the new front-end has ended workers that were there: {sorted(lost)}")

    async def _change(self, changes: Sequence[Change]) -> list[httpx.Response]:
        """Asks for one after the other; each is over when its answer comes. One that is disturbed may fail."""
        return [await self._http.post(change.route, json=dict(change.numbers) or None) for change in changes]

    async def whole_again(self, gone: list[int] = []) -> float:  # noqa: B006
        """When every worker is there, none of them one of `gone`, and /health has no complaint."""
        deadline = time.monotonic() + RECOVERY_TIMEOUT_S
        missing = ""
        while time.monotonic() < deadline:
            missing = await self._missing(gone)
            if not missing:
                return time.monotonic()
            await asyncio.sleep(POLL_S)
        raise NotRecoveredError(f"not whole again after {RECOVERY_TIMEOUT_S:g} s: {missing}")

    async def _missing(self, gone: list[int]) -> str:
        problems = await self._problems()
        if problems:
            return problems
        for role in Role:
            pids = self.pids(role)
            if len(pids) != self._layout.workers(role) or set(pids) & set(gone):
                return f"{role}: processes {pids}, {self._layout.workers(role)} expected, {gone} were killed"
        return ""

    async def _detected(self) -> float:
        deadline = time.monotonic() + RECOVERY_TIMEOUT_S
        while time.monotonic() < deadline:
            if await self._problems():
                return time.monotonic()
            await asyncio.sleep(POLL_S)
        raise NotRecoveredError("/health has not noticed a death")

    async def _problems(self) -> str:
        """What /health complains of. One replica of two that is down is a problem, too, although requests are served."""
        return "; ".join((await self._http.get("/health")).json().get("problems", []))

    def _victim(self, blow: Blow) -> int | None:
        pids = self.pids(blow.role)
        return pids[blow.place % len(pids)] if pids else None


def _total(exposition: str, name: str) -> float:
    samples = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", exposition, re.M)
    assert samples, f"there is no metric {name}"
    return sum(map(float, samples))


async def _stop_for(pid: int, seconds: float) -> None:
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        os.kill(pid, signal.SIGCONT)


def _created_at(pid: int) -> float:
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return float("inf")
