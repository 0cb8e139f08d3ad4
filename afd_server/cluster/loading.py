"""A start's wait for workers that are placed: first for their processes, then for what they load.

What lives here: the first cause, in a sentence, and the deadlines. What does not: where workers are placed (placement.py)
and how one is brought back later (supervisor.py). Called by ray_cluster.py.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from afd_server.cluster.placement import START_POLL_S, Deadline
from afd_server.cluster.watch import (
    PROCESS_TIMEOUT_S,
    Member,
    first_line,
    is_final,
    loading_heartbeat_timeout_s,
)
from afd_server.config import ServeConfig
from afd_server.errors import StartError


def wait_for_processes(members: Sequence[Member], cancelled: threading.Event) -> None:
    """Returns when every member's process answers. Raises StartError when no further one comes within PROCESS_TIMEOUT_S."""
    waiting = {member.actor.heartbeat.remote(): member for member in members}
    deadline = Deadline(PROCESS_TIMEOUT_S, cancelled)
    while waiting:
        # A process that cannot start is tried again and again by Ray, which says so in its log only.
        problem = f"no process within {PROCESS_TIMEOUT_S:g} s (see worker-*.err in /tmp/ray/session_latest/logs of its node)"
        for member, pulse in _answers(waiting, deadline, problem):
            member.pulse = pulse
            deadline = Deadline(PROCESS_TIMEOUT_S, cancelled)  # they may share few cores


def load_all(
    members: Sequence[Member],
    deadline: Deadline,
    config: ServeConfig,
    *arguments: Any,
    everyone: Sequence[Member],
) -> list[Any]:
    """Every member's answer to `load`. Raises StartError. everyone: the workers that have to be there meanwhile, all of them."""
    waiting = {member.actor.load.remote(config, *arguments): member for member in members}
    problem = f"not loaded within {deadline.timeout_s:g} s (raise --start-timeout)"
    heartbeats = [_Heartbeat(member, loading_heartbeat_timeout_s(config)) for member in everyone]
    results: dict[str, Any] = {}
    while waiting:
        answered = _answers(waiting, deadline, problem)
        results |= {member.name: loaded for member, loaded in answered}
        for heartbeat in heartbeats if not answered else ():
            heartbeat.check()
    return [results[member.name] for member in members]


class _Heartbeat:
    """Asks a worker again and again. That also tells it that it is no orphan."""

    def __init__(self, member: Member, timeout_s: float) -> None:
        self._member, self._timeout_s = member, timeout_s
        self._ask()

    def _ask(self) -> None:
        self._asked, self._looks = self._member.actor.heartbeat.remote(), 0

    def check(self) -> None:
        """A look at the answer, one every START_POLL_S. Raises StartError when there has been none for too long; a death shows elsewhere."""
        if ray.wait([self._asked], timeout=0)[0]:
            self._ask()
            return
        self._looks += 1  # by looks, not by the clock: see watch.LOOK_EVERY_S
        if self._looks * START_POLL_S >= self._timeout_s:
            raise StartError(f"{self._member.name}: has not answered for {self._timeout_s:g} s while it loaded")


def _answers(waiting: dict[Any, Member], deadline: Deadline, problem: str) -> list[tuple[Member, Any]]:
    """The calls that have been answered, which wait no longer; [] after a moment. The first failure raises StartError, and so
    does the deadline, with this problem."""
    ready, _ = ray.wait(list(waiting), timeout=START_POLL_S)
    if not ready:
        names = ", ".join(member.name for member in waiting.values())
        deadline.check(f"{names}: {problem}")
    return [(member := waiting.pop(call), _answer(member, call)) for call in ready]


def _answer(member: Member, call: Any) -> Any:
    try:
        return ray.get(call)
    except RayTaskError as error:
        raise StartError(f"{member.name}: {first_line(error)}") from None
    except RayError as error:
        raise StartError(f"{member.name}: {_why_ended(error)}") from None


def _why_ended(error: RayError) -> str:
    """Of a process that is gone. One that raised in its constructor has left a traceback, whose last line is the cause."""
    if is_final(error):
        return first_line(error)
    return (
        "its process ended while it loaded: killed, maybe for want of memory, or crashed (the log may say more)"
    )
