"""USD per token by the paper's model (arXiv 2507.19427): every card at its limit, communication hidden.

    attention = max(FLOP_attention * USD_per_FLOP, bytes_KV * USD_per_byte) + FLOP_linear * USD_per_FLOP
    FFN       = FLOP_FFN * USD_per_FLOP

What lives here: these two, what follows from them for a choice of cards, and how sparse experts may be. What does not: counts (counts.py), and what a
layout that must keep a promise really costs (search.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from afd_server.planner.counts import Counts
from afd_server.planner.hardware import Hardware
from afd_server.planner.model_config import CountedModel

TOKENS = 1e6  # USD are shown for so many


@dataclass(frozen=True, slots=True)
class RoleCost:
    """USD per million decoded tokens on one kind of card."""

    attention: float
    ffn: float


def role_cost(counts: Counts, card: Hardware, dtype: str = "fp8") -> RoleCost:
    """dtype: of the arithmetic; where the card lacks it, the next larger one."""
    usd_per_flop = card.usd_per_s / card.flop_per_s(dtype)
    usd_per_byte = card.usd_per_s / card.bytes_per_s
    attention = max(counts.attention_flop * usd_per_flop, counts.kv_bytes * usd_per_byte)
    attention += counts.linear_flop * usd_per_flop
    return RoleCost(TOKENS * attention, TOKENS * counts.ffn_flop * usd_per_flop)


@dataclass(frozen=True, slots=True)
class CheapestCards:
    """The card of each role that costs least, and what both cost together for a million tokens."""

    attention: str
    ffn: str
    usd_per_mtok: float


def cheapest(costs: Mapping[str, RoleCost]) -> CheapestCards:
    attention = min(costs, key=lambda name: costs[name].attention)
    ffn = min(costs, key=lambda name: costs[name].ffn)
    return CheapestCards(attention, ffn, costs[attention].attention + costs[ffn].ffn)


# --- sparsity ------------------------------------------------------------------------------------------------------

# The paper's: 3 stages share a TPOT of 50 ms, and 3 bytes a value (FP8 out, BF16 back) must pass within one of 16.6 ms.
# (dispatch + combine) * B_moe / Net = stage, with B_moe = FLOPS / (2 * bytes_per_s) / S, gives 11.1 ms = 16.6 ms * 2 / 3.
PAPER_TPOT_S, PAPER_STAGE_S = 50e-3, 11.1e-3
CARDS_PER_INSTANCE = 8


def minimum_sparsity(hidden: int, layers: int, card: Hardware, tpot_s: float = PAPER_TPOT_S) -> float:
    """The smallest share of experts a token may take for the network to bring as many tokens as the FFN can compute.

    An FFN of 8 cards with a NIC each needs B_dense = FLOPS / (2 * bytes_per_s) tokens a weight to be busy, times 1 / S
    where a token takes the share S of the experts; and they must arrive within their part of a stage.
    """
    network = CARDS_PER_INSTANCE * card.network_bytes_per_s
    stage_s = PAPER_STAGE_S * tpot_s / PAPER_TPOT_S
    return hidden * card.flop_per_s("fp8") * layers / (network * card.bytes_per_s * stage_s)


def sparsity(model: CountedModel) -> float | None:
    """The share of experts that a token takes, the shared ones among them: (k + shared) / (E + shared). None without experts."""
    mixture = next((layer for layer in model.ffn if layer.num_experts), None)
    if mixture is None:
        return None
    shared = mixture.shared.value / mixture.expert.value
    return (mixture.top_k + shared) / (mixture.num_experts + shared)
