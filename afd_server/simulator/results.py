"""What a run comes to: times to tokens, goodput, how busy each role was, and what it cost.

What lives here: sums, and the names of results. What does not: the run (simulation.py).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from afd_server.simulator.clients import Outcome
from afd_server.simulator.fleet import Fleet
from afd_server.simulator.scenario import Detail, Scenario
from afd_server.simulator.work import Execution

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums from the beginning to a moment. worker_s: for which workers of a role were paid."""

    steps: int
    attention_s: float
    bubble_s: float
    steps_s: float
    ffn_s: float
    attention_worker_s: float
    ffn_worker_s: float
    failures: int


def totals_of(fleet: Fleet, execution: Execution) -> Totals:
    accounts = list(fleet.accounts.values())
    return Totals(
        steps=sum(account.num_steps for account in accounts),
        attention_s=sum(account.attention_s for account in accounts),
        bubble_s=sum(account.bubble_s for account in accounts),
        steps_s=sum(account.steps_s for account in accounts),
        ffn_s=sum(execution.busy_s()),
        attention_worker_s=fleet.worker_seconds("attention"),
        ffn_worker_s=fleet.worker_seconds("ffn"),
        failures=fleet.num_failures,
    )


@dataclass
class Result:
    """Of the time after the warm-up. outcomes: of the requests that came in it. wall_s: that the simulation itself took."""

    scenario: Scenario
    detail: Detail
    seconds: float
    before: Totals
    after: Totals
    outcomes: Sequence[Outcome]
    tokens_per_bin: dict[int, int]
    bin_s: float
    num_events: int
    wall_s: float = 0.0

    @property
    def output_tokens(self) -> int:
        first = int(self.scenario.warm_up_s / self.bin_s)
        return sum(count for index, count in self.tokens_per_bin.items() if index >= first)

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.seconds

    @property
    def gpu_s(self) -> float:
        scenario = self.scenario
        return (
            self._grown("attention_worker_s") * scenario.attention_gpus
            + self._grown("ffn_worker_s") * scenario.ffn_gpus
        )

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.output_tokens / max(self.gpu_s, 1e-9)

    @property
    def usd(self) -> float:
        scenario = self.scenario
        attention = self._grown("attention_worker_s") * scenario.attention_usd_per_hour
        return (attention + self._grown("ffn_worker_s") * scenario.ffn_usd_per_hour) / 3600

    @property
    def bubble_share(self) -> float:
        """Of the attention workers' steps: the time in which they had nothing to compute."""
        return self._grown("bubble_s") / max(self._grown("steps_s"), 1e-9)

    @property
    def attention_utilisation(self) -> float:
        return self._grown("attention_s") / max(self._grown("attention_worker_s"), 1e-9)

    @property
    def ffn_utilisation(self) -> float:
        """Of whole steps it is an estimate, which may come to a little more than there is."""
        return min(1.0, self._grown("ffn_s") / max(self._grown("ffn_worker_s"), 1e-9))

    @property
    def num_steps(self) -> int:
        return int(self._grown("steps"))

    def is_good(self, outcome: Outcome) -> bool:
        """A whole answer within what is promised, as far as anything is."""
        config = self.scenario.config
        if outcome.ended_s is None or outcome.problem or outcome.ttft_s is None:
            return False
        in_time = config.ttft_sla_ms is None or outcome.ttft_s * 1e3 <= config.ttft_sla_ms
        tpot_s = outcome.tpot_s
        return in_time and (config.tpot_sla_ms is None or tpot_s is None or tpot_s * 1e3 <= config.tpot_sla_ms)

    def as_json(self) -> dict[str, Any]:
        ended = [each for each in self.outcomes if each.ended_s is not None]
        good = [each for each in ended if self.is_good(each)]
        tokens = self.output_tokens
        return {
            "detail": str(self.detail),
            "simulated_s": self.seconds,
            "requests": {
                "came": len(self.outcomes),
                "answered": sum(not each.problem for each in ended),
                "refused": sum(each.refused for each in ended),
                "failed": sum(bool(each.problem) and not each.refused for each in ended),
                "unfinished": len(self.outcomes) - len(ended),
            },
            "output_tokens": tokens,
            "output_tokens_per_s": self.tokens_per_s,
            "output_tokens_per_s_per_gpu": self.tokens_per_s_per_gpu,
            "goodput_requests_per_s": len(good) / self.seconds,
            "goodput_share": len(good) / max(1, len(ended)),
            "ttft_s": spread([each.ttft_s for each in self.outcomes if each.ttft_s is not None]),
            "tpot_s": spread([each.tpot_s for each in ended if each.tpot_s is not None]),
            "utilisation": {"attention": self.attention_utilisation, "ffn": self.ffn_utilisation},
            "bubble_share": self.bubble_share,
            "failures": int(self._grown("failures")),
            "gpu_hours": self.gpu_s / 3600,
            "usd": self.usd,
            "usd_per_mtok": self.usd / max(tokens, 1) * 1e6,
            "steps": self.num_steps,
            "events": self.num_events,
            "wall_s": self.wall_s,
            "wall_us_per_step": self.wall_s / max(1, self.after.steps) * 1e6,
        }

    def _grown(self, name: str) -> float:
        return getattr(self.after, name) - getattr(self.before, name)


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles; None of nothing."""
    if not values:
        return None
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else [values[0]] * 99
    return {"mean": statistics.fmean(values)} | {f"p{each}": cuts[each - 1] for each in PERCENTILES}
