"""The tables of the Step-3 paper (arXiv 2507.19427), with this planner's numbers beside them: its first test.

What lives here: the published numbers, and the ways to ours. What does not: printing (paper_report.py). Costs must agree to
0.001 USD; of the measured rows the throughput, with the factors of efficiency.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from afd_server.planner.cost import CheapestCards, RoleCost, cheapest, minimum_sparsity, role_cost
from afd_server.planner.counts import count
from afd_server.planner.hardware import Hardware, choose, read_hardware
from afd_server.planner.layout import Prediction, Workload
from afd_server.planner.model_config import CountedModel, read_counted_model
from afd_server.planner.roofline import Precision
from afd_server.planner.search import Limits, search

MODELS = Path(__file__).parent / "data" / "models"
BUNDLED = ("deepseek-v3", "qwen3-moe-235b", "step-3")
CARDS = ("h800", "h20", "a800", "910b")
CONTEXTS = (8192, 32768)

# USD per million tokens on CARDS: attention at each of CONTEXTS, and FFN.
COSTS = {
    "deepseek-v3": ((0.054, 0.128, 0.114, 0.113), (0.197, 0.460, 0.409, 0.407), (0.014, 0.036, 0.032, 0.032)),
    "qwen3-moe-235b": (
        (0.135, 0.054, 0.091, 0.101),
        (0.527, 0.185, 0.338, 0.376),
        (0.008, 0.021, 0.019, 0.019),
    ),
    "step-3": ((0.048, 0.040, 0.040, 0.043), (0.176, 0.114, 0.120, 0.133), (0.015, 0.040, 0.036, 0.035)),
}
# Attention and FFN on the cheapest card of each, at each of CONTEXTS.
BEST = {"deepseek-v3": (0.068, 0.211), "qwen3-moe-235b": (0.062, 0.193), "step-3": (0.055, 0.129)}
# The smallest share of experts a token may take, on CARDS, for a model of this size.
SPARSITY = {"h800": 0.058, "h20": 0.007, "a800": 0.031, "910b": 0.034}
SPARSITY_HIDDEN, SPARSITY_LAYERS = 7168, 61


def bundled_model(name: str) -> CountedModel:
    return read_counted_model(MODELS / f"{name}.json", name)


def cards() -> dict[str, Hardware]:
    return choose(read_hardware(), CARDS)


def costs(name: str, context: int) -> dict[str, RoleCost]:
    """By card. 8-bit weights and caches."""
    counts = count(bundled_model(name), context)
    return {card: role_cost(counts, hardware) for card, hardware in cards().items()}


def best_deployment(name: str, context: int) -> CheapestCards:
    return cheapest(costs(name, context))


def sparsity(card: Hardware) -> float:
    return minimum_sparsity(SPARSITY_HIDDEN, SPARSITY_LAYERS, card)


# --- what the paper measured ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A row: instances of 8 H800 each, TPOT up to 50 ms. cache_dtype: of scores and cache; weights have 8 bits.

    "BF16 attention" is read so because 16-bit projections too would leave memory for 5040 requests where the paper has 6144.
    """

    name: str
    attention_instances: int
    ffn_instances: int
    context: int
    cache_dtype: str
    tokens_per_s_per_card: float


ROWS = (
    Measured("Step-3, FP8 attention, 2A2F", 2, 2, 4096, "fp8", 4039),
    Measured("Step-3, BF16 attention, 3A2F", 3, 2, 4096, "bfloat16", 3321),
    Measured("Step-3, FP8 attention, 4A2F", 4, 2, 8192, "fp8", 2643),
)
CARDS_PER_INSTANCE = 8
TPOT_S = 0.050


def predicted(row: Measured) -> Prediction:
    """The batch is searched for, as it is for any layout: the paper's is 6144."""
    workload = Workload(bundled_model("step-3"), row.context, cards(), Precision("fp8", "fp8", row.cache_dtype))
    limits = Limits(
        TPOT_S,
        CARDS_PER_INSTANCE * (row.attention_instances + row.ffn_instances),
        pairs=[("h800", "h800")],
        wire_dtypes=("fp8",),
        attention_workers=[CARDS_PER_INSTANCE * row.attention_instances],
        ffn_shapes=[(row.ffn_instances, 1)],
        cards_per_ffn_worker=CARDS_PER_INSTANCE,
    )
    return search(workload, limits, "throughput", best=1)[0]


def measured_rows() -> Iterator[tuple[Measured, Prediction]]:
    for row in ROWS:
        yield row, predicted(row)
