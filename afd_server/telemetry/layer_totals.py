"""What a worker's layers took since it was loaded: sums that are always kept, in memory that the kernels' loops add to as well.

What lives here: the sums. What does not: what they tell of stragglers (stragglers.py). Written by the worker's thread; any other may
read them, which may catch one call half noted.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double as DOUBLE
from ctypes import c_long as LONG

from afd_server.types import LayerTotal


class _LayerTotal(ctypes.Structure):
    """kernels/native/hop.h has the same fields."""

    _fields_ = (("seconds", DOUBLE), ("batches", LONG), ("rows", LONG))


class LayerTotals:
    """By layer: seconds of computing, batches that were computed, and their rows."""

    def __init__(self, num_layers: int) -> None:
        self._layers = (_LayerTotal * num_layers)()

    @property
    def address(self) -> int:
        return ctypes.addressof(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def note(self, layer: int, seconds: float, rows: int) -> None:
        total = self._layers[layer]
        total.seconds += seconds
        total.batches += 1
        total.rows += rows

    def read(self) -> tuple[LayerTotal, ...]:
        """By layer."""
        return tuple(LayerTotal(each.seconds, each.batches, each.rows) for each in self._layers)
