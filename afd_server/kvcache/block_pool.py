"""The account of KV blocks: which are free, who holds the others, and which token prefix each full one holds.

What lives here: block numbers, reference counts, the prefix cache with its eviction. What does not: the tensors
(storage.py), requests, and when to preempt one (engine/scheduler.py, the only caller).

A block is held by a number of requests (its references) or free. A free block may still hold a known prefix: it stays
findable until it is handed out again, the longest unused one first. The prefix cache is a chain: the key of a block
is a digest of the key before it and of its own token ids, so equal keys mean equal tokens from the very start.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import sha256


class BlockAccountError(Exception):
    """The account does not add up: a bug of this server, found by `BlockPool.check`."""


def extend_keys(keys: list[bytes], token_ids: Sequence[int], block_size: int) -> None:
    """Appends to `keys`, the keys of the first len(keys) blocks of `token_ids`, those of all other full blocks.

    SHA-256, because prompts come from anyone: with a weak hash one could be made that meets another's cached blocks.
    """
    for start in range(len(keys) * block_size, len(token_ids) - block_size + 1, block_size):
        previous = keys[-1] if keys else b""
        keys.append(sha256(previous + array("q", token_ids[start : start + block_size]).tobytes()).digest())


class BlockPool:
    """All blocks of one replica's cache, numbered from 0. Used by one thread."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._references = [0] * num_blocks
        self._key_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        # Free blocks without a known prefix, and those with one from the longest unused to the latest.
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, those with a known prefix included."""
        return len(self._blank) + len(self._cached)

    def find_prefix(self, keys: Sequence[bytes], num_tokens: int) -> list[int]:
        """The blocks that hold the longest known prefix of a request of num_tokens tokens, in order.

        Never all of its tokens: the last one must be computed, since its logits are what the request is after. The
        blocks are only looked up: `take` them before anything else is allocated.
        """
        blocks: list[int] = []
        for key in keys[: (num_tokens - 1) // self.block_size]:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_free_among(self, blocks: Iterable[int]) -> int:
        """How many of these nobody holds: taking them lowers num_free by as many."""
        return sum(self._references[block] == 0 for block in blocks)

    def num_held_once(self, blocks: Iterable[int]) -> int:
        """How many of these, held by one request, would be free without it."""
        return sum(self._references[block] == 1 for block in blocks)

    def take(self, blocks: Iterable[int]) -> None:
        """Adds a reference to each of these blocks, found by `find_prefix`."""
        for block in blocks:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """`count` blocks of unknown content, with one reference each; evicts prefixes when no other are free."""
        assert count <= self.num_free, f"{count} blocks asked of {self.num_free}"
        blocks = []
        for _ in range(count):
            block = self._blank.pop() if self._blank else self._evict()
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def register(self, block: int, key: bytes) -> None:
        """A held block has been filled with the tokens that `key` stands for. The first block of equal content stays."""
        assert self._references[block] > 0
        if self.enable_prefix_caching and key not in self._block_of and self._key_of[block] is None:
            self._key_of[block] = key
            self._block_of[key] = block

    def release(self, blocks: Sequence[int]) -> None:
        """Drops one reference of each of a request's blocks, given in the order of its tokens."""
        # From the end: of a chain, the tail is evicted first, since it is of no use without what comes before it.
        for block in reversed(blocks):
            self._references[block] -= 1
            assert self._references[block] >= 0, f"block {block} was released twice"
            if self._references[block] == 0:
                if self._key_of[block] is None:
                    self._blank.append(block)
                else:
                    self._cached[block] = None

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Raises BlockAccountError unless the account agrees with the blocks that requests say they hold."""
        expected = Counter(block for blocks in held for block in blocks)
        free = [*self._blank, *self._cached]
        for block, count in enumerate(self._references):
            if count != expected[block]:
                raise BlockAccountError(
                    f"block {block} has {count} references, {expected[block]} requests hold it"
                )
        if sorted(free) != [block for block, count in enumerate(self._references) if count == 0]:
            raise BlockAccountError(
                f"{len(free)} of {self.num_blocks} blocks are listed as free, not the unheld ones"
            )
        if {key: block for block, key in enumerate(self._key_of) if key is not None} != self._block_of:
            raise BlockAccountError("the prefix cache names other blocks than those that hold its prefixes")
        if any(self._key_of[block] is not None for block in self._blank):
            raise BlockAccountError("a block with a known prefix is listed as blank")

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        key = self._key_of[block]
        assert key is not None
        del self._block_of[key]
        self._key_of[block] = None
        return block
