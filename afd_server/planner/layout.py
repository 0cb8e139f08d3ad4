"""A layout of workers and cards, and what it does: times of a hop, time per token, memory, tokens and USD.

What lives here: the prediction for one layout. What does not: which layouts are tried (search.py). Calls of all attention
workers for a layer are taken to reach the FFN together, as one batch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from math import comb, inf

from afd_server.config import SPARSE_DISPATCH_FROM
from afd_server.planner.counts import Counts
from afd_server.planner.efficiency import DEFAULT, Efficiency
from afd_server.planner.hardware import Hardware
from afd_server.planner.model_config import CountedModel
from afd_server.planner.profile_file import Profile
from afd_server.planner.roofline import DTYPE_BYTES, Precision, roofline_times
from afd_server.planner.timeline import HopTimes, step_s
from afd_server.planner.times import LayerTimes, LinearTimes

BFLOAT16 = Precision()
# Bytes of a value on the way out and back, as the server's wire has them.
WIRE_BYTES = {"fp8": (1, 2), "bfloat16": (2, 2), "float32": (4, 4)}


@dataclass(frozen=True, slots=True)
class Layout:
    """Workers and cards. requests: decoding at once on each attention worker. cards_per_ffn_worker: that work as one; the
    server's own FFN workers have one each, the paper's instances 8."""

    attention_card: str
    ffn_card: str
    attention_workers: int
    expert_shards: int
    tensor_shards: int
    micro_batches: int
    requests: int
    wire_dtype: str
    cards_per_ffn_worker: int = 1

    @property
    def ffn_workers(self) -> int:
        return self.expert_shards * self.tensor_shards

    @property
    def num_cards(self) -> int:
        return self.attention_workers + self.ffn_workers * self.cards_per_ffn_worker

    @property
    def dispatch(self) -> str:
        """How a call reaches the expert shards; the server decides by their number."""
        return "sparse" if self.expert_shards >= SPARSE_DISPATCH_FROM else "broadcast"


@dataclass(frozen=True)
class Workload:
    """What a layout is predicted for. profile: measured times, in place of the cards' rooflines."""

    model: CountedModel
    context: int
    cards: dict[str, Hardware]
    precision: Precision = BFLOAT16
    efficiency: Efficiency = DEFAULT
    profile: Profile | None = None

    @cached_property
    def counts(self) -> Counts:
        return self.precision.counts(self.model, self.context)

    @cached_property
    def _times(self) -> dict[tuple[str | int, ...], LayerTimes]:
        return {}

    def times(self, layout: Layout) -> LayerTimes:
        """Of one of the layout's attention workers, one of its FFN shards and the way between them."""
        key = (layout.attention_card, layout.ffn_card, layout.attention_workers, layout.expert_shards, layout.tensor_shards,
               layout.wire_dtype, layout.cards_per_ffn_worker)  # fmt: skip
        if key not in self._times:
            whole = self._whole_times(layout)
            ffn = whole.ffn.shard(layout.expert_shards, layout.tensor_shards)
            self._times[key] = dataclasses.replace(whole, ffn=ffn, wire=_wire_times(self, layout))
        return self._times[key]

    def _whole_times(self, layout: Layout) -> LayerTimes:
        """With the FFN undivided on one of the layout's FFN workers."""
        if self.profile is not None:
            return self.profile.times
        ffn_card = self.cards[layout.ffn_card].several(layout.cards_per_ffn_worker)
        return roofline_times(
            self.model,
            self.context,
            self.cards[layout.attention_card],
            ffn_card,
            self.precision,
            self.efficiency,
        )


def hop_times(workload: Workload, layout: Layout) -> HopTimes:
    """Of one micro-batch in one layer."""
    rows, times = layout.requests / layout.micro_batches, workload.times(layout)
    return HopTimes(
        attention_s=times.attention_s(rows, rows * workload.context),
        wire_s=rows * times.wire.row_s,
        ffn_s=times.ffn_s(rows * layout.attention_workers),
        latency_s=times.wire.fixed_s,
    )


# --- the wire ------------------------------------------------------------------------------------------------------


def reaching_share(experts: int, top_k: int, shards: int) -> float:
    """The chance that a token needs a given one of so many expert shards: 1 - C(E - E/N, k) / C(E, k)."""
    others = experts - experts // shards
    return 1 - comb(others, top_k) / comb(experts, top_k)


def shard_share(model: CountedModel, layout: Layout) -> float:
    """Of a micro-batch's rows, those that one FFN worker is sent, as the mean over layers."""
    if layout.dispatch == "broadcast":
        return 1.0
    shares = [
        reaching_share(ffn.num_experts, ffn.top_k, layout.expert_shards) if ffn.num_experts else 1.0
        for ffn in model.ffn
    ]
    return sum(shares) / len(shares)


