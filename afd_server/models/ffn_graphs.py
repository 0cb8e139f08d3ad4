"""The FFN half's layers as CUDA graphs, for calls of few rows.

What lives here: the tensors that stay where they are, and how a call is filled up to a graph's size. What does not: the layers
(halves.py, ffn_moe.py, ffn_dense.py) and the recording (graphs.py). Larger calls take the way of halves.py. Rows that fill a
graph up have chosen no expert.

Shapes: T rows of the call, P of the graph, R at most, H hidden, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from afd_server.models.ffn_call import FFNCall
from afd_server.models.ffn_dense import DenseFFN
from afd_server.models.ffn_moe import MoEFFN
from afd_server.models.graphs import MAX_ROWS, Capture, Captured, filled_up
from afd_server.models.halves import FFNHalf


class FFNGraphs:
    """In the place of the half that it wraps. Used by one thread, since all layers and sizes share their tensors."""

    def __init__(self, half: FFNHalf, capture: Capture, *, max_rows: int = MAX_ROWS) -> None:
        """max_rows: of a call, at most; larger ones than MAX_ROWS are not for graphs."""
        self._half, self._capture = half, capture
        self._max_rows = min(MAX_ROWS, filled_up(max_rows))
        self._places: dict[int, StaticCall] = {}  # by K, 0 for dense layers
        self._captured: dict[tuple[int, int], Captured] = {}

    @property
    def layers(self) -> Sequence[DenseFFN | MoEFFN]:
        """See FFNHalf."""
        return self._half.layers

    def routed(self, call: FFNCall) -> FFNCall:
        """See FFNHalf.routed."""
        return self._half.routed(call)

    def forward(self, call: FFNCall, out: Tensor | None = None) -> Tensor:
        """See FFNHalf.forward. Without out, the result may be a view of what the next call overwrites."""
        rows = len(call.x)
        if rows > self._max_rows:
            return self._half.forward(call, out)
        call, padded = self._half.routed(call), filled_up(rows)
        top_k = 0 if call.topk_ids is None else call.topk_ids.shape[1]
        if top_k not in self._places:
            self._places[top_k] = StaticCall(self._half, self._max_rows, call.x.shape[1], top_k)
        place, key = self._places[top_k], (call.layer, padded)
        place.load(call, padded)
        if key not in self._captured:
            self._captured[key] = Captured(place.layer(call.layer, padded), self._capture)
        self._captured[key]()
        answer_TH = place.answer[:rows]
        return answer_TH.to(self._half.dtype) if out is None else out.copy_(answer_TH)


class StaticCall:
    """The tensors that all graphs of layers with so many experts per token work on, whatever their size."""

    def __init__(self, half: FFNHalf, max_rows: int, hidden: int, top_k: int) -> None:
        self._half = half
        self._x = torch.zeros(max_rows, hidden, dtype=half.dtype, device=half.device)
        self._ids = torch.full((max_rows, top_k), -1, dtype=torch.int32, device=half.device)
        self._weights = torch.zeros(max_rows, top_k, dtype=torch.float32, device=half.device)
        # What the layers themselves compute in: see DenseFFN.forward and MoEFFN.forward.
        self.answer = torch.zeros_like(self._x, dtype=torch.float32 if top_k else half.dtype)

    def load(self, call: FFNCall, padded: int) -> None:
        """Takes the call's place, and fills it up to so many rows."""
        rows = len(call.x)
        self._x[:rows].copy_(call.x)
        if call.topk_ids is not None and call.topk_weights is not None:
            self._ids[:rows].copy_(call.topk_ids)
            self._weights[:rows].copy_(call.topk_weights)
            if rows < padded:
                self._ids[rows:padded].fill_(-1)

    def layer(self, index: int, padded: int) -> Callable[[], None]:
        """A layer's answer to the first so many rows."""
        layer = self._half.layers[index]
        x_PH, answer_PH = self._x[:padded], self.answer[:padded]
        ids_PK, weights_PK = self._ids[:padded], self._weights[:padded]

        def forward() -> None:
            if isinstance(layer, DenseFFN):
                layer.forward(x_PH, answer_PH)
            else:
                layer.forward(x_PH, ids_PK, weights_PK, answer_PH)

        return forward
