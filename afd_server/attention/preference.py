"""Which workers of a shard an attention replica asks, in order: the load spreads over them without a word.

What lives here: that order. What does not: what happens when one of them fails (ffn_group.py).
"""

from __future__ import annotations

from collections.abc import Iterable


def by_preference(workers: Iterable[int], num_shards: int, replica: int) -> list[list[int]]:
    """For each shard the indices of its workers, the one that this replica prefers first. Worker i holds shard i % num_shards."""
    choices: list[list[int]] = [[] for _ in range(num_shards)]
    for index in sorted(workers):
        choices[index % num_shards].append(index)
    return [[*found[turn:], *found[:turn]] for found in choices for turn in (replica % max(1, len(found)),)]
