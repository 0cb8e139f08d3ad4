"""What `afd plan --paper` prints: the paper's tables, ours beside them.

What lives here: words and columns, and the JSON. What does not: the numbers (paper.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from afd_server.planner import paper
from afd_server.planner.efficiency import DEFAULT
from afd_server.planner.report import table


def lines() -> Iterator[str]:
    yield "arXiv 2507.19427, theirs / ours. USD per million tokens, every card at its limit, 8-bit weights and caches:"
    yield from table(("model", "role", *paper.CARDS), list(_cost_rows()))
    yield ""
    yield "best deployment, the cheapest card for each role:"
    rows = []
    for name, published in paper.BEST.items():
        for context, theirs in zip(paper.CONTEXTS, published, strict=True):
            best = paper.best_deployment(name, context)
            rows.append(
                (
                    name,
                    _thousands(context),
                    f"{theirs:.3f} / {best.usd_per_mtok:.3f}",
                    f"{best.attention} + {best.ffn}",
                )
            )
    yield from table(("model", "context", "USD", "attention + FFN"), rows)
    yield ""
    yield f"smallest share of experts for hidden {paper.SPARSITY_HIDDEN}, {paper.SPARSITY_LAYERS} layers:"
    shares = [
        (card, f"{theirs:.3f} / {paper.sparsity(paper.cards()[card]):.3f}")
        for card, theirs in paper.SPARSITY.items()
    ]
    yield from table(("card", "share"), shares)
    yield ""
    yield from _measured_lines()


def _thousands(tokens: int) -> str:
    return f"{tokens // 1024}K"


def _cost_rows() -> Iterator[tuple[str, ...]]:
    for name, published in paper.COSTS.items():
        for context, theirs in zip(paper.CONTEXTS, published, strict=False):
            ours = [cost.attention for cost in paper.costs(name, context).values()]
            yield name, f"attention {_thousands(context)}", *_pairs(theirs, ours)
        ours = [cost.ffn for cost in paper.costs(name, paper.CONTEXTS[0]).values()]
        yield name, "FFN", *_pairs(published[-1], ours)


def _pairs(theirs: tuple[float, ...], ours: list[float]) -> list[str]:
    return [f"{their:.3f} / {our:.3f}" for their, our in zip(theirs, ours, strict=True)]


def _measured_lines() -> Iterator[str]:
    yield (
        f"measured at TPOT 50 ms, against the layout search with {DEFAULT.flops:g} of the FLOP/s, {DEFAULT.bytes:g} of the "
        f"memory's bytes/s and {DEFAULT.network:g} of the network's:"
    )
    rows = []
    for row, ours in paper.measured_rows():
        off = ours.tokens_per_s_per_card / row.tokens_per_s_per_card - 1
        requests = ours.layout.requests * ours.layout.attention_workers
        rows.append((row.name, _thousands(row.context), f"{row.tokens_per_s_per_card:.0f} / {ours.tokens_per_s_per_card:.0f}",
                     f"{off:+.1%}", str(requests), str(ours.layout.micro_batches), ours.limit))  # fmt: skip
    yield from table(("row", "context", "tokens/s/card", "off", "requests", "m", "limited by"), rows)
    yield (
        "All three are bound by the wire, so the network's factor decides. DeepSeek-V3's 2324 tokens/s/card is of a server that is "
        "not split, which this does not predict."
    )


def json_report() -> dict[str, Any]:
    return {
        "cost_usd_per_mtok": {
            name: {
                str(context): {card: {"attention": cost.attention, "ffn": cost.ffn} for card, cost in paper.costs(name, context).items()}
                for context in paper.CONTEXTS
            }
            for name in paper.BUNDLED
        },
        "best_usd_per_mtok": {
            name: {str(context): paper.best_deployment(name, context).usd_per_mtok for context in paper.CONTEXTS}
            for name in paper.BUNDLED
        },
        "minimum_sparsity": {card: paper.sparsity(hardware) for card, hardware in paper.cards().items()},
        "measured": [
            {"row": row.name, "context": row.context, "measured": row.tokens_per_s_per_card, "predicted": ours.tokens_per_s_per_card}
            for row, ours in paper.measured_rows()
        ],
    }  # fmt: skip
