"""Why no layout keeps the limits, and which value of the limit at fault would do.

What lives here: the four reasons, in the order in which they forbid everything: weights of the attention side, one request's
KV cache, weights of the FFN side, time per token. What does not: the search that found nothing (search.py).
"""

from __future__ import annotations

import dataclasses
import math

from afd_server.errors import ConfigError
from afd_server.planner.layout import (
    Layout,
    Workload,
    attention_weight_bytes,
    ffn_fits,
    ffn_weight_bytes,
    hop_and_overhead_s,
    most_requests,
    usable_bytes,
)
from afd_server.planner.search import SHARDS, Limits, combinations, shapes

MANY_CARDS = 2 * max(SHARDS)


def reason(workload: Workload, limits: Limits) -> ConfigError:
    """The first constraint that cannot hold, with the nearest value that can."""
    return (
        _attention_weights(workload, limits)
        or _context(workload, limits)
        or _cards(workload, limits)
        or _tpot(workload, limits)
    )


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"


def _attention_cards(limits: Limits) -> list[str]:
    return list(dict.fromkeys(attention for attention, _ in limits.pairs))


def _attention_weights(workload: Workload, limits: Limits) -> ConfigError | None:
    needed = attention_weight_bytes(workload)
    room = {card: usable_bytes(workload, card) for card in _attention_cards(limits)}
    largest = max(room, key=lambda card: room[card])
    if needed < room[largest]:
        return None
    total = needed / workload.efficiency.memory_used
    return ConfigError(
        "--hardware",
        f"every attention worker holds {_gb(needed)} of weights, and the largest card, {largest}, has room for {_gb(room[largest])}",
        f"nearest: a card of more than {_gb(total)}, or a smaller --dtype",
    )


def _context(workload: Workload, limits: Limits) -> ConfigError | None:
    cards = _attention_cards(limits)
    least = min(limits.micro_batches)
    most = max(most_requests(workload, card) for card in cards)
    if most >= least:
        return None
    fits, too_long = 0, workload.context
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        shorter = dataclasses.replace(workload, context=middle)
        enough = max(most_requests(shorter, card) for card in cards) >= least
        fits, too_long = (middle, too_long) if enough else (fits, middle)
    return ConfigError(
        "--context",
        f"{workload.context} tokens take {_gb(workload.counts.request_bytes)} of KV cache a request, and beside the weights "
        f"there is room for {most} on a card",
        f"nearest: {fits}",
    )


def _cards(workload: Workload, limits: Limits) -> ConfigError | None:
    """Too few for one attention worker and the FFN's weights."""
    fewest = MANY_CARDS
    for _, card in limits.pairs:
        for shape in limits.ffn_shapes or shapes(workload, MANY_CARDS):
            layout = Layout(card, card, 1, *shape, 1, 1, limits.wire_dtypes[0], limits.cards_per_ffn_worker)
            if ffn_fits(workload, layout):
                fewest = min(fewest, layout.num_cards)
    if fewest <= limits.max_cards:
        return None
    weights = _gb(ffn_weight_bytes(workload))
    if fewest == MANY_CARDS:
        return ConfigError("--hardware", f"the FFN's {weights} of weights do not fit {MANY_CARDS - 1} of these cards",
                           "use larger ones, or a smaller --dtype")  # fmt: skip
    return ConfigError(
        "--max-gpus",
        f"{limits.max_cards} of them cannot hold the FFN's {weights} of weights beside one attention worker",
        f"nearest: {fewest}",
    )


def _tpot(workload: Workload, limits: Limits) -> ConfigError:
    least_s = math.inf
    for layout in combinations(workload, limits):
        if most_requests(workload, layout.attention_card) >= layout.micro_batches:
            lone = dataclasses.replace(layout, requests=layout.micro_batches)
            least_s = min(least_s, hop_and_overhead_s(workload, lone))
    nearest_ms = math.ceil(least_s * 1e4) / 10
    return ConfigError(
        "--tpot-sla-ms",
        f"{limits.tpot_s * 1e3:g} ms per token cannot be kept: the fastest layout of these cards takes {least_s * 1e3:.1f} ms "
        "with one request a micro-batch",
        f"nearest: {nearest_ms:g}",
    )
