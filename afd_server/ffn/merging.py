"""Which calls an FFN worker computes together.

What lives here: that choice. What does not: the calls and their arithmetic (worker.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar


class OfLayer(Protocol):
    """An FFN call, as far as this cares."""

    @property
    def layer(self) -> int: ...


class Waits(Protocol):
    """A call that waits to be computed."""

    @property
    def call(self) -> OfLayer: ...


Waiting = TypeVar("Waiting", bound=Waits)


def next_batch(waiting: Sequence[Waiting]) -> tuple[list[Waiting], list[Waiting]]:
    """(the oldest call with all others of its layer, the rest): weights are read once for the whole batch."""
    if len(waiting) == 1:
        return [*waiting], []
    layer = waiting[0].call.layer
    batch = [incoming for incoming in waiting if incoming.call.layer == layer]
    return batch, [incoming for incoming in waiting if incoming.call.layer != layer]
