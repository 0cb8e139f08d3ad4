"""What of a card's data sheet a decoding server gets: one set of factors for every prediction without a measurement.

What lives here: the factors and where they come from. What does not: their use (roofline.py, layout.py). A profile of the
machine at hand (`afd profile`) takes their place.

Two are from the paper's times of one attention layer (4 cards, 256 requests, context 8192, bfloat16): 281, 372 and 382 us for
MFA, MLA and GQA on the H800, 438 and 1252 on the H20, 531 and 791 on the A800. With 0.87 of the bytes/s and 0.8 of the FLOP/s
these come out within 12 %, save MLA on the H20 (20 % too slow). They do not explain GQA on the H20, 812 us measured where the
roofline says 386.

The third is of the network. The paper's 2A2F needs 161 of each NIC's 400 Gb/s for its stage of 16.6 ms to hold, and its measured
throughput 169, which are 0.42 of the NIC: rows out and rows back share a stage, as in the paper's budget, so 0.5 would be the
most if both directions were full.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Shares of the data sheet, then seconds. step_s: scheduling and sampling, once a step. memory_used: of a card's memory
    that weights and caches may take; the rest is activations and the runtime's."""

    flops: float = 0.80
    bytes: float = 0.87
    network: float = 0.42
    hop_latency_s: float = 10e-6
    step_s: float = 0.5e-3
    memory_used: float = 0.92


DEFAULT = Efficiency()
