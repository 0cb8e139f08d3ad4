"""From a model, cards and a layout to what a simulation needs of them: times of a layer, room for caches, prices.

What lives here: the use of the planner's models, and what cannot be. What does not: those models (planner/).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from afd_server.config import ServeConfig
from afd_server.errors import ConfigError
from afd_server.planner.layout import (
    Layout,
    Workload,
    attention_weight_bytes,
    ffn_fits,
    ffn_worker_bytes,
    usable_bytes,
)
from afd_server.planner.times import LayerTimes

# Context at which a cache entry's time is taken, where the model does not depend on it: the roofline's default.
DEFAULT_CONTEXT = 8192
# FFN workers of one replica that are looked at when too few were asked for.
MOST_SHARDS = 1024


@dataclass(frozen=True, slots=True)
class Deployment:
    """A model on cards. together: served undivided, with the experts on the attention cards."""

    workload: Workload
    attention_card: str
    ffn_card: str
    wire_dtype: str
    together: bool = False

    def layout(self, config: ServeConfig) -> Layout:
        """Of one copy of the FFN side and the attention workers that prefer it."""
        ep, tp = config.ffn_shards
        callers = -(-config.attention_workers // config.ffn_replicas)
        return Layout(self.attention_card, self.ffn_card, callers, ep, tp, 1, 1, self.wire_dtype)

    def times(self, config: ServeConfig) -> LayerTimes:
        return self.workload.times(self.layout(config))

    def kv_tokens(self, config: ServeConfig) -> int:
        """Of one attention worker. Raises ConfigError when weights or one request do not fit."""
        workload, layout = self.workload, self.layout(config)
        weights = attention_weight_bytes(workload)
        ffn_weights = ffn_worker_bytes(workload, layout)
        if self.together:
            weights += ffn_weights
        elif ffn_weights > usable_bytes(workload, self.ffn_card):
            raise _too_large("--ffn-workers", "an FFN worker's weights", ffn_weights, self.ffn_card, workload,
                             f"use {self._fewest_shards(layout)} or more --ffn-workers a replica, or a larger --ffn-card")  # fmt: skip
        usable = usable_bytes(workload, self.attention_card)
        if weights > usable:
            raise _too_large("--attention-card", "an attention worker's weights", weights, self.attention_card, workload,
                             "use a larger card, or --dtype fp8")  # fmt: skip
        tokens = int((usable - weights) / (workload.counts.request_bytes / workload.context))
        assert config.max_model_len is not None
        if tokens < config.max_model_len:
            raise ConfigError(
                "--max-model-len", f"{config.max_model_len} tokens do not fit the cache", f"at most {tokens} do"
            )
        return tokens

    def _fewest_shards(self, layout: Layout) -> int:
        """FFN workers of one replica that hold the weights, divided by experts, or where there are none by tensors."""
        has_experts = any(ffn.num_experts for ffn in self.workload.model.ffn)
        for count in range(layout.ffn_workers + 1, MOST_SHARDS):
            experts, tensors = (count, 1) if has_experts else (1, count)
            if ffn_fits(self.workload, replace(layout, expert_shards=experts, tensor_shards=tensors)):
                return count
        return MOST_SHARDS

    def usd_per_hour(self) -> tuple[float, float]:
        """Of an attention and an FFN worker."""
        cards = self.workload.cards
        ffn = 0.0 if self.together else cards[self.ffn_card].usd_per_hour
        return cards[self.attention_card].usd_per_hour, ffn

    def undivided(self) -> Deployment:
        """The same model on the same attention cards, not split."""
        return replace(self, ffn_card=self.attention_card, together=True)


def _too_large(flag: str, what: str, size: float, card: str, workload: Workload, remedy: str) -> ConfigError:
    usable = usable_bytes(workload, card)
    return ConfigError(flag, f"{what} are {size / 1e9:.1f} GB, a {card} takes {usable / 1e9:.1f} GB", remedy)
