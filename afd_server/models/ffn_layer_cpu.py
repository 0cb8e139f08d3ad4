"""A layer's FFN as one kernel call on a CPU, for a loop that calls it without Python in between (kernels/hop.py).

What lives here: which layers are that. What does not: the layers themselves (ffn_moe.py, ffn_dense.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from afd_server.kernels.call_account import CallAccount
from afd_server.kernels.hop import KernelFFN
from afd_server.models.ffn_dense import DenseFFN
from afd_server.models.ffn_moe import MoEFFN
from afd_server.models.operations_cpu import KernelExperts, PackedMLP


def kernel_ffn(layer: DenseFFN | MoEFFN) -> KernelFFN | None:
    """None for what takes more than the kernel of the experts: a shared expert, biases, a router on this side."""
    if isinstance(layer, DenseFFN):
        return KernelFFN(layer.mlp.experts, 0, 1, routed=False) if isinstance(layer.mlp, PackedMLP) else None
    held = layer.experts
    if layer.shared is not None or layer.router is not None or not isinstance(held, KernelExperts):
        return None
    return KernelFFN(held.experts, held.first_expert, held.num_experts, routed=True)


def call_account(layers: Sequence[DenseFFN | MoEFFN]) -> CallAccount:
    """For a worker's calls to these layers. The experts that it holds are the same ones in each."""
    held = {layer.held for layer in layers if isinstance(layer, MoEFFN)}
    assert len(held) <= 1, held
    return CallAccount(len(layers), held.pop() if held else range(0))
