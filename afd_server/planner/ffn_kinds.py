"""What one FFN layer holds and computes, as formulas: a dense MLP, or routed experts with or without a shared one.

What lives here: weights. What does not: which layer is of which kind (model_config.py), sums over layers (counts.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from afd_server.planner.formula import NOTHING, Formula, formula


@dataclass(frozen=True)
class FFNLayer:
    """One layer's. weights: all that an FFN worker holds, in values. active: those that a token needs; two FLOP each.

    dense, shared, expert: of the MLP that every token goes through, of the shared expert, of one routed expert; the parts of
    the former. router: on the attention side, and not in the paper's FLOP.
    """

    kind: str
    weights: Formula
    active: Formula
    dense: Formula = NOTHING
    shared: Formula = NOTHING
    expert: Formula = NOTHING
    router: Formula = NOTHING
    num_experts: int = 0
    top_k: int = 0


def dense_mlp(hidden: int, width: int, *, matrices: int = 3) -> FFNLayer:
    """matrices: 3 with a gate, 2 without."""
    weights = formula("matrices * hidden * width", matrices=matrices, hidden=hidden, width=width)
    return FFNLayer("dense", weights=weights, active=weights, dense=weights)


def mixture(
    hidden: int, experts: int, top_k: int, width: int, shared_width: int, *, matrices: int = 3
) -> FFNLayer:
    """shared_width: of all shared experts together; 0 without."""
    numbers = {"matrices": matrices, "hidden": hidden, "width": width}
    shared = {"shared_width": shared_width} if shared_width else {}
    plus = " + shared_width" if shared_width else ""
    return FFNLayer(
        "experts and a shared one" if shared_width else "experts",
        weights=formula(f"matrices * hidden * (experts * width{plus})", experts=experts, **numbers, **shared),
        active=formula(f"matrices * hidden * (top_k * width{plus})", top_k=top_k, **numbers, **shared),
        shared=formula("matrices * hidden * shared_width", matrices=matrices, hidden=hidden, **shared)
        if shared_width
        else NOTHING,
        expert=formula("matrices * hidden * width", **numbers),
        router=formula("hidden * experts", hidden=hidden, experts=experts),
        num_experts=experts,
        top_k=top_k,
    )
