"""The attention side of a layer on a CPU in one call: norms, QKV, rotation, cache, attention, output, routing.

What lives here: the layer as the kernel wants it. What does not: the single kernels, which it runs in their order
(rows.py, matmul.py, attention.py) and which are its reference: the results are the same to the bit.

Shapes: T rows, H hidden, N query heads, G key and value heads, D head dimension, E experts, K experts per token.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float as FLOAT
from ctypes import c_long as LONG
from ctypes import c_void_p as POINTER
from dataclasses import dataclass

import torch
from torch import Tensor

from afd_server.kernels.attention import cache_layout
from afd_server.kernels.library import library
from afd_server.kernels.matmul import FORMAT_CODES, PackedMatrix


@dataclass(frozen=True, slots=True)
class Routing:
    """A router that is part of the layer: its matrix [E, H] and how experts are chosen; see rows.route."""

    weight: PackedMatrix
    bias: Tensor | None
    top_k: int
    softmax: bool
    renormalise: bool
    scaling: float
    correction: Tensor | None


@dataclass(frozen=True, slots=True)
class AttentionNumbers:
    """N, G, D, what scores are multiplied with, and the norms' epsilon."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    eps: float


class _Matrix(ctypes.Structure):
    _fields_ = (("packed", POINTER), ("bias", POINTER), ("format", LONG), ("n", LONG))


class _GroupedQueryLayer(ctypes.Structure):
    """native/layer.h has the same fields."""

    _fields_ = (
        *((name, POINTER) for name in ("attention_norm", "ffn_norm", "query_norm", "key_norm")),
        *((name, _Matrix) for name in ("qkv", "output", "router")),
        ("correction", POINTER),
        *((name, LONG) for name in ("hidden", "num_heads", "num_key_heads", "head_dim")),
        *((name, LONG) for name in ("num_experts", "top_k", "softmax", "renormalise")),
        *((name, FLOAT) for name in ("eps", "scale", "routed_scaling")),
    )


class AttentionKernel:
    """One layer. qkv: [(N + 2 G) D, H] and output: [H, N D], each with its bias or None; norms: of the layer's input and of
    the FFN's, [H]; head_norms: of queries and keys, [D], or None. All of them live as long as this does."""

    def __init__(
        self,
        numbers: AttentionNumbers,
        qkv: tuple[PackedMatrix, Tensor | None],
        output: tuple[PackedMatrix, Tensor | None],
        norms: tuple[Tensor, Tensor],
        head_norms: tuple[Tensor, Tensor] | None,
        routing: Routing | None,
        instruction_set: str | None = None,
    ) -> None:
        self._held = numbers, qkv, output, norms, head_norms, routing
        self.top_k = routing.top_k if routing else 0
        self._run = library(instruction_set).afd_attention_side
        query_norm, key_norm = head_norms or (None, None)
        router = None if routing is None else (routing.weight, routing.bias)
        correction = None if routing is None else routing.correction
        self._layer = _GroupedQueryLayer(
            _pointer(norms[0]), _pointer(norms[1]), _pointer(query_norm), _pointer(key_norm),
            _matrix(qkv), _matrix(output), _matrix(router), _pointer(correction),
            qkv[0].k, numbers.num_heads, numbers.num_kv_heads, numbers.head_dim,
            routing.weight.n if routing else 0, self.top_k, bool(routing and routing.softmax),
            bool(routing and routing.renormalise), numbers.eps, numbers.scale, routing.scaling if routing else 1.0,
        )  # fmt: skip
        self.address = ctypes.addressof(self._layer)

    def __call__(
        self, x_TH: Tensor, answer_TH: Tensor | None, *, cos: Tensor, sin: Tensor, interleaved: bool, slots: Tensor,
        row_starts: Tensor, lengths: Tensor, block_tables: Tensor, cache: Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """The layer's call: normed x [T, H], ids [T, K] int32 and weights [T, K] (None without routing).

        x += answer, then x += attention, in place. The rest as in rows.rotate_and_write and attention.paged_attention; all
        contiguous.
        """
        rows = x_TH.shape[0]
        assert x_TH.is_contiguous() and (answer_TH is None or answer_TH.is_contiguous())
        normed_TH = torch.empty_like(x_TH)
        ids_TK = weights_TK = None
        if self.top_k:
            ids_TK, weights_TK = (
                torch.empty(rows, self.top_k, dtype=torch.int32),
                torch.empty(rows, self.top_k),
            )
        self._run(
            self.address, rows, x_TH.data_ptr(), _pointer(answer_TH), normed_TH.data_ptr(), _pointer(ids_TK),
            _pointer(weights_TK), cos.data_ptr(), sin.data_ptr(), interleaved, slots.data_ptr(), len(lengths), row_starts.data_ptr(),
            lengths.data_ptr(), block_tables.data_ptr(), block_tables.shape[1], cache.data_ptr(),
            cache.dtype is torch.bfloat16, cache_layout(tuple(cache.shape), cache.stride()), torch.get_num_threads(),
        )  # fmt: skip
        return normed_TH, ids_TK, weights_TK


def _matrix(given: tuple[PackedMatrix, Tensor | None] | None) -> _Matrix:
    if given is None:
        return _Matrix()
    matrix, bias = given
    return _Matrix(matrix.memory.data_ptr(), _pointer(bias), FORMAT_CODES[matrix.format], matrix.n)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
