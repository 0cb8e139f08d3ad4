"""Which replicas have lately seen which prompt beginnings: a guess at what their prefix caches hold.

What lives here: that memory. What does not: the prefix caches themselves (kvcache/) and the weighing of a cached prefix
against a shorter queue (router.py, the only caller).

Beginnings are remembered at lengths that double, so a prompt costs a few entries, and a conversation that grows
still finds at least half of its common part. Token ids are compared by hash: a collision costs a longer prefill, no more.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

SHORTEST_TOKENS = 32
MAX_ENTRIES = 1 << 15


class PrefixMemory:
    """Prompt beginning -> names of the replicas that have read it. Bounded; the longest unused are forgotten first."""

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        self._max_entries = max_entries
        self._readers: OrderedDict[tuple[int, int], set[str]] = OrderedDict()

    def remember(self, prompt_token_ids: Sequence[int], replica: str) -> None:
        """This replica is going to read this prompt."""
        for key in _keys(prompt_token_ids):
            self._readers.setdefault(key, set()).add(replica)
            self._readers.move_to_end(key)
        while len(self._readers) > self._max_entries:
            self._readers.popitem(last=False)

    def known_tokens(self, prompt_token_ids: Sequence[int]) -> dict[str, int]:
        """How many tokens of the prompt's beginning each replica has read; only those that have read any."""
        return {
            replica: length
            for length, digest in _keys(prompt_token_ids)
            for replica in self._readers.get((length, digest), ())
        }

    def forget(self, replica: str) -> None:
        """It has been restarted: its cache is empty."""
        for readers in self._readers.values():
            readers.discard(replica)


def _keys(token_ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    length = SHORTEST_TOKENS
    while length <= len(token_ids):
        yield length, hash(tuple(token_ids[:length]))
        length *= 2
