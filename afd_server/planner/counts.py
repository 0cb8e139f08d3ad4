"""What one decoded token of a model costs: bytes of cache, FLOP and weights, by role.

What lives here: the sums over layers. What does not: what one layer has (attention_kinds.py, ffn_kinds.py) and money
(cost.py). Conventions are the paper's (arXiv 2507.19427): FLOP are two for each multiply-add, one token is decoded at a given
context, embedding, LM head, router, norms and biases are left out of the FLOP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

from afd_server.planner.attention_kinds import AttentionLayer
from afd_server.planner.ffn_kinds import FFNLayer
from afd_server.planner.formula import Formula, formula
from afd_server.planner.model_config import CountedModel

# A linear layer's state is float32 in every implementation that is known, and is read and written for each token.
STATE_VALUE_BYTES = 4

Layer = TypeVar("Layer", AttentionLayer, FFNLayer)


@dataclass(frozen=True, slots=True)
class Counts:
    """Of one decoded token at `context`, all layers together.

    kv_bytes: of the cache, moved for the token. attention_flop: of scores and weighted sums. linear_flop: of the projections
    around them. attention_parameters, ffn_parameters: held by a worker of that role; the former with router, embedding and LM
    head. request_bytes: cache and states that a request of this context occupies.
    """

    context: int
    kv_bytes: int
    attention_flop: int
    linear_flop: int
    ffn_flop: int
    attention_parameters: int
    ffn_parameters: int
    active_parameters: int
    request_bytes: int

    @property
    def intensity(self) -> float:
        """FLOP of attention per byte of cache."""
        return self.attention_flop / self.kv_bytes


def count(model: CountedModel, context: int, *, kv_value_bytes: float = 1) -> Counts:
    """kv_value_bytes: of a cached value, 1 in the paper's tables."""
    attention, ffn = model.attention, model.ffn
    state_bytes = STATE_VALUE_BYTES * sum(layer.state_values.value for layer in attention)
    entries = sum(layer.entry_values.value * layer.entries(context) for layer in attention)
    projections = sum(layer.weights.value for layer in attention)
    active_ffn = sum(layer.active.value for layer in ffn)
    outside = model.vocab * model.hidden * (1 if model.tied_head else 2)
    routers = sum(layer.router.value for layer in ffn)
    return Counts(
        context=context,
        kv_bytes=int(kv_value_bytes * entries) + 2 * state_bytes,
        attention_flop=sum(
            layer.entry_flop.value * layer.entries(context) + layer.state_flop.value for layer in attention
        ),
        linear_flop=2 * projections,
        ffn_flop=2 * active_ffn,
        attention_parameters=projections + routers + outside,
        ffn_parameters=sum(layer.weights.value for layer in ffn),
        active_parameters=projections + routers + outside + active_ffn,
        request_bytes=int(kv_value_bytes * entries) + state_bytes,
    )


# --- how they come about -------------------------------------------------------------------------------------------


def explain(model: CountedModel, context: int) -> Iterator[str]:
    """One line a count and kind of layer: what is counted, on how many layers, and the formula with its numbers."""
    by_attention, by_ffn = _kinds(model.attention), _kinds(model.ffn)
    yield from _lines("attention weights, a layer", by_attention, lambda layer: layer.weights)
    yield from _lines("router weights, a layer", by_ffn, lambda layer: layer.router)
    head = "vocab * hidden" if model.tied_head else "2 * vocab * hidden"
    yield f"embedding and LM head: {formula(head, vocab=model.vocab, hidden=model.hidden)}"
    yield from _lines("FFN weights, a layer", by_ffn, lambda layer: layer.weights)
    yield from _lines("KV values, a token and layer", by_attention, lambda layer: layer.entry_values)
    yield from _lines(
        "KV bytes, a layer", by_attention, lambda layer: _entries_of(layer, context, "entry_values")
    )
    yield from _lines(
        "attention FLOP, a layer", by_attention, lambda layer: _entries_of(layer, context, "entry_flop")
    )
    yield from _lines(f"state bytes ({STATE_VALUE_BYTES} a value, read and written), a layer", by_attention,
                      lambda layer: _times(f"2 * {STATE_VALUE_BYTES}", layer.state_values))  # fmt: skip
    yield from _lines("state FLOP, a layer", by_attention, lambda layer: layer.state_flop)
    yield from _lines("linear FLOP, a layer", by_attention, lambda layer: _times("2", layer.weights))
    yield from _lines("FFN FLOP, a layer", by_ffn, lambda layer: _times("2", layer.active))


def _kinds(layers: Sequence[Layer]) -> list[tuple[int, Layer]]:
    ordered = sorted(layers, key=lambda layer: layer.kind)
    return [(len(list(group)), layer) for layer, group in groupby(ordered)]


def _lines(what: str, kinds: list[tuple[int, Layer]], part: Callable[[Layer], Formula]) -> Iterator[str]:
    for number, layer in kinds:
        shown = part(layer)
        if shown.value:
            yield f"{what} ({number} x {layer.kind}): {shown}"


def _times(factor: str, part: Formula) -> Formula:
    return Formula(f"{factor} * ({part.text})", part.numbers)


def _entries_of(layer: AttentionLayer, context: int, part: str) -> Formula:
    of_entry: Formula = getattr(layer, part)
    entries = {"context": context} if layer.window is None else {"context": context, "window": layer.window}
    shown = "context" if layer.window is None else "min(context, window)"
    return Formula(f"{of_entry.text} * {shown}", (*of_entry.numbers, *entries.items()))
