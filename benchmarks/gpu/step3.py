"""One layer of Step-3 in two parts with random weights, as step3_stages.py and its checks compute them on one device.

What lives here: the shapes, the attention part (norm, projections, attention, norm, router) and the FFN's step of one of 16
GPUs, both on tensors that stay where they are, so that a CUDA graph can hold them. What does not: clocks (timing.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from afd_server.kernels.gpu.experts import ProductTile, grouped_expert_ffn
from afd_server.kernels.gpu.fp8 import BlockScaledWeight
from afd_server.models.attention_mfa import FactorizedAttention
from afd_server.models.batch import AttentionBatch
from afd_server.models.operations import TorchOperations
from afd_server.models.rope import Rope
from afd_server.models.router import ExpertRouter
from afd_server.models.spec import MFASpec, MoESpec, RopeSpec
from afd_server.types import ScheduledRequest

EPS = 1e-5
FFN_SEED = 2  # two processes that make the FFN's weights from it have the same
Random = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class Shapes:
    """tokens: of one micro-batch over all attention GPUs, of which a GPU has `requests`. ffn_gpus share the experts."""

    hidden: int = 7168
    num_heads: int = 64
    head_dim: int = 256
    query_rank: int = 2048
    num_experts: int = 48
    top_k: int = 3
    width: int = 5120
    ffn_gpus: int = 16
    tokens: int = 2048
    requests: int = 128
    contexts: tuple[int, ...] = (4096, 8192)
    block_size: int = 16

    @property
    def experts_held(self) -> int:
        return self.num_experts // self.ffn_gpus


STEP3 = Shapes()
# For the interpreter: every kind of path, hardly any arithmetic.
SMALL = Shapes(256, 8, 32, 128, 6, 2, 128, ffn_gpus=2, tokens=12, requests=3, contexts=(40,), block_size=4)


def random_on(device: torch.device, seed: int = 0) -> Random:
    """normal(*shape, dtype=...), of variance 1 / the last dimension for a matrix, which keeps activations' sizes."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=device)
        return tensor.normal_(std=scale, generator=generator)

    return normal


class AttentionPart:
    """What an attention worker does between two answers of the FFN: adds one, and ends with the next call."""

    def __init__(self, shapes: Shapes, context: int, random: Random, operations: TorchOperations) -> None:
        hidden, rows = shapes.hidden, shapes.requests
        rope_spec = RopeSpec("default", theta=5e5)
        spec = MFASpec(shapes.num_heads, shapes.head_dim, shapes.query_rank, rope_spec)
        moe = MoESpec(shapes.num_experts, shapes.top_k, shapes.width, renormalise=False)
        heads = shapes.num_heads * shapes.head_dim
        sizes = {
            "q_down": (shapes.query_rank, hidden), "k": (shapes.head_dim, hidden), "v": (shapes.head_dim, hidden),
            "q_up": (heads, shapes.query_rank), "o": (hidden, heads),
        }  # fmt: skip
        weights = {name: random(*size, scale=size[1] ** -0.5) for name, size in sizes.items()}
        weights["q_norm"] = 1 + random(shapes.query_rank, scale=0.1)
        self._operations = operations
        self._attention = FactorizedAttention(spec, weights, EPS, operations)
        self._router = ExpertRouter(
            moe, random(shapes.num_experts, hidden, scale=hidden**-0.5), None, operations
        )
        self._norms = [1 + random(hidden, scale=0.1) for _ in range(2)]
        blocks = -(-context // shapes.block_size)
        self.cache = random(rows * blocks, shapes.block_size, 2, 1, shapes.head_dim)
        self.batch = decoding_batch(rows, context, shapes.block_size, self.cache.device)
        self._rope = Rope(rope_spec, shapes.head_dim, self.cache.device).table(
            self.batch.positions, torch.bfloat16
        )
        self.residual, self.answer = random(rows, hidden), random(rows, hidden)
        self.x = self.residual.clone()

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Normed activations, expert ids and weights. Starts from the same residual each time."""
        x, operations = self.x, self._operations
        x.copy_(self.residual)
        normed = operations.add_rms_norm(x, self.answer, self._norms[0], EPS)
        attended = self._attention.forward(normed, self.batch, self._rope, self.cache)
        normed = operations.add_rms_norm(x, attended, self._norms[1], EPS)
        return normed, *self._router.forward(normed)

    def bytes_moved(self) -> int:
        """Weights, and the cache, which is read once."""
        weights = [*self._attention.tensors(), *self._router.tensors()]
        return sum(tensor.numel() * tensor.element_size() for tensor in [*weights, self.cache])


def decoding_batch(rows: int, context: int, block_size: int, device: torch.device) -> AttentionBatch:
    """Requests with so many tokens each, this step's included, in blocks that lie scattered."""
    blocks = -(-context // block_size)
    tables = (
        torch.randperm(rows * blocks, generator=torch.Generator().manual_seed(5)).view(rows, blocks).tolist()
    )
    requests = [
        ScheduledRequest(str(row), context - 1, (0,), tuple(table), samples=True)
        for row, table in enumerate(tables)
    ]
    return AttentionBatch.build(requests, block_size, device)


class FFNStep:
    """One layer's experts of the first of ffn_gpus GPUs, the shared expert among them, for the rows that need any of them.

    The shared expert is one more expert, chosen with weight 1 by the rows whose first choice is held here: so every row's is
    computed on one GPU, and nothing asks the device how many rows those are.
    """

    def __init__(self, shapes: Shapes, random: Random, *, fp8: bool) -> None:
        held = shapes.experts_held
        gate_up = random(held + 1, 2 * shapes.width, shapes.hidden, scale=shapes.hidden**-0.5)
        down = random(held + 1, shapes.hidden, shapes.width, scale=shapes.width**-0.5)
        self.gate_up = BlockScaledWeight.quantize(gate_up) if fp8 else gate_up
        self.down = BlockScaledWeight.quantize(down) if fp8 else down
        scores = torch.rand(shapes.tokens, shapes.num_experts, generator=torch.Generator().manual_seed(9))
        ids = scores.argsort(1)[:, : shapes.top_k].to(torch.int32)
        ids = ids[(ids < held).any(1)]
        weights = random(*ids.shape, dtype=torch.float32).softmax(1)
        # The ids of experts held, with the shared one as the last; -1 for what others compute.
        own = ids < held
        shared = torch.where(own[:, :1], held, -1)
        self.topk_ids = torch.cat((torch.where(own, ids, -1), shared), dim=1).to(torch.int32).to(gate_up.device)
        self.topk_weights = torch.cat((weights, torch.ones_like(weights[:, :1])), dim=1)
        self.x = random(len(ids), shapes.hidden)
        self.answer = torch.empty(len(ids), shapes.hidden, device=self.x.device)

    def forward(self, tiles: tuple[ProductTile, ProductTile] | None = None) -> Tensor:
        chosen = self.topk_ids, self.topk_weights
        return grouped_expert_ffn(self.x, self.gate_up, self.down, *chosen, out=self.answer, tiles=tiles)

    def bytes_moved(self) -> int:
        """Of the weights alone: activations are a hundredth of them."""
        tensors = [
            tensor
            for weight in (self.gate_up, self.down)
            for tensor in (weight.tensors() if isinstance(weight, BlockScaledWeight) else [weight])
        ]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def operations(self) -> int:
        """Of the choices that are computed: 2 per multiply-add, three matrices."""
        choices = int((self.topk_ids >= 0).sum())
        values = self.down.values if isinstance(self.down, BlockScaledWeight) else self.down
        return choices * 2 * 3 * values.shape[1] * values.shape[2]
