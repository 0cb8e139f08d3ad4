"""The tensors of one micro-batch: what the attention half needs to know of the requests in it.

What lives here: the translation of ScheduledRequests into positions, cache slots and block tables. What does not: which
requests those are (engine/) and the attention over them (paged_attention.py).

A row is one token of one request; the rows of a request follow one another. Requests with a single row, which are
nearly all in decoding, are attended together; those with several (prompt chunks) one by one.
Shapes: T rows, D single-row requests, B blocks of the longest of them, N requests that sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afd_server.types import ScheduledRequest


@dataclass(frozen=True, slots=True)
class SingleRows:
    """All requests with one row. rows: their rows, [D]. block_tables: [D, B], padded with block 0.

    visible: [D, B * block_size], which of those entries a row attends to: its request's tokens up to its own.
    """

    rows: Tensor
    block_tables: Tensor
    visible: Tensor


@dataclass(frozen=True, slots=True)
class Chunk:
    """One request with several rows, start to stop. length: tokens in the cache once they are written.

    block_table: the blocks that hold those tokens.
    """

    start: int
    stop: int
    length: int
    block_table: Tensor


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """token_ids, positions, slots: [T] int64; a slot is block * block_size + offset, where a row's entry is written.

    sampled_rows: [N], the last row of every request that samples, in the order of the requests.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    single: SingleRows | None
    chunks: tuple[Chunk, ...]
    sampled_rows: Tensor

    @classmethod
    def build(
        cls, requests: Sequence[ScheduledRequest], block_size: int, device: torch.device
    ) -> AttentionBatch:
        """The micro-batch of these requests, none of them without tokens, in their order."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        singles: list[tuple[int, ScheduledRequest]] = []
        chunks: list[Chunk] = []
        sampled_rows: list[int] = []
        for request in requests:
            start, count = len(token_ids), len(request.token_ids)
            length = request.start_position + count
            assert count and length <= len(request.block_table) * block_size, request.request_id
            token_ids += request.token_ids
            for position in range(request.start_position, length):
                positions.append(position)
                slots.append(request.block_table[position // block_size] * block_size + position % block_size)
            if count == 1:
                singles.append((start, request))
            else:
                blocks = torch.tensor(request.block_table[: -(-length // block_size)], device=device)
                chunks.append(Chunk(start, start + count, length, blocks))
            if request.samples:
                sampled_rows.append(start + count - 1)

        def tensor(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        return cls(
            token_ids=tensor(token_ids),
            positions=tensor(positions),
            slots=tensor(slots),
            single=_single_rows(singles, block_size, device) if singles else None,
            chunks=tuple(chunks),
            sampled_rows=tensor(sampled_rows),
        )


def _single_rows(
    singles: Sequence[tuple[int, ScheduledRequest]], block_size: int, device: torch.device
) -> SingleRows:
    lengths = [request.start_position + 1 for _, request in singles]
    num_blocks = -(-max(lengths) // block_size)
    tables = [
        (*request.block_table[:num_blocks], *[0] * (num_blocks - len(request.block_table)))
        for _, request in singles
    ]
    entries = torch.arange(num_blocks * block_size, device=device)
    return SingleRows(
        rows=torch.tensor([row for row, _ in singles], device=device),
        block_tables=torch.tensor(tables, device=device),
        visible=entries < torch.tensor(lengths, device=device)[:, None],
    )