def _wire_times(workload: Workload, layout: Layout) -> LinearTimes:
    """One direction of a hop by rows of an attention worker, the mean of both directions: the busier of an attention card's NIC
    and an FFN worker's. The fixed part is latency."""
    if workload.profile is not None:
        return workload.profile.times.wire
    attention = workload.cards[layout.attention_card]
    ffn = workload.cards[layout.ffn_card].several(layout.cards_per_ffn_worker)
    row_bytes = workload.model.hidden * sum(WIRE_BYTES[layout.wire_dtype]) / 2
    share = shard_share(workload.model, layout)
    at_attention = share * layout.ffn_workers / attention.network_bytes_per_s
    at_ffn = share * layout.attention_workers / ffn.network_bytes_per_s
    efficiency = workload.efficiency
    return LinearTimes(efficiency.hop_latency_s, row_bytes * max(at_attention, at_ffn) / efficiency.network)


# --- memory --------------------------------------------------------------------------------------------------------


def attention_weight_bytes(workload: Workload) -> float:
    return workload.counts.attention_parameters * DTYPE_BYTES[workload.precision.attention]


def ffn_weight_bytes(workload: Workload) -> float:
    """Of the whole FFN side, once."""
    return workload.counts.ffn_parameters * DTYPE_BYTES[workload.precision.ffn]


def ffn_worker_bytes(workload: Workload, layout: Layout) -> float:
    """Its shard: a slice of every dense MLP, of the shared expert for its tensor shard, and its experts, rounded up."""
    values = 0.0
    for ffn in workload.model.ffn:
        experts = -(-ffn.num_experts // layout.expert_shards)
        values += ffn.dense.value / layout.ffn_workers
        values += (ffn.shared.value + experts * ffn.expert.value) / layout.tensor_shards
    return values * DTYPE_BYTES[workload.precision.ffn]


def usable_bytes(workload: Workload, card: str, cards: int = 1) -> float:
    return workload.cards[card].memory_bytes * cards * workload.efficiency.memory_used


def most_requests(workload: Workload, attention_card: str) -> int:
    """That fit the memory of one attention worker beside its weights."""
    left = usable_bytes(workload, attention_card) - attention_weight_bytes(workload)
    return max(0, int(left / workload.counts.request_bytes))


def ffn_fits(workload: Workload, layout: Layout) -> bool:
    usable = usable_bytes(workload, layout.ffn_card, layout.cards_per_ffn_worker)
    return ffn_worker_bytes(workload, layout) <= usable


# --- the whole -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a layout does. tpot_s: seconds of a step, which is the time per output token; the parts add up to it.

    bubble_s: that a micro-batch waits for its turn at a busy lane. overhead_s: LM head, sampling, scheduling. limit: what
    would have to be faster, or larger, for more.
    """

    layout: Layout
    hop: HopTimes
    tpot_s: float
    attention_s: float
    ffn_s: float
    wire_s: float
    bubble_s: float
    overhead_s: float
    tokens_per_s: float
    usd_per_mtok: float
    limit: str

    @property
    def tokens_per_s_per_card(self) -> float:
        return self.tokens_per_s / self.layout.num_cards


def overhead_s(workload: Workload, layout: Layout) -> float:
    return workload.times(layout).step_overhead_s(layout.requests)


def usd_per_s(workload: Workload, layout: Layout) -> float:
    ffn_cards = layout.ffn_workers * layout.cards_per_ffn_worker
    return (
        layout.attention_workers * workload.cards[layout.attention_card].usd_per_s
        + ffn_cards * workload.cards[layout.ffn_card].usd_per_s
    )


def predict(workload: Workload, layout: Layout, tpot_sla_s: float = inf) -> Prediction:
    """Of a layout whose weights and caches fit."""
    hop, layers = hop_times(workload, layout), workload.model.num_layers
    once_s = overhead_s(workload, layout)
    layers_s = step_s(hop, layout.micro_batches, layers)
    tpot_s = layers_s + once_s
    tokens_per_s = layout.attention_workers * layout.requests / tpot_s
    return Prediction(
        layout,
        hop,
        tpot_s=tpot_s,
        attention_s=layers * hop.attention_s,
        ffn_s=layers * hop.ffn_s,
        wire_s=layers * 2 * (hop.wire_s + hop.latency_s),
        bubble_s=layers_s - layers * hop.pass_s,
        overhead_s=once_s,
        tokens_per_s=tokens_per_s,
        usd_per_mtok=1e6 * usd_per_s(workload, layout) / tokens_per_s,
        limit=_limit(workload, layout, hop, tpot_s, tpot_sla_s),
    )


def _limit(workload: Workload, layout: Layout, hop: HopTimes, tpot_s: float, tpot_sla_s: float) -> str:
    lanes = hop.lanes_s
    busiest = max(lanes, key=lambda lane: lanes[lane])
    full = layout.micro_batches * lanes[busiest] >= hop.pass_s
    more = dataclasses.replace(layout, requests=layout.requests + layout.micro_batches)
    where = f"{busiest} time, busy throughout" if full else "a micro-batch's own way through all three"
    if more.requests > most_requests(workload, layout.attention_card):
        return f"memory for KV caches; then {where}"
    if hop_and_overhead_s(workload, more) > tpot_sla_s:
        return f"TPOT, by {where}"
    return where


def hop_and_overhead_s(workload: Workload, layout: Layout) -> float:
    """The time per token, played through."""
    layers_s = step_s(hop_times(workload, layout), layout.micro_batches, workload.model.num_layers)
    return layers_s + overhead_s(workload, layout)
