"""The search for the best layouts: every combination that may keep the promise, the promising ones played through.

What lives here: what is tried, in which order, and what is kept. What does not: the prediction of one layout (layout.py), and
what to say when there is none (infeasible.py).

For each pair of cards, division of the FFN, number of micro-batches, wire type and number of attention workers, the most
requests count that memory and the time per token allow: throughput only grows with them. A bound that no step can beat says
first how good a combination may be; combinations are played from the best bound down, until no bound is better than what was found.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from afd_server.config import MAX_MICRO_BATCHES
from afd_server.planner.ffn_kinds import FFNLayer
from afd_server.planner.layout import (
    WIRE_BYTES,
    Layout,
    Prediction,
    Workload,
    ffn_fits,
    hop_and_overhead_s,
    hop_times,
    most_requests,
    overhead_s,
    predict,
    usd_per_s,
)
from afd_server.planner.timeline import least_step_s

OBJECTIVES = ("cost", "throughput")
SHARDS = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 192, 256)
TENSOR_SHARDS = (1, 2, 4, 8)
# Attention workers of the layouts by which pairs of cards are compared.
COARSE_WORKERS = (1, 2, 4, 8, 16, 32)
MICRO_BATCHES = tuple(range(1, MAX_MICRO_BATCHES + 1))
# A wider wire type is kept where it costs no more than this.
WIDER_WIRE = 0.01

TPOT = Callable[[Workload, Layout], float]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a layout may take. attention_workers, ffn_shapes: where they are given and not searched for; a shape is (expert
    shards, tensor shards). pairs: of cards, (attention, FFN)."""

    tpot_s: float
    max_cards: int
    pairs: Sequence[tuple[str, str]]
    micro_batches: Sequence[int] = MICRO_BATCHES
    wire_dtypes: Sequence[str] = ("fp8", "bfloat16")
    attention_workers: Sequence[int] = ()
    ffn_shapes: Sequence[tuple[int, int]] = ()
    cards_per_ffn_worker: int = 1


def search(workload: Workload, limits: Limits, objective: str, *, best: int = 5) -> list[Prediction]:
    """The best few, best first; one for each pair of cards and number of workers. Empty when nothing keeps the limits."""
    candidates: list[tuple[float, int, Layout]] = []
    for layout in combinations(workload, limits):
        most = _most_within(workload, layout, limits.tpot_s, _least_tpot_s)
        if most:
            layout = dataclasses.replace(layout, requests=most)
            candidates.append((_bound(workload, layout, objective), len(candidates), layout))
    candidates.sort()
    found: dict[tuple[str, str, int, int], Prediction] = {}
    for bound, _, layout in candidates:
        if len(found) >= best and bound > sorted(_price(p, objective) for p in found.values())[best - 1]:
            break
        requests = _most_within(workload, layout, limits.tpot_s, hop_and_overhead_s, layout.requests)
        if not requests:
            continue
        prediction = predict(workload, dataclasses.replace(layout, requests=requests), limits.tpot_s)
        key = layout.attention_card, layout.ffn_card, layout.attention_workers, layout.ffn_workers
        if key not in found or _is_better(prediction, found[key], objective):
            found[key] = prediction
    return sorted(found.values(), key=lambda prediction: _price(prediction, objective))[:best]


def best_pairs(workload: Workload, limits: Limits, objective: str, most: int) -> list[tuple[str, str]]:
    """The most promising pairs of cards: by the bound of their best layout among a few, of which none is played through."""
    coarse = dataclasses.replace(
        limits,
        attention_workers=COARSE_WORKERS,
        micro_batches=limits.micro_batches[-1:],
        wire_dtypes=limits.wire_dtypes[:1],
    )
    bounds: dict[tuple[str, str], float] = {}
    for layout in combinations(workload, coarse):
        if layout.num_cards > limits.max_cards:
            continue
        requests = _most_within(workload, layout, limits.tpot_s, _least_tpot_s)
        if requests:
            pair = layout.attention_card, layout.ffn_card
            bound = _bound(workload, dataclasses.replace(layout, requests=requests), objective)
            bounds[pair] = min(bound, bounds.get(pair, math.inf))
    return sorted(bounds, key=lambda pair: bounds[pair])[:most]


