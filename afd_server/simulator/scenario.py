"""What is simulated: a layout with its times and prices, who asks, and what happens to the workers meanwhile.

What lives here: pure data. What does not: where it comes from (command.py) and the run (simulation.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from afd_server.config import ServeConfig
from afd_server.planner.times import LayerTimes
from afd_server.simulator.demand import Demand


class Detail(StrEnum):
    """How steps are executed (hop_by_hop.py, whole_steps.py, lockstep.py)."""

    AUTO = "auto"
    HOPS = "hops"
    STEPS = "steps"
    LOCKSTEP = "lockstep"
    UNDIVIDED = "undivided"


@dataclass(frozen=True, slots=True)
class Kill:
    """A worker dies. name: as in attention-3 or ffn-0."""

    at_s: float
    name: str


@dataclass(frozen=True, slots=True)
class Resize:
    """From now on there shall be so many; None leaves them as they are."""

    at_s: float
    attention_workers: int | None = None
    ffn_replicas: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """mtbf_s: mean time between failures of one GPU, which come at random; None for none. restart_s: until a worker that was lost,
    or is new, serves. Kills besides."""

    mtbf_s: float | None = None
    attention_restart_s: float = 60.0
    ffn_restart_s: float = 60.0
    kills: tuple[Kill, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """config: a resolved one: layout, limits and promises. times: of one attention worker and one FFN shard.

    kv_tokens: cache of one attention worker. gpus and usd_per_hour: of one worker of a role. slowness: of single workers, by name.
    front_end_s: from a client's request to the router and back with the first token. warm_up_s: at first, which results leave out.
    """

    config: ServeConfig
    times: LayerTimes
    demand: Demand
    duration_s: float
    kv_tokens: int
    attention_gpus: int = 1
    ffn_gpus: int = 1
    attention_usd_per_hour: float = 0.0
    ffn_usd_per_hour: float = 0.0
    slowness: dict[str, float] = field(default_factory=dict)
    failures: Failures = field(default_factory=Failures)
    resizes: tuple[Resize, ...] = ()
    front_end_s: float = 0.0
    detail: Detail = Detail.AUTO
    warm_up_s: float = 0.0
    drain: bool = False
    seed: int = 0

    @property
    def num_shards(self) -> int:
        ep, tp = self.config.ffn_shards
        return ep * tp

    @property
    def kv_blocks(self) -> int:
        """No more than can ever be held: what is beyond only remembers prefixes, which the simulated prompts do not share."""
        assert self.config.max_model_len is not None
        size = self.config.block_size
        most = self.config.max_num_seqs * -(-self.config.max_model_len // size)
        return min(most, self.kv_tokens // size)
