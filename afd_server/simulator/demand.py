"""What clients ask for: a process of arrivals, or a recorded trace, or a number of clients that ask again and again.

What lives here: the choice between them, and distributions of lengths. What does not: arrival processes and the formats of traces
(traffic.py), and the clients (clients.py). Everything is drawn from a seed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from afd_server.errors import ConfigError
from afd_server.traffic import Arrival, arrival_times


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of numbers of tokens, as written on the command line:

    N                     always N
    uniform:LOW:HIGH      every number between, both included
    lognormal:MEAN:CV     of this mean and coefficient of variation (standard deviation over mean), the form of most traces
    """

    draw: Callable[[random.Random], int]
    mean: float

    @classmethod
    def parse(cls, flag: str, text: str) -> Lengths:
        """Raises ConfigError, which names the flag."""
        kind, *numbers = text.split(":")
        try:
            if not numbers and int(kind) >= 1:
                return cls.fixed(int(kind))
            first, second = (float(number) for number in numbers)
            if kind == "uniform" and 1 <= first <= second:
                low, high = int(first), int(second)
                return cls(lambda generator: generator.randint(low, high), (low + high) / 2)
            if kind == "lognormal" and first >= 1 and 0 < second <= 10:
                sigma = math.sqrt(math.log1p(second**2))
                mu = math.log(first) - sigma**2 / 2
                return cls(lambda generator: max(1, round(generator.lognormvariate(mu, sigma))), first)
        except ValueError:
            pass
        raise ConfigError(
            flag, f"{text!r} is no distribution of lengths", "write N, uniform:LOW:HIGH or lognormal:MEAN:CV"
        )

    @classmethod
    def fixed(cls, length: int) -> Lengths:
        return cls(lambda generator: length, length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Of a run. Exactly one of these says when requests come:

    rate: requests a second, with the burstiness of their intervals (traffic.py). num_clients: each asks again when it has its
    answer. trace: recorded requests; with `speed`, so many times as fast.
    """

    prompt: Lengths = field(default_factory=lambda: Lengths.fixed(1024))
    output: Lengths = field(default_factory=lambda: Lengths.fixed(128))
    rate: float | None = None
    burstiness: float = 1.0
    num_clients: int | None = None
    trace: Sequence[Arrival] = ()
    speed: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        assert (self.rate is not None) + (self.num_clients is not None) + bool(self.trace) == 1

    def arrivals(self, duration_s: float) -> Iterator[Arrival]:
        """Of the open kinds: rate or trace."""
        if self.rate is None:
            yield from (
                replace(each, at_s=each.at_s / self.speed)
                for each in self.trace
                if each.at_s / self.speed < duration_s
            )
            return
        generator = random.Random(self.seed)
        for at_s in arrival_times(self.rate, self.burstiness, generator):
            if at_s >= duration_s:
                return
            yield self.draw(at_s, generator)

    def draw(self, at_s: float, generator: random.Random) -> Arrival:
        """A request that comes now."""
        return Arrival(at_s, self.prompt.draw(generator), self.output.draw(generator))
