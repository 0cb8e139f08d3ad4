"""The one message between the halves of a model: what a decoder layer asks of its FFN.

What lives here: the call's data. What does not: how it is computed (halves.py) or carried (transport/).
Shapes: T rows of the micro-batch, H hidden size, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class FFNCall:
    """Activations that layer `layer`'s FFN is to be applied to; the answer is [T, H].

    x: [T, H], normalised already. topk_ids [T, K] int32 and topk_weights [T, K] float32 are the experts of each row;
    both are None for a dense layer, and for a MoE layer whose router runs on the FFN side.
    """

    layer: int
    x: Tensor
    topk_ids: Tensor | None = None
    topk_weights: Tensor | None = None
