"""What goes wrong and when, from a seed: pure data. How a fault is done to a process is faults.py's business.

No moment is a time of day: a fault comes a while after the one before it, and most wait until the server has recovered
from that. So a slow machine runs the same faults in the same order, only later.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    ATTENTION = "attention"
    FFN = "ffn"


class Kind(StrEnum):
    """Every kind of fault; its value is its name in the report."""

    KILL_FFN = "kill an FFN worker"
    KILL_ATTENTION = "kill an attention worker"
    KILL_BOTH = "kill one of each at once"
    KILL_AGAIN = "kill a worker, then kill while it restarts"
    KILL_ALL = "kill every worker"
    FREEZE_FFN = "freeze an FFN worker"
    FREEZE_ATTENTION = "freeze an attention worker"
    FREEZE_OTHER = "kill a worker, then freeze one of the other kind"
    RENEW = "renew every worker (afd restart)"
    SCALE = "one worker more of each kind, and one less (afd scale)"
    KILL_RENEWED = "renew every worker, and kill one meanwhile"
    KILL_FRONT_END = "kill the front-end, and start it again"
    KILL_FRONT_END_TOO = "kill a worker and the front-end at once"
    STOP_FFN = "stop an FFN worker for a moment"
    STOP_ATTENTION = "stop an attention worker for a moment"
    STOP_BOTH = "stop one of each for a moment"


@dataclass(frozen=True, slots=True)
class Blow:
    """One thing done to one worker, the one at `place` (modulo their number) among those of its role.

    stopped_s: 0 kills it (SIGKILL); another number stops it for so long (SIGSTOP, then SIGCONT); infinity leaves it
    stopped, for the server to notice. delay_s: after the blow before it.
    """

    role: Role
    place: int
    stopped_s: float = 0.0
    delay_s: float = 0.0

    @property
    def ends_it(self) -> bool:
        """Whether the process has to be replaced."""
        return self.stopped_s in (0.0, math.inf)


@dataclass(frozen=True, slots=True)
class Change:
    """What an operator asks of a running server: the route, and the numbers to be."""

    route: str
    numbers: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Fault:
    """Blows that belong together, and changes that begin with them. pause_s: between the recovery from the fault before
    and this one. kills_front_end: after the blows, and the same command is given again."""

    kind: Kind
    pause_s: float
    blows: tuple[Blow, ...] = ()
    changes: tuple[Change, ...] = ()
    kills_front_end: bool = False

    @property
    def ends_workers(self) -> bool:
        return any(blow.ends_it for blow in self.blows)


@dataclass(frozen=True, slots=True)
class Layout:
    """How many workers of each role the server has, and how many FFN workers make a copy of the FFN side."""

    attention: int
    ffn: int
    ffn_shards: int = 1

    def workers(self, role: Role) -> int:
        return self.attention if role is Role.ATTENTION else self.ffn


LONGEST_PAUSE_S = 1.0
# While a worker restarts: its process is being started, or has just come up and loads.
AGAIN_WITHIN_S = 6.0
# Far below every deadline of the server.
MOMENT_S = (0.05, 0.5)


def schedule(seed: int, layout: Layout, kinds: Sequence[Kind] = tuple(Kind)) -> Iterator[Fault]:
    """Faults without end. Each kind comes once in every round, in a new order each time."""
    dice = random.Random(seed)
    while True:
        for kind in dice.sample(kinds, len(kinds)):
            pause_s = dice.uniform(0, LONGEST_PAUSE_S)
            front_end = kind in (Kind.KILL_FRONT_END, Kind.KILL_FRONT_END_TOO)
            yield Fault(kind, pause_s, _blows(kind, layout, dice), _changes(kind, layout), front_end)


def _blows(kind: Kind, layout: Layout, dice: random.Random) -> tuple[Blow, ...]:
    def one(role: Role, stopped_s: float = 0.0, delay_s: float = 0.0) -> Blow:
        return Blow(role, dice.randrange(layout.workers(role)), stopped_s, delay_s)

    def moment_s() -> float:
        return dice.uniform(*MOMENT_S)

    match kind:
        case Kind.KILL_FFN:
            return (one(Role.FFN),)
        case Kind.KILL_ATTENTION:
            return (one(Role.ATTENTION),)
        case Kind.KILL_BOTH:
            return tuple(one(role) for role in dice.sample(tuple(Role), 2))
        case Kind.RENEW | Kind.SCALE | Kind.KILL_FRONT_END:
            return ()
        case Kind.KILL_FRONT_END_TOO:
            return (one(dice.choice(tuple(Role))),)
        case Kind.KILL_RENEWED:
            return (one(dice.choice(tuple(Role)), delay_s=dice.uniform(0, AGAIN_WITHIN_S)),)
        case Kind.KILL_AGAIN:
            return (
                one(dice.choice(tuple(Role))),
                one(dice.choice(tuple(Role)), delay_s=dice.uniform(0, AGAIN_WITHIN_S)),
            )
        case Kind.KILL_ALL:
            return tuple(Blow(role, place) for role in Role for place in range(layout.workers(role)))
        case Kind.FREEZE_FFN:
            return (one(Role.FFN, math.inf),)
        case Kind.FREEZE_ATTENTION:
            return (one(Role.ATTENTION, math.inf),)
        case Kind.FREEZE_OTHER:
            killed, frozen = dice.sample(tuple(Role), 2)
            return (one(killed), one(frozen, math.inf, dice.uniform(0, AGAIN_WITHIN_S)))
        case Kind.STOP_FFN:
            return (one(Role.FFN, moment_s()),)
        case Kind.STOP_ATTENTION:
            return (one(Role.ATTENTION, moment_s()),)
        case Kind.STOP_BOTH:
            return tuple(one(role, moment_s()) for role in Role)


def _changes(kind: Kind, layout: Layout) -> tuple[Change, ...]:
    def scale(more: int) -> Change:
        replicas = layout.ffn // layout.ffn_shards
        return Change(
            "/admin/scale", (("attention_workers", layout.attention + more), ("ffn_replicas", replicas + more))
        )

    if kind is Kind.SCALE:
        return scale(1), scale(0)
    return (Change("/admin/restart"),) if kind in (Kind.RENEW, Kind.KILL_RENEWED) else ()
