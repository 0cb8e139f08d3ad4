"""What `afd plan` prints: counts, costs and layouts as text, or all of it as JSON.

What lives here: words and columns. What does not: any number (counts.py, cost.py, search.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from afd_server.planner.cost import RoleCost, cheapest, minimum_sparsity, sparsity
from afd_server.planner.counts import Counts, explain
from afd_server.planner.hardware import Hardware
from afd_server.planner.layout import Layout, Prediction
from afd_server.planner.model_config import CountedModel


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as their widest cell; numbers to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        cells = [
            cell.rjust(width)
            if _is_number(cell) or (row is header and _is_number(rows[0][column]))
            else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _is_number(cell: str) -> bool:
    return (cell[:1].isdigit() and not cell[-1:].isalpha()) or cell == "-"


def _billions(count: float) -> str:
    return f"{count / 1e9:.4g} B" if count >= 1e8 else f"{count / 1e6:.4g} M"


def count_lines(model: CountedModel, counts: Counts) -> Iterator[str]:
    total = counts.attention_parameters + counts.ffn_parameters
    yield (
        f"{model.name}: {model.num_layers} layers, {_billions(total)} parameters, {_billions(counts.active_parameters)} active; "
        f"{_billions(counts.attention_parameters)} on each attention worker, {_billions(counts.ffn_parameters)} on the FFN side"
    )
    yield (
        f"a decoded token at context {counts.context}, 8 bits a cached value: KV {counts.kv_bytes:.3g} bytes, attention "
        f"{counts.attention_flop:.3g} FLOP, linear {counts.linear_flop:.3g} FLOP, FFN {counts.ffn_flop:.3g} FLOP; "
        f"{counts.intensity:.4g} FLOP a KV byte"
    )


def explain_lines(model: CountedModel, context: int, cards: Mapping[str, Hardware]) -> Iterator[str]:
    yield "how they come about:"
    for line in explain(model, context):
        yield f"  {line}"
    yield "where the cards' numbers are from:"
    for card in cards.values():
        for key, source in card.sources.items():
            value = f"{getattr(card, key):g}" if key != "flops" else ", ".join(
                f"{flops:g} in {name}" for name, flops in card.flops.items()
            )  # fmt: skip
            yield f"  {card.name} {key} {value}: {source}"


def cost_lines(
    model: CountedModel, costs: Mapping[str, RoleCost], cards: Mapping[str, Hardware], tpot_s: float
) -> Iterator[str]:
    share = sparsity(model)
    yield "USD per million tokens, every card at its limit, 8-bit weights and caches:"
    rows = [[card, f"{cost.attention:.3f}", f"{cost.ffn:.3f}"] for card, cost in costs.items()]
    header = ["card", "attention", "FFN"]
    if share is not None:
        header.append("smallest share of experts")
        for row in rows:
            row.append(f"{minimum_sparsity(model.hidden, model.num_layers, cards[row[0]], tpot_s):.3f}")
    yield from table(header, rows)
    best = cheapest(costs)
    yield f"cheapest: {best.usd_per_mtok:.3f}, attention on {best.attention} and FFN on {best.ffn}"
    if share is not None:
        yield f"a token takes {share:.3f} of the experts; with fewer than a card's smallest share its network starves its FFN"


def layout_words(layout: Layout) -> tuple[str, str]:
    """The attention side and the FFN side."""
    shards = (
        f"EP {layout.expert_shards}"
        if layout.tensor_shards == 1
        else f"EP {layout.expert_shards} x TP {layout.tensor_shards}"
    )
    cards = f" of {layout.cards_per_ffn_worker} cards" if layout.cards_per_ffn_worker > 1 else ""
    attention = f"{layout.attention_workers} x {layout.attention_card}"
    return attention, f"{layout.ffn_workers} x {layout.ffn_card}{cards} ({shards}, {layout.dispatch})"


def layout_lines(predictions: Sequence[Prediction]) -> Iterator[str]:
    rows = []
    for prediction in predictions:
        layout = prediction.layout
        parts = (
            prediction.attention_s,
            prediction.ffn_s,
            prediction.wire_s,
            prediction.bubble_s,
            prediction.overhead_s,
        )
        rows.append((
            *layout_words(layout), str(layout.requests), str(layout.micro_batches), layout.wire_dtype,
            f"{prediction.tokens_per_s_per_card:.0f}", f"{prediction.usd_per_mtok:.4f}", f"{prediction.tpot_s * 1e3:.1f}",
            *(f"{part * 1e3:.1f}" for part in parts), prediction.limit,
        ))  # fmt: skip
    yield from table(
        ("attention", "FFN", "requests", "m", "wire", "tokens/s/card", "USD/Mtok", "TPOT ms", "= attn", "FFN", "wire", "bubble",
         "once", "limited by"), rows,
    )  # fmt: skip


# --- JSON ----------------------------------------------------------------------------------------------------------


def json_report(
    model: CountedModel,
    counts: Counts,
    costs: Mapping[str, RoleCost],
    cards: Mapping[str, Hardware],
    tpot_s: float,
) -> dict[str, Any]:
    """Per decoded token, 8 bits a cached value; USD per million tokens, by card."""
    return {
        "counts": {
            "kv_bytes": counts.kv_bytes,
            "attention_flop": counts.attention_flop,
            "linear_flop": counts.linear_flop,
            "ffn_flop": counts.ffn_flop,
        },
        "cost_usd_per_mtok": {
            card: {"attention": cost.attention, "ffn": cost.ffn} for card, cost in costs.items()
        },
        "best_usd_per_mtok": dataclasses.asdict(cheapest(costs)),
        "sparsity": sparsity(model),
        "minimum_sparsity": {
            name: minimum_sparsity(model.hidden, model.num_layers, card, tpot_s) for name, card in cards.items()
        },
        "model": model.name,
        "context": counts.context,
        "layers": model.num_layers,
        "parameters": {
            "attention": counts.attention_parameters,
            "ffn": counts.ffn_parameters,
            "active": counts.active_parameters,
        },
        "flop_per_kv_byte": counts.intensity,
    }


def json_layout(prediction: Prediction) -> dict[str, Any]:
    layout = prediction.layout
    return {
        "attention": {"card": layout.attention_card, "workers": layout.attention_workers},
        "ffn": {
            "card": layout.ffn_card,
            "workers": layout.ffn_workers,
            "expert_shards": layout.expert_shards,
            "tensor_shards": layout.tensor_shards,
            "dispatch": layout.dispatch,
        },
        "requests_per_attention_worker": layout.requests,
        "micro_batches": layout.micro_batches,
        "wire_dtype": layout.wire_dtype,
        "tokens_per_s": prediction.tokens_per_s,
        "tokens_per_s_per_card": prediction.tokens_per_s_per_card,
        "usd_per_mtok": prediction.usd_per_mtok,
        "tpot_ms": {
            "total": prediction.tpot_s * 1e3,
            "attention": prediction.attention_s * 1e3,
            "ffn": prediction.ffn_s * 1e3,
            "wire": prediction.wire_s * 1e3,
            "bubble": prediction.bubble_s * 1e3,
            "once": prediction.overhead_s * 1e3,
        },
        "limit": prediction.limit,
    }
