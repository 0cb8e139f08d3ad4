"""A model in two halves that meet once per layer, and both composed again.

What lives here: AttentionHalf (embedding, norms, attention, router, residual stream, LM head), FFNHalf (one shard of
the MLPs and experts), and WholeModel, the numerical oracle. What does not: loading (checkpoint.py), the order in which
passes run (pipeline.py), anything between two processes. All of it runs under `torch.inference_mode()` by its callers.

Shapes: T rows of the micro-batch, H hidden, V vocabulary, N rows for which logits are wanted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from afd_server.models.attention_layer import AttentionLayer, AttentionSide
from afd_server.models.batch import AttentionBatch
from afd_server.models.ffn_call import FFNCall
from afd_server.models.ffn_dense import DenseFFN
from afd_server.models.ffn_moe import MoEFFN
from afd_server.models.operations import Embedding, Linear, Operations
from afd_server.models.rope import Rope, RopeTable
from afd_server.models.spec import ModelSpec
from afd_server.types import ScheduledRequest


@dataclass(frozen=True, slots=True)
class FFNShard:
    """Which part of the FFN weights a worker holds: expert shard ep_rank of ep_size, and of every expert the slice
    tp_rank of tp_size of its intermediate dimension. A dense MLP is cut into ep_size * tp_size slices."""

    ep_rank: int = 0
    ep_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.ep_rank < self.ep_size and 0 <= self.tp_rank < self.tp_size, self

    def experts(self, num_experts: int) -> tuple[int, int]:
        """First and one-past-last of the routed experts held."""
        return bounds(num_experts, self.ep_rank, self.ep_size)

    def expert_slice(self, intermediate_size: int) -> tuple[int, int]:
        """Of the intermediate dimension of an expert, routed or shared."""
        return bounds(intermediate_size, self.tp_rank, self.tp_size)

    def dense_slice(self, intermediate_size: int) -> tuple[int, int]:
        """Of the intermediate dimension of a dense MLP, which every worker has a part of."""
        return bounds(
            intermediate_size, self.ep_rank * self.tp_size + self.tp_rank, self.ep_size * self.tp_size
        )


def bounds(total: int, rank: int, size: int) -> tuple[int, int]:
    """Start and stop of part `rank` when `total` is cut into `size` contiguous parts, even or not."""
    return total * rank // size, total * (rank + 1) // size


class Shortcut(Protocol):
    """A faster way from the embedding through the layers, with their calls (attention/shortcut.py)."""

    def __call__(
        self, x_TH: Tensor, batch: AttentionBatch, rope: RopeTable, cache: Sequence[Tensor]
    ) -> Tensor | FFNCall:
        """Runs x through the layers in place. Gives the last layer's answer, which is not in x yet; or, where it came no
        further, the call that is to be made next, before whose answer all is in x."""


class AttentionHalf:
    """All of the model but the FFNs. It is resumed once per layer with what the FFN side made of its call."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        embedding: Embedding,
        layers: Sequence[AttentionLayer],
        final_norm: Tensor,
        lm_head: Linear,
        rope: Rope,
        operations: Operations,
        cache_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        assert len(layers) == spec.num_layers
        self.spec = spec
        self._embedding = embedding
        self._layers = layers
        self._sides = [operations.attention_side(layer, spec.rms_norm_eps) for layer in layers]
        self._final_norm = final_norm
        self._lm_head = lm_head
        self._rope = rope
        self._operations = operations
        self.cache_dtype, self.device = cache_dtype, device

    def weight_bytes(self) -> int:
        """Bytes of all tensors held; a tied LM head counts once."""
        tensors = [*self._embedding.tensors(), self._final_norm]
        if self._lm_head is not self._embedding:
            tensors += self._lm_head.tensors()
        for layer in self._layers:
            tensors += [layer.attention_norm, layer.ffn_norm, *layer.attention.tensors()]
            tensors += layer.router.tensors() if layer.router is not None else []
        return _bytes_of(tensors)

    @property
    def sides(self) -> Sequence[AttentionSide]:
        """The layers' courses, in their order."""
        return self._sides

    def forward(
        self, batch: AttentionBatch, cache: Sequence[Tensor], shortcut: Shortcut | None = None
    ) -> Generator[FFNCall, Tensor, Tensor]:
        """One pass: yields a call per layer, is resumed with its answer [T, H] (any dtype), returns what `logits` takes.

        cache: per layer [blocks, block_size, *cache_entry_shape]; the rows' entries are written into it. Returns
        [N, H], the batch's logit_rows after the last layer. shortcut: makes the first calls, or all, by itself: they are
        not yielded.
        """
        x_TH, rope = self.begin(batch.token_ids, batch.positions)
        answer_TH: Tensor | None = None
        first = 0
        if shortcut is not None:
            reached = shortcut(x_TH, batch, rope, cache)
            if isinstance(reached, FFNCall):
                answer_TH = (yield reached).to(device=x_TH.device, dtype=x_TH.dtype)
                first = reached.layer + 1
            else:
                answer_TH, first = reached, len(self._sides)
        for index in range(first, len(self._sides)):
            call = FFNCall(index, *self._sides[index].forward(x_TH, answer_TH, batch, rope, cache[index]))
            answer_TH = (yield call).to(device=x_TH.device, dtype=x_TH.dtype)
        assert answer_TH is not None
        return self.end(x_TH, answer_TH, batch.logit_rows)

    # What lies before and after the layers.

    def begin(self, token_ids_T: Tensor, positions_T: Tensor) -> tuple[Tensor, RopeTable]:
        """The residual stream [T, H] as it begins, and the angles for all layers."""
        x_TH = self._embedding.rows(token_ids_T)
        return x_TH, self._rope.table(positions_T, x_TH.dtype)

    def end(self, x_TH: Tensor, answer_TH: Tensor, rows: Tensor) -> Tensor:
        """The residual stream's rows [N, H] as it ends, from the answer to the last call and the stream before it."""
        return x_TH[rows] + answer_TH[rows]

    def logits(self, x_NH: Tensor) -> Tensor:
        """Float32 logits [N, V] of rows of the residual stream as it ends."""
        normed_NH = self._operations.rms_norm(x_NH, self._final_norm, self.spec.rms_norm_eps)
        return self._lm_head.forward(normed_NH).to(torch.float32)


