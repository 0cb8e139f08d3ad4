"""What is noted of the calls that an FFN worker computes: sums by layer and expert, always, and the last calls one by one.

What lives here: the memory, which the loop in C++ (native/hop.h) writes to as well, and counting for calls that do not pass through it.
What does not: what is told of it (telemetry/), and to whom (ffn/worker.py).
"""

from __future__ import annotations

import ctypes
from ctypes import c_double as DOUBLE

import numpy as np
import torch
from torch import Tensor

from afd_server.telemetry.layer_totals import LayerTotals

# Calls that a loop may serve before its notes are read: more than it can in the time that it is given at once.
MAX_NOTES = 4096
# Of a layer's calls on a GPU, every so manieth is counted: launching that costs microseconds.
COUNTED_ON_GPU = 16


class CallNote(ctypes.Structure):
    """A call that a loop has served, monotonic seconds. native/hop.h has the same fields."""

    _fields_ = (
        ("began", DOUBLE), ("ended", DOUBLE), ("step", ctypes.c_uint64),
        *((name, ctypes.c_uint32) for name in ("replica", "layer", "micro_batch", "rows")),
    )  # fmt: skip


class CallAccount:
    """Of one FFN worker, since it was loaded. Written by the worker's thread; `tokens` may be called by any.

    held: the experts that the worker has of a layer. expert_tokens: [layers, experts held + 2], int64: how often each was chosen; first
    and last those that others hold. notes: the first num_notes are of the calls since the loop was last entered.
    """

    def __init__(self, num_layers: int, held: range = range(0)) -> None:
        self.held = held
        self.totals = LayerTotals(num_layers)
        self.expert_tokens = np.zeros((num_layers, len(held) + 2), dtype=np.int64)
        self.notes = (CallNote * MAX_NOTES)()
        self.num_notes = 0
        self._on_device: Tensor | None = None  # as expert_tokens
        self._seen = [0] * num_layers
        self._noted: list[tuple[int, np.ndarray]] = []

    def note(self, layer: int, topk_ids: Tensor) -> None:
        """These experts were chosen, [T, K], which may be overwritten from now on. `count` does the rest."""
        if not self.held:
            return
        if not topk_ids.is_cuda:
            self._noted.append((layer, topk_ids.numpy().ravel() - (self.held.start - 1)))
            return
        self._seen[layer] += 1
        if self._seen[layer] % COUNTED_ON_GPU == 0:
            self._count_on_device(layer, topk_ids)

    def count(self) -> None:
        """Adds what has been noted; the experts of other workers are passed over. To be called when nobody waits for an answer."""
        num_held = len(self.held)
        for layer, places in self._noted:
            np.maximum(places, 0, out=places)  # before anything is sized by them
            np.minimum(places, num_held + 1, out=places)
            self.expert_tokens[layer] += np.bincount(places, minlength=num_held + 2)
        self._noted.clear()

    def tokens(self) -> np.ndarray:
        """[layers, experts held], with what was counted on a GPU; there it waits for the device."""
        tokens = self.expert_tokens
        if self._on_device is not None:
            tokens = tokens + COUNTED_ON_GPU * self._on_device.cpu().numpy()
        return tokens[:, 1:-1].copy()

    def _count_on_device(self, layer: int, topk_ids: Tensor) -> None:
        """Nothing here waits for the device."""
        if self._on_device is None:
            shape = self.expert_tokens.shape
            self._on_device = torch.zeros(shape, dtype=torch.int64, device=topk_ids.device)
        places = (topk_ids.flatten() - (self.held.start - 1)).clamp(0, len(self.held) + 1).to(torch.int64)
        self._on_device[layer].scatter_add_(0, places, torch.ones_like(places))
