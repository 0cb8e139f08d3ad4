"""Times of a layer by the roofline of its cards: what has to be read, or computed, at a share of the data sheet's speed.

What lives here: the way from counts and cards to LayerTimes. What does not: the shares (efficiency.py), measured times
(profile_file.py), and the wire, whose time depends on the layout (layout.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from afd_server.planner.counts import Counts, count
from afd_server.planner.efficiency import Efficiency
from afd_server.planner.hardware import Hardware
from afd_server.planner.model_config import CountedModel
from afd_server.planner.times import AttentionTimes, FFNTimes, LayerTimes, LinearTimes

DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "fp8": 1.0}


@dataclass(frozen=True, slots=True)
class Precision:
    """Types of weights on either side, which are those of the arithmetic too, and of the KV cache."""

    attention: str = "bfloat16"
    ffn: str = "bfloat16"
    kv_cache: str = "bfloat16"

    @classmethod
    def all(cls, dtype: str) -> Precision:
        return cls(dtype, dtype, dtype)

    def counts(self, model: CountedModel, context: int) -> Counts:
        return count(model, context, kv_value_bytes=DTYPE_BYTES[self.kv_cache])


def roofline_times(
    model: CountedModel,
    context: int,
    attention_card: Hardware,
    ffn_card: Hardware,
    precision: Precision,
    efficiency: Efficiency,
) -> LayerTimes:
    """With the whole FFN on one ffn_card, wire not counted. context: tokens at which a cache entry's time is taken, since
    windows and states make it depend on that."""
    counts, layers = precision.counts(model, context), model.num_layers
    head = model.vocab * model.hidden
    bytes_per_s = attention_card.bytes_per_s * efficiency.bytes
    flop_per_s = attention_card.flop_per_s(precision.attention) * efficiency.flops
    cache_flop_per_s = attention_card.flop_per_s(precision.kv_cache) * efficiency.flops
    value_bytes = DTYPE_BYTES[precision.attention]
    pair_s = counts.attention_flop / context / layers / cache_flop_per_s
    attention = AttentionTimes(
        weights_s=counts.linear_flop / 2 * value_bytes / layers / bytes_per_s,
        compute_row_s=counts.linear_flop / layers / flop_per_s,
        context_token_s=max(counts.kv_bytes / context / layers / bytes_per_s, pair_s),
        chunk_pair_s=pair_s,
    )
    # Logits are computed for every row that samples; the weights are read once.
    overhead = LinearTimes(efficiency.step_s + head * value_bytes / bytes_per_s, 2 * head / flop_per_s)
    return LayerTimes(
        layers, attention, _ffn_times(model, counts, ffn_card, precision, efficiency), overhead=overhead
    )


def _ffn_times(
    model: CountedModel, counts: Counts, card: Hardware, precision: Precision, efficiency: Efficiency
) -> FFNTimes:
    layers = model.num_layers
    value_s = DTYPE_BYTES[precision.ffn] / (card.bytes_per_s * efficiency.bytes)
    mixture = next((layer for layer in model.ffn if layer.num_experts), None)
    return FFNTimes(
        dense_s=value_s * sum(layer.dense.value for layer in model.ffn) / layers,
        shared_s=value_s * sum(layer.shared.value for layer in model.ffn) / layers,
        expert_s=value_s * sum(layer.expert.value for layer in model.ffn) / layers,
        num_experts=mixture.num_experts if mixture else 0,
        chosen_share=mixture.top_k / mixture.num_experts if mixture else 0.0,
        compute_row_s=counts.ffn_flop / layers / (card.flop_per_s(precision.ffn) * efficiency.flops),
    )
