"""The tensors of one micro-batch: what the attention half needs to know of the requests in it.

What lives here: the translation of ScheduledRequests into positions, cache slots and block tables. What does not: which
requests those are (engine/) and the attention over them (paged_attention.py).

A row is one token of one request; the rows of a request follow one another. Requests with a single row, which are
nearly all in decoding, are attended together, in one group or a few; those with several (prompt chunks) one by one.
Shapes: T rows, D requests of a group, B blocks of the longest of them, N requests that sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afd_server.types import ScheduledRequest

# A group's cache entries are copied side by side, each request's padded to the longest one's. The copy is made layer by
# layer and outside the cache's account, so it has a bound, by device: this many tokens, or one request's where that has
# more. With entries of 1 to 8 KiB those are at most 32 MiB on a CPU, as the C library takes memory beyond that from the
# system for each copy, every page to be cleared first: 64 requests of 4000 tokens took three times as long in groups of
# 64 Ki tokens as in these. A GPU needs larger groups to be busy.
MAX_GROUP_TOKENS = {"cpu": 2**12, "cuda": 2**16}


@dataclass(frozen=True, slots=True)
class SingleRows:
    """A group of requests with one row each. rows: theirs, ascending, [D]. block_tables: [D, B], padded with block 0.

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

    singles: every request with one row is in one of the groups. sampled_rows: [N], the last row of every request that
    samples, in the order of the requests.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    singles: tuple[SingleRows, ...]
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
            singles=tuple(
                _single_rows(group, block_size, device)
                for group in _groups(singles, block_size, MAX_GROUP_TOKENS[device.type])
            ),
            chunks=tuple(chunks),
            sampled_rows=tensor(sampled_rows),
        )


def _groups(
    singles: Sequence[tuple[int, ScheduledRequest]], block_size: int, max_tokens: int
) -> list[list[tuple[int, ScheduledRequest]]]:
    """Requests of similar lengths together, so that a long one does not make all the others as expensive as itself.

    From the longest request down, a group takes the next one unless more than a third of it were padding then. The
    longest of the next group has less than two thirds of its blocks (else its average could not have fallen so far), so
    there are few groups, and one where lengths are alike. max_tokens, with padding, cuts groups as well.
    """
    groups: list[list[tuple[int, ScheduledRequest]]] = []
    longest = own = 0
    for row, request in sorted(singles, key=lambda single: -single[1].start_position):
        num_blocks = -(-(request.start_position + 1) // block_size)
        padded = (len(groups[-1]) + 1) * longest if groups else 0
        if not groups or 2 * padded > 3 * (own + num_blocks) or padded * block_size > max_tokens:
            groups.append([])
            longest, own = num_blocks, 0
        groups[-1].append((row, request))
        own += num_blocks
    return [sorted(group, key=lambda single: single[0]) for group in groups]


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
