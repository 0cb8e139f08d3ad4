"""The FFN of a dense layer: one gated MLP, whole or one slice of its intermediate dimension.

What does not live here: the arithmetic (operations.py), and which slice a shard holds (checkpoint.py). A slice's result is a
partial sum over the intermediate dimension: the slices' results add up to the whole. Shapes: T rows, H hidden.
"""

from __future__ import annotations

from torch import Tensor

from afd_server.models.operations import GatedMLP


class DenseFFN:
    """The bias of down belongs to one slice only, so that it is added once."""

    def __init__(self, mlp: GatedMLP) -> None:
        self.mlp = mlp

    def tensors(self) -> list[Tensor]:
        return self.mlp.tensors()

    def forward(self, x_TH: Tensor, out: Tensor | None = None) -> Tensor:
        """[T, H] in x's dtype; out, of that dtype and device, is where it is written."""
        return self.mlp.forward(x_TH, out)
