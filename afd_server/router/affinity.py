"""Where a prompt's beginning was served before, so that it meets its cached blocks again.

What lives here: the memory of prefixes. What does not: whether the replica is free enough to take it (router.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

# Prefixes are remembered at multiples of this many tokens: shorter ones are quickly computed anew.
CHUNK_TOKENS = 64
# Beyond this depth a longer match decides nothing any more, and remembering it would cost time and memory.
MAX_CHUNKS = 64
MAX_PREFIXES = 16_384


class PrefixMemory:
    """The replica that last served each prefix; the least recently used prefixes are forgotten.

    Two prefixes of equal hash would share an entry. That costs a cache miss, nothing else.
    """

    def __init__(self) -> None:
        self._replica_of: OrderedDict[int, str] = OrderedDict()

    def find(self, token_ids: Sequence[int]) -> str | None:
        """The replica that served the longest known prefix of these tokens."""
        for key in reversed(_prefix_keys(token_ids)):
            if key in self._replica_of:
                self._replica_of.move_to_end(key)
                return self._replica_of[key]
        return None

    def note(self, token_ids: Sequence[int], replica: str) -> None:
        """This replica serves these tokens now."""
        for key in _prefix_keys(token_ids):
            self._replica_of[key] = replica
            self._replica_of.move_to_end(key)
        while len(self._replica_of) > MAX_PREFIXES:
            self._replica_of.popitem(last=False)


def _prefix_keys(token_ids: Sequence[int]) -> list[int]:
    """One key per whole chunk, each of all tokens up to its end; the shortest prefix first."""
    keys: list[int] = []
    key = 0
    for start in range(0, min(len(token_ids) // CHUNK_TOKENS, MAX_CHUNKS) * CHUNK_TOKENS, CHUNK_TOKENS):
        key = hash((key, *token_ids[start : start + CHUNK_TOKENS]))
        keys.append(key)
    return keys
