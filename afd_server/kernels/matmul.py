"""Weight matrices packed for the CPU kernels, and products with them.

What lives here: the packed matrix, in float32, bfloat16 or int8. What does not: which matrices a model has (models/).
Reference: torch.nn.functional.linear; for int8, the same on rounded values (tests/unit/kernels). Activations are float32.

Shapes: T rows, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from afd_server.kernels.library import library
from afd_server.kernels.memory import allocate

Format = Literal["float32", "bfloat16", "int8"]
FORMAT_CODES: dict[str, int] = {"float32": 0, "bfloat16": 1, "int8": 2}


@dataclass(frozen=True, slots=True, eq=False)
class PackedMatrix:
    """One or more weight matrices [N, K] of equal shape, packed one after the other. memory: uint8.

    interleaved: the first half of the N rows and the second stand side by side, as the expert kernel wants gate and up.
    """

    memory: Tensor
    format: Format
    n: int
    k: int
    interleaved: bool = False

    @classmethod
    def pack(
        cls,
        matrices: Sequence[Tensor],
        format: Format,
        instruction_set: str | None = None,
        *,
        interleaved: bool = False,
    ) -> PackedMatrix:
        """matrices: [N, K] each, of any float type, on the CPU; they are not needed afterwards."""
        kernels, code = library(instruction_set), FORMAT_CODES[format]
        n, k = matrices[0].shape
        assert all(matrix.shape == (n, k) for matrix in matrices) and not (interleaved and n % 2)
        size = kernels.afd_packed_bytes(code, n, k, interleaved)
        memory = allocate(size * len(matrices))
        for index, matrix in enumerate(matrices):
            source = matrix.detach().to(torch.float32).contiguous()
            kernels.afd_pack(code, source.data_ptr(), n, k, interleaved, memory.data_ptr() + index * size)
        return cls(memory, format, n, k, interleaved)


def linear(
    x_TK: Tensor, weight: PackedMatrix, bias: Tensor | None = None, instruction_set: str | None = None
) -> Tensor:
    """[T, N] float32: x W^T + bias. x: float32, its rows contiguous, maybe a part of wider ones. bias: [N] float32."""
    assert (
        x_TK.dtype is torch.float32
        and x_TK.stride(1) == 1
        and x_TK.shape[1] == weight.k
        and not weight.interleaved
    )
    rows = x_TK.shape[0]
    y_TN = torch.empty(rows, weight.n)
    if rows:
        library(instruction_set).afd_linear(
            FORMAT_CODES[weight.format], x_TK.data_ptr(), x_TK.stride(0), rows, weight.k, weight.memory.data_ptr(),
            None if bias is None else bias.data_ptr(), weight.n, y_TN.data_ptr(), weight.n, torch.get_num_threads(),
        )  # fmt: skip
    return y_TN


def packed_rows(ids_T: Tensor, weight: PackedMatrix, instruction_set: str | None = None) -> Tensor:
    """[T, K] float32: rows of a packed matrix, unpacked. ids: int64. For an embedding that is the LM head as well."""
    assert weight.format != "int8" and not weight.interleaved
    rows_TK = torch.empty(len(ids_T), weight.k)
    library(instruction_set).afd_rows_of_packed(
        weight.format == "bfloat16",
        weight.memory.data_ptr(),
        ids_T.data_ptr(),
        len(ids_T),
        weight.k,
        rows_TK.data_ptr(),
        torch.get_num_threads(),
    )
    return rows_TK
