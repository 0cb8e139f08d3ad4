"""The attention half's layers as CUDA graphs, for micro-batches in which every request has one row, as all have in decoding.

What lives here: the tensors that stay where they are, and how a batch is filled up to a graph's size. What does not: the layers
(halves.py, attention_layer.py) and the recording (graphs.py). Prompt chunks take the way of halves.py.

A graph holds what lies between the answer to one call and the next call; the first one also looks up embeddings and angles. Rows
that fill it up have no tokens to attend to, and write their entries into a block of the cache that no request has. Block
tables are as wide as the longest request's, in every graph: the kernels read no further than a row's length, and how a context
is split among programs depends on the width alone, at the cost of programs that find nothing to do.

Shapes: P rows of the graph, T of them the batch's, R rows at most, W blocks of the longest request, H hidden, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import torch
from torch import Tensor

from afd_server.models.batch import AttentionBatch
from afd_server.models.ffn_call import FFNCall
from afd_server.models.graphs import MAX_ROWS, Capture, Captured, filled_up
from afd_server.models.halves import AttentionHalf
from afd_server.models.rope import RopeTable
from afd_server.types import ScheduledRequest


class AttentionGraphs:
    """Used by one thread at a time. Micro-batches are told apart by number: each has tensors of its own, and its own graphs."""

    def __init__(
        self,
        half: AttentionHalf,
        cache: Sequence[Tensor],
        *,
        block_size: int,
        max_rows: int,
        max_model_len: int,
        capture: Capture,
    ) -> None:
        """cache: as halves.py has it, with one block more at its end than requests are given. max_rows: of a micro-batch, at
        most; larger ones than MAX_ROWS are not taken here. max_model_len: tokens of a request, at most."""
        self._half, self._cache, self._capture = half, cache, capture
        self._block_size = block_size
        self.max_rows = min(MAX_ROWS, filled_up(max_rows))
        self._num_blocks = -(-max_model_len // block_size)
        self._micro_batches: dict[int, StaticBatch] = {}
        self._layers: dict[tuple[int, int], list[Captured]] = {}

    def take(self, requests: Sequence[ScheduledRequest]) -> bool:
        """Whether `forward` may be called with them."""
        return len(requests) <= self.max_rows and all(len(request.token_ids) == 1 for request in requests)

    def forward(
        self, micro_batch: int, requests: Sequence[ScheduledRequest]
    ) -> Generator[FFNCall, Tensor, Tensor]:
        """As AttentionHalf.forward. A call's tensors are the micro-batch's own, and stay as they are until its answer has come."""
        static = self._micro_batches.get(micro_batch)
        if static is None:
            static = self._micro_batches[micro_batch] = StaticBatch(
                self._half, self._cache, self.max_rows, self._num_blocks, self._block_size
            )
        batch = AttentionBatch.build(requests, self._block_size, torch.device("cpu"))
        rows, padded = len(requests), filled_up(len(requests))
        static.load(batch, padded)
        for index, layer in enumerate(self._graphs(micro_batch, static, padded)):
            layer()
            static.answer[:rows].copy_((yield static.call(index, rows)))
        return self._half.end(static.x[:rows], static.answer[:rows], batch.logit_rows.to(self._half.device))

    def _graphs(self, micro_batch: int, static: StaticBatch, padded: int) -> list[Captured]:
        layers = self._layers.get((micro_batch, padded))
        if layers is None:
            layers = self._layers[micro_batch, padded] = [
                Captured(static.layer(index, padded), self._capture) for index in range(len(self._half.sides))
            ]
        return layers


class StaticBatch:
    """The tensors of one micro-batch number, which all of its graphs work on, whatever their size."""

    def __init__(
        self, half: AttentionHalf, cache: Sequence[Tensor], max_rows: int, num_blocks: int, block_size: int
    ) -> None:
        self._half, self._cache, self._block_size = half, cache, block_size
        # The block that no request has is the last one.
        self._spare_slot = (len(cache[0]) - 1) * block_size

        def integers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=half.device)

        self._token_ids, self._positions, self._slots = (integers(max_rows) for _ in range(3))
        self._lengths = integers(max_rows, dtype=torch.int32)
        self._block_tables = integers(max_rows, num_blocks, dtype=torch.int32)
        self._row_starts = torch.arange(max_rows + 1, dtype=torch.int32, device=half.device)
        x_RH, self._rope = half.begin(self._token_ids, self._positions)
        self.x = x_RH.clone()  # the residual stream
        self.answer, self._normed = torch.zeros_like(x_RH), torch.zeros_like(x_RH)
        self._chosen: dict[int, tuple[Tensor, Tensor] | None] = {}  # layer -> experts of its rows
        self._chosen_by_k: dict[int, tuple[Tensor, Tensor]] = {}

    def load(self, batch: AttentionBatch, padded: int) -> None:
        """Copies a batch that lies in the host's memory, and fills it up to so many rows."""
        rows, width = batch.block_tables.shape
        self._token_ids[:rows].copy_(batch.token_ids)
        self._positions[:rows].copy_(batch.positions)
        self._slots[:rows].copy_(batch.slots)
        self._lengths[:rows].copy_(batch.lengths)
        self._block_tables[:rows, :width].copy_(batch.block_tables)
        if rows < padded:
            self._slots[rows:padded].fill_(self._spare_slot)
            self._lengths[rows:padded].fill_(0)

    def layer(self, index: int, padded: int) -> Callable[[], None]:
        """What a layer does between two calls, with the first so many rows."""
        side, cache = self._half.sides[index], self._cache[index]
        rope = RopeTable(self._rope.cos[:padded], self._rope.sin[:padded], self._rope.interleaved)
        x_PH, answer_PH, normed_PH = self.x[:padded], self.answer[:padded], self._normed[:padded]
        batch = AttentionBatch(
            token_ids=self._token_ids[:padded],
            positions=self._positions[:padded],
            slots=self._slots[:padded],
            row_starts=self._row_starts[: padded + 1],
            lengths=self._lengths[:padded],
            block_tables=self._block_tables[:padded],
            logit_rows=self._row_starts[:0],
            requests=(),
            block_size=self._block_size,
        )

        def forward() -> None:
            if index == 0:
                began_PH, angles = self._half.begin(batch.token_ids, batch.positions)
                x_PH.copy_(began_PH)
                rope.cos.copy_(angles.cos)
                rope.sin.copy_(angles.sin)
            normed, ids_PK, weights_PK = side.forward(x_PH, answer_PH if index else None, batch, rope, cache)
            normed_PH.copy_(normed)
            self._keep_choice(index, ids_PK, weights_PK)

        return forward

    def call(self, index: int, rows: int) -> FFNCall:
        """What the layer asks for."""
        chosen = self._chosen[index]
        if chosen is None:
            return FFNCall(index, self._normed[:rows])
        return FFNCall(index, self._normed[:rows], chosen[0][:rows], chosen[1][:rows])

    def _keep_choice(self, index: int, ids_PK: Tensor | None, weights_PK: Tensor | None) -> None:
        """Layers that choose as many experts for a row share the place."""
        if ids_PK is None or weights_PK is None:
            self._chosen[index] = None
            return
        rows, top_k = ids_PK.shape
        if top_k not in self._chosen_by_k:  # the first time, when nothing is recorded
            shape = (len(self.x), top_k)
            self._chosen_by_k[top_k] = (ids_PK.new_zeros(shape), weights_PK.new_zeros(shape))
        kept = self._chosen[index] = self._chosen_by_k[top_k]
        kept[0][:rows].copy_(ids_PK)
        kept[1][:rows].copy_(weights_PK)