def combinations(workload: Workload, limits: Limits) -> Iterator[Layout]:
    """Every layout but for its number of requests, whose FFN fits its cards."""
    for attention_card, ffn_card in limits.pairs:
        for shape in limits.ffn_shapes or shapes(workload, limits.max_cards):
            ffn_cards = shape[0] * shape[1] * limits.cards_per_ffn_worker
            for workers in limits.attention_workers or worker_counts(limits.max_cards - ffn_cards):
                layout = Layout(attention_card, ffn_card, workers, *shape, 1, 1, limits.wire_dtypes[0],
                                limits.cards_per_ffn_worker)  # fmt: skip
                if not ffn_fits(workload, layout):
                    break
                for micro_batches in limits.micro_batches:
                    for wire_dtype in limits.wire_dtypes:
                        yield dataclasses.replace(layout, micro_batches=micro_batches, wire_dtype=wire_dtype)


def shapes(workload: Workload, max_cards: int) -> Iterator[tuple[int, int]]:
    """(expert shards, tensor shards) of the FFN side. Without experts there are only the latter."""
    experts = max(layer.num_experts for layer in workload.model.ffn) or 1
    narrowest = min(_width(layer) for layer in workload.model.ffn)
    for expert_shards in SHARDS if experts > 1 else (1,):
        for tensor_shards in TENSOR_SHARDS if experts > 1 else SHARDS:
            fits = expert_shards <= experts and tensor_shards <= narrowest
            if fits and expert_shards * tensor_shards < max_cards:
                yield expert_shards, tensor_shards


def worker_counts(most: int) -> list[int]:
    """Numbers of attention workers to try: every small one, then ever larger steps, and the most there can be."""
    return sorted({count for count in (*range(1, 17), *SHARDS, most) if 1 <= count <= most})


def _width(layer: FFNLayer) -> int:
    """Columns of an expert's or MLP's matrices, which tensor shards divide."""
    return dict((layer.expert if layer.num_experts else layer.dense).numbers)["width"]


def _least_tpot_s(workload: Workload, layout: Layout) -> float:
    hop = hop_times(workload, layout)
    layers_s = least_step_s(hop, layout.micro_batches, workload.model.num_layers)
    return layers_s + overhead_s(workload, layout)


def _most_within(workload: Workload, layout: Layout, limit_s: float, tpot_s: TPOT, most: int = 0) -> int:
    """Requests of an attention worker, a multiple of the micro-batches, that memory and the limit allow; 0 if none."""
    step = layout.micro_batches

    def keeps(count: int) -> bool:
        return tpot_s(workload, dataclasses.replace(layout, requests=count * step)) <= limit_s

    low, high = 0, (most or most_requests(workload, layout.attention_card)) // step
    if high and keeps(high):
        return high * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low * step


def _bound(workload: Workload, layout: Layout, objective: str) -> float:
    """The price that this layout cannot be below."""
    tokens_per_s = layout.attention_workers * layout.requests / _least_tpot_s(workload, layout)
    if objective == "throughput":
        return -tokens_per_s / layout.num_cards
    return 1e6 * usd_per_s(workload, layout) / tokens_per_s


def _price(prediction: Prediction, objective: str) -> float:
    """What is to be small."""
    return prediction.usd_per_mtok if objective == "cost" else -prediction.tokens_per_s_per_card


def _is_better(new: Prediction, old: Prediction, objective: str) -> bool:
    """Of two for the same cards and workers. Where they are alike, the one with the wider wire loses less of the activations."""
    difference = _price(new, objective) - _price(old, objective)
    if abs(difference) <= WIDER_WIRE * abs(_price(old, objective)):
        return sum(WIRE_BYTES[new.layout.wire_dtype]) > sum(WIRE_BYTES[old.layout.wire_dtype])
    return difference < 0
