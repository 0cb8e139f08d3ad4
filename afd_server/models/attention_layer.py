"""One decoder layer without its FFN: its weights, and its course step by step, which every kernel of a whole layer must equal.

What lives here: AttentionLayer and StepByStep. What does not: the kinds of attention (attention_*.py), and the CPU's kernel
for all the steps at once (attention_layer_cpu.py). Which one a worker uses its Operations decide.

Shapes: T rows, H hidden, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from afd_server.models.batch import AttentionBatch
from afd_server.models.rope import RopeTable

if TYPE_CHECKING:
    from afd_server.models.operations import Operations
    from afd_server.models.router import ExpertRouter


class Attention(Protocol):
    """One layer's attention of any kind."""

    def forward(self, x_TH: Tensor, batch: AttentionBatch, rope: RopeTable, cache: Tensor) -> Tensor:
        """[T, H] for normed x; writes the rows' entries into the layer's cache."""

    def tensors(self) -> list[Tensor]:
        """Every weight it holds."""


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """The weights. router: None for a dense layer, and where the FFN side routes."""

    attention_norm: Tensor
    attention: Attention
    ffn_norm: Tensor
    router: ExpertRouter | None = None


class AttentionSide(Protocol):
    """What a layer does between the FFN's answer to the layer before and the call of its own."""

    def forward(
        self, x_TH: Tensor, answer_TH: Tensor | None, batch: AttentionBatch, rope: RopeTable, cache: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Adds answer and attention to x in place. Gives normed x [T, H], and the ids and weights [T, K] of the experts if
        they are chosen here."""


class StepByStep:
    """One operation after the other."""

    def __init__(self, layer: AttentionLayer, operations: Operations, eps: float) -> None:
        self._layer, self._operations, self._eps = layer, operations, eps

    def forward(
        self, x_TH: Tensor, answer_TH: Tensor | None, batch: AttentionBatch, rope: RopeTable, cache: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        layer, operations, eps = self._layer, self._operations, self._eps
        normed_TH = operations.add_rms_norm(x_TH, answer_TH, layer.attention_norm, eps)
        attended_TH = layer.attention.forward(normed_TH, batch, rope, cache)
        normed_TH = operations.add_rms_norm(x_TH, attended_TH, layer.ffn_norm, eps)
        if layer.router is None:
            return normed_TH, None, None
        return normed_TH, *layer.router.forward(normed_TH)
