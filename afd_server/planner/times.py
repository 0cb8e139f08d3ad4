"""How long the parts of a decoder layer take, as a function of the work in a micro-batch: coefficients, and nothing else.

What lives here: the four parts (attention, FFN, wire, and what a step costs besides its layers), the formulas between
them and their work, and what becomes of the FFN's when it is divided. What does not: where the coefficients come from, which is the
roofline of a card (roofline.py) or a measurement (profile_file.py reads one). The layout search, the simulator and the
scheduler's model of step time call this.

    attention(rows, context)  fixed + rows * row + max(weights, rows * compute_row) + context * context_token
    ffn(rows)                 fixed + rows * row + max(read(rows), rows * compute_row)
    either beyond many_rows   (many_rows) + (rows - many_rows) * further_row
    read(rows)                dense + shared + expert * E * (1 - (1 - k / E) ** rows)
    wire(rows)                fixed + rows * row
    step_overhead(rows)       fixed + rows * row

Reading weights and computing with them overlap, so the longer of both counts. Rows that choose k of E experts at random take
so many different ones, and only those are read. Products of many rows, as prompts have, are faster by the row than those of
decoding, so a measurement has a second slope for them. Every time is the mean over the layers of the model.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from math import ceil, inf


@dataclass(frozen=True, slots=True)
class AttentionTimes:
    """Of the attention side of one layer on one worker: norms, projections, attention, router.

    weights_s: reading the projections. compute_row_s: their arithmetic for a row. context_token_s: one cache entry that a
    decoding row attends to. chunk_pair_s: one query-key pair inside a prompt, whose keys are read once for all its queries.
    further_row_s: each row beyond many_rows, in place of row_s and compute_row_s.
    """

    fixed_s: float = 0.0
    row_s: float = 0.0
    weights_s: float = 0.0
    compute_row_s: float = 0.0
    context_token_s: float = 0.0
    chunk_pair_s: float = 0.0
    many_rows: float = inf
    further_row_s: float = 0.0

    def seconds(self, rows: float, context_tokens: float, chunk_pairs: float = 0.0) -> float:
        few = min(rows, self.many_rows)
        projections_s = max(self.weights_s, few * self.compute_row_s) + (rows - few) * self.further_row_s
        read_s = context_tokens * self.context_token_s + chunk_pairs * self.chunk_pair_s
        return self.fixed_s + few * self.row_s + projections_s + read_s


@dataclass(frozen=True, slots=True)
class FFNTimes:
    """Of the FFN of one layer on one worker, for its shard of the weights.

    dense_s, shared_s: reading the dense MLPs and the shared experts. expert_s: reading one routed expert. num_experts: that this
    worker holds. chosen_share: of all experts, that one row takes. compute_row_s: arithmetic for a row. further_row_s: each row
    beyond many_rows, in place of row_s and compute_row_s.
    """

    fixed_s: float = 0.0
    row_s: float = 0.0
    dense_s: float = 0.0
    shared_s: float = 0.0
    expert_s: float = 0.0
    num_experts: float = 0.0
    chosen_share: float = 0.0
    compute_row_s: float = 0.0
    many_rows: float = inf
    further_row_s: float = 0.0

    def experts_read(self, rows: float) -> float:
        """How many different experts so many rows take, on average."""
        return self.num_experts * (1 - (1 - self.chosen_share) ** rows)

    def seconds(self, rows: float) -> float:
        few = min(rows, self.many_rows)
        read_s = self.dense_s + self.shared_s + self.expert_s * self.experts_read(few)
        further_s = (rows - few) * self.further_row_s
        return self.fixed_s + few * self.row_s + max(read_s, few * self.compute_row_s) + further_s

    def shard(self, expert_shards: int, tensor_shards: int) -> FFNTimes:
        """Of one worker when so many share what one did. `rows` stays the whole micro-batch's.

        A dense MLP is cut into a slice for every worker. Each expert shard holds the shared expert, and computes it for its part
        of the rows. Where the experts do not divide evenly, it is the worker that has most.
        """
        parts = expert_shards * tensor_shards
        experts = ceil(self.num_experts / expert_shards)
        share = experts / self.num_experts if self.num_experts else 1 / expert_shards
        return dataclasses.replace(
            self,
            dense_s=self.dense_s / parts,
            shared_s=self.shared_s / tensor_shards,
            expert_s=self.expert_s / tensor_shards,
            num_experts=experts,
            compute_row_s=self.compute_row_s * share / tensor_shards,
            further_row_s=self.further_row_s * share / tensor_shards,
        )


@dataclass(frozen=True, slots=True)
class LinearTimes:
    """A time that grows in proportion to rows from a fixed part on."""

    fixed_s: float = 0.0
    row_s: float = 0.0

    def seconds(self, rows: float) -> float:
        return self.fixed_s + rows * self.row_s


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """One attention worker, one FFN shard and the way between them, for one layer and one micro-batch.

    wire: one direction of a hop, the mean of both. overhead: once a step, not a layer: embedding, final norm, LM head,
    sampling, scheduling.
    """

    num_layers: int
    attention: AttentionTimes
    ffn: FFNTimes
    wire: LinearTimes = LinearTimes()
    overhead: LinearTimes = LinearTimes()

    def attention_s(self, rows: float, context_tokens: float, chunk_pairs: float = 0.0) -> float:
        """rows: new tokens. context_tokens: cache entries that the decoding ones read, all requests together. chunk_pairs:
        query-key pairs of the others, which belong to prompts."""
        return self.attention.seconds(rows, context_tokens, chunk_pairs)

    def ffn_s(self, rows: float) -> float:
        """Of one FFN shard; its calls may be merged of several attention workers, and then rows are the sum."""
        return self.ffn.seconds(rows)

    def wire_s(self, rows: float) -> float:
        """One direction of one hop."""
        return self.wire.seconds(rows)

    def step_overhead_s(self, rows: float) -> float:
        """What a step of `rows` sampled tokens takes besides its layers."""
        return self.overhead.seconds(rows)

    def layers_s(self, rows: float, context_tokens: float, chunk_pairs: float = 0.0) -> float:
        """All layers of one micro-batch on one attention worker and this FFN shard, nothing overlapping."""
        layer_s = self.attention_s(rows, context_tokens, chunk_pairs) + self.ffn_s(rows) + 2 * self.wire_s(rows)
        return self.num_layers * layer_s

    def step_s(self, rows: float, context_tokens: float) -> float:
        """A step of decoding requests as one micro-batch."""
        return self.layers_s(rows, context_tokens) + self.step_overhead_s(rows)