class FFNHalf:
    """One shard of every layer's FFN. Holds weights and nothing else; calls may come in any order."""

    def __init__(
        self, layers: Sequence[DenseFFN | MoEFFN], *, device: torch.device, dtype: torch.dtype
    ) -> None:
        """dtype: of the activations."""
        self._layers = layers
        self.device, self.dtype = device, dtype

    def weight_bytes(self) -> int:
        """Bytes of all tensors held."""
        return _bytes_of(tensor for layer in self._layers for tensor in layer.tensors())

    @property
    def layers(self) -> Sequence[DenseFFN | MoEFFN]:
        return self._layers

    def routed(self, call: FFNCall) -> FFNCall:
        """The call with its experts named: by this half's router where nobody did so yet, and then with x converted to
        the model's dtype and device. A dense layer's call, and one that names its experts, come back as they are.

        Whoever merges calls does this to each of them first. All expert shards must choose the same experts for a row:
        if two settle a near tie differently, an expert answers twice or not at all. The same router on the same rows
        chooses the same, but a matrix product rounds differently for another number of rows, and each shard merges the
        calls that happen to wait there together. A call by itself has the same rows on every shard.
        """
        layer = self._layers[call.layer]
        if isinstance(layer, DenseFFN) or (call.topk_ids is not None and call.topk_weights is not None):
            return call
        x_TH = call.x.to(device=self.device, dtype=self.dtype)
        topk_ids, topk_weights = layer.route(x_TH)
        return FFNCall(call.layer, x_TH, topk_ids, topk_weights)

    def forward(self, call: FFNCall, out: Tensor | None = None) -> Tensor:
        """This shard's part of the answer, [T, H]; the parts of all shards add up to it.

        call.x and out may be of another float dtype than the model and on another device: they are converted. Without
        out the result is of the model's dtype and on its device; with out it is written there, and out is returned.
        A call that is to be routed here is routed first (see routed).
        """
        call = self.routed(call)
        x_TH = call.x.to(device=self.device, dtype=self.dtype)
        layer = self._layers[call.layer]
        in_place = out is not None and out.dtype is self.dtype and out.device == x_TH.device
        if isinstance(layer, DenseFFN):
            y_TH = layer.forward(x_TH, out if in_place else None)
        else:
            assert call.topk_ids is not None and call.topk_weights is not None  # routed() saw to it
            ids_TK, weights_TK = call.topk_ids.to(x_TH.device), call.topk_weights.to(x_TH.device)
            in_place = in_place and self.dtype is torch.float32
            y_TH = layer.forward(x_TH, ids_TK, weights_TK, out if in_place else None)
        if out is None:
            return y_TH.to(self.dtype)
        return out if in_place else out.copy_(y_TH)


class WholeModel:
    """Both halves in one process, the FFN side in any number of shards: what every split model must equal."""

    def __init__(self, attention: AttentionHalf, ffn_halves: Sequence[FFNHalf]) -> None:
        self.spec = attention.spec
        self._attention = attention
        self._ffn_halves = ffn_halves

    def run(self, batch: AttentionBatch, cache: Sequence[Tensor]) -> Tensor:
        """Float32 logits [N, V] of the batch's logit_rows; see AttentionHalf.forward."""
        forward_pass = self._attention.forward(batch, cache)
        answer: Tensor | None = None
        while True:
            try:
                call = forward_pass.send(answer)  # type: ignore[arg-type]  # a generator starts with None
            except StopIteration as end:
                return self._attention.logits(end.value)
            answer = sum(half.forward(call).to(torch.float32) for half in self._ffn_halves)  # type: ignore[assignment]

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Float32 logits [T, V] after every token of one text, computed in one go on a cache of its own."""
        device, dtype = self._attention.device, self._attention.cache_dtype
        entry = (1, len(token_ids), *self.spec.attention.cache_entry_shape)
        cache = [torch.zeros(entry, device=device, dtype=dtype) for _ in range(self.spec.num_layers)]
        request = ScheduledRequest("logits", 0, tuple(token_ids), (0,), samples=True)
        batch = AttentionBatch.build([request], len(token_ids), device)
        every_row = torch.arange(len(token_ids), device=device)
        return self.run(dataclasses.replace(batch, logit_rows=every_row), cache)


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
