"""A step's way through the layers in one kernel call, hops included: what Python does between two layers takes longer than the
wire, once the weights have pushed it out of the core's caches.

What lives here: when that may be, and what is told of it to the account of the step. What does not: the loop (kernels/hop.py),
and everything unusual: a call that is not answered as it should be is made again by the long way (ffn_group.py), which may be
done with any call.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from afd_server.attention.ffn_group import FFNGroup
from afd_server.kernels.hop import LayerLoop
from afd_server.kernels.layer import AttentionKernel
from afd_server.models.attention_layer_cpu import KernelLayer
from afd_server.models.batch import AttentionBatch
from afd_server.models.ffn_call import FFNCall
from afd_server.models.halves import AttentionHalf
from afd_server.models.rope import RopeTable


class Shortcut:
    """For steps of one micro-batch whose calls go to one worker, over shared memory and in float32. Used by one thread.

    waiting_s: of the last step, in it: handing calls over and waiting for answers.
    """

    def __init__(self, half: AttentionHalf, kernels: Sequence[AttentionKernel], ffn_group: FFNGroup) -> None:
        """kernels: those of all layers, in their order."""
        self._sides = half.sides
        self._routed = [kernel.top_k > 0 for kernel in kernels]
        self._loop = LayerLoop(kernels, ffn_group.hops.layers)
        self._group = ffn_group
        self.waiting_s = 0.0

    def __call__(
        self, x_TH: Tensor, batch: AttentionBatch, rope: RopeTable, cache: Sequence[Tensor]
    ) -> Tensor | FFNCall:
        """See models.halves.Shortcut. Raises WorkerTimeoutError and WorkerGivenUpError."""
        self.waiting_s = 0.0
        rows = len(x_TH)
        begun = self._group.begin_run(rows)
        if begun is None:
            return FFNCall(0, *self._sides[0].forward(x_TH, None, batch, rope, cache[0]))
        place, patience_s = begun
        run = self._loop(
            x_TH, place, patience_s, cos=rope.cos, sin=rope.sin, interleaved=rope.interleaved, slots=batch.slots,
            row_starts=batch.row_starts, lengths=batch.lengths, block_tables=batch.block_tables, caches=cache,
        )  # fmt: skip
        self.waiting_s = run.waiting_s
        self._group.end_run(run, rows)
        layer = run.answered
        if layer == len(self._routed):
            return place.answer
        # The slot's memory belongs to the next call from now on.
        if self._routed[layer]:
            return FFNCall(layer, place.x.clone(), place.topk_ids.clone(), place.topk_weights.clone())
        return FFNCall(layer, place.x.clone(), None, None)


def shortcut_for(half: AttentionHalf, ffn_group: FFNGroup) -> Shortcut | None:
    """None where a layer is no kernel of its own: on a GPU, with other attention than grouped-query."""
    kernels = [side.kernel for side in half.sides if isinstance(side, KernelLayer)]
    # A slot has places for as many experts of a row as the layers that route have, all alike.
    if len(kernels) < len(half.sides) or len({kernel.top_k for kernel in kernels if kernel.top_k}) > 1:
        return None
    return Shortcut(half, kernels, ffn_group)
