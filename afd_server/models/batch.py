"""The tensors of one micro-batch: what the attention half needs to know of the requests in it.

What lives here: the translation of ScheduledRequests into positions, cache slots and block tables. What does not: which
requests those are (engine/) and the attention over them (paged_attention.py).

A row is one token of one request; the rows of a request follow one another. Requests with a single row are nearly all in
decoding; those with several have a prompt's chunk.
Shapes: T rows, R requests, D requests of a group, B blocks of the longest of them, N rows for which logits are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
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


@dataclass(frozen=True)
class AttentionBatch:
    """token_ids, positions, slots: [T] int64; a slot is block * block_size + offset, where a row's entry is written.

    Request r has the rows row_starts[r] to row_starts[r + 1] - 1, the last of its lengths[r] tokens, in the blocks
    block_tables[r]: [R + 1], [R], [R, B], all int32 and padded with block 0. logit_rows: [N], the last row of every
    request that samples, then the rows before the tokens of every report, each in the order of the requests.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    row_starts: Tensor
    lengths: Tensor
    block_tables: Tensor
    logit_rows: Tensor
    requests: Sequence[ScheduledRequest]
    block_size: int

    @classmethod
    def build(
        cls, requests: Sequence[ScheduledRequest], block_size: int, device: torch.device
    ) -> AttentionBatch:
        """The micro-batch of these requests, none of them without tokens, in their order."""
        counts = np.array([len(request.token_ids) for request in requests])
        lengths = counts + [request.start_position for request in requests]
        num_blocks = -(-lengths // block_size)
        tables = np.zeros((len(requests), int(num_blocks.max())), np.int32)
        for index, request in enumerate(requests):
            assert counts[index] and num_blocks[index] <= len(request.block_table), request.request_id
            tables[index, : num_blocks[index]] = request.block_table[: num_blocks[index]]
        row_starts = np.concatenate(([0], counts.cumsum()))
        request_of_row = np.repeat(np.arange(len(requests)), counts)
        # Row t is token (t - the request's first row) of those that the request has in this step.
        positions = np.arange(row_starts[-1]) + np.repeat(lengths - row_starts[1:], counts)
        slots = (
            tables[request_of_row, positions // block_size].astype(np.int64) * block_size
            + positions % block_size
        )
        samples = [request.samples for request in requests]
        reported = [
            row_start + request.report.first + np.arange(len(request.report.token_ids))
            for row_start, request in zip(row_starts, requests, strict=False)
            if request.report is not None
        ]

        def tensor(values: np.ndarray, dtype: type) -> Tensor:
            return torch.from_numpy(values.astype(dtype, copy=False)).to(device)

        return cls(
            token_ids=torch.tensor(
                [token_id for request in requests for token_id in request.token_ids], device=device
            ),
            positions=tensor(positions, np.int64),
            slots=tensor(slots, np.int64),
            row_starts=tensor(row_starts, np.int32),
            lengths=tensor(lengths, np.int32),
            block_tables=tensor(tables, np.int32),
            logit_rows=tensor(np.concatenate([row_starts[1:][samples] - 1, *reported]), np.int64),
            requests=requests,
            block_size=block_size,
        )

    def moved_on(self, requests: Sequence[ScheduledRequest]) -> AttentionBatch | None:
        """The batch of these requests where they are this one's, each of its single rows one token on; else None.

        It equals what `build` gives, by a few additions. What most steps do is no reason to go through all blocks again.
        """
        new_blocks = []
        if len(requests) != len(self.requests):
            return None
        for row, (before, now) in enumerate(zip(self.requests, requests, strict=True)):
            index, offset = divmod(now.start_position, self.block_size)
            num_known = index + (offset > 0)
            if (
                now.request_id != before.request_id
                or now.start_position != before.start_position + 1
                or len(now.token_ids) > 1
                or len(before.token_ids) > 1
                or now.samples is not before.samples
                or now.report is not None
                or before.report is not None
                or now.block_table[:num_known] != before.block_table[:num_known]
                or index == self.block_tables.shape[1]
            ):
                return None
            if offset == 0:
                new_blocks.append((row, index, now.block_table[index]))
        slots, block_tables = self.slots + 1, self.block_tables
        if new_blocks:
            block_tables = block_tables.clone()
        for row, index, block in new_blocks:
            slots[row], block_tables[row, index] = block * self.block_size, block
        return replace(
            self,
            token_ids=torch.tensor([request.token_ids[0] for request in requests], device=slots.device),
            positions=self.positions + 1,
            slots=slots,
            lengths=self.lengths + 1,
            block_tables=block_tables,
            requests=requests,
        )

    # What attention in plain torch works on: the requests with one row in groups, the others one by one.

    @cached_property
    def singles(self) -> tuple[SingleRows, ...]:
        """Every request with one row is in one of the groups."""
        device, row, singles = self.token_ids.device, 0, []
        for request in self.requests:
            if len(request.token_ids) == 1:
                singles.append((row, request))
            row += len(request.token_ids)
        groups = _groups(singles, self.block_size, MAX_GROUP_TOKENS[device.type])
        return tuple(_single_rows(group, self.block_size, device) for group in groups)

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """Every request with several rows."""
        device, row, chunks = self.token_ids.device, 0, []
        for request in self.requests:
            start, row = row, row + len(request.token_ids)
            if row - start > 1:
                length = request.start_position + row - start
                blocks = request.block_table[: -(-length // self.block_size)]
                chunks.append(Chunk(start, row, length, torch.tensor(blocks, device=device)))
        return tuple(chunks)


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
