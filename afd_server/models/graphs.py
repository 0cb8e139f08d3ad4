"""CUDA graphs: a series of launches that is recorded once and from then on is one launch.

What lives here: the recording, and which sizes are recorded. What does not: what is recorded (attention_graphs.py,
ffn_graphs.py). A recorded function works on tensors that stay where they are, depends on shapes alone and asks the device for
nothing. Its sizes are powers of two, and what is smaller is filled up: so there are few graphs, and their number has a bound.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)

# Calls with more rows keep the device busy for longer than Python takes to launch them.
MAX_ROWS = 256

# After so many graphs their memory is said. Most of what the first takes is the pool that all share.
LOGGED_AT = (1, 100, 1000)

# Takes a function that has run once with tensors of the same shapes, and gives one that does the same.
Capture = Callable[[Callable[[], None]], Callable[[], None]]

# While one thread records, no other may start to: what the device is asked for to do so would disturb the first.
_recording = threading.Lock()


def filled_up(rows: int) -> int:
    """The number of rows of the graph for so many: the next power of two."""
    return 1 << (rows - 1).bit_length()


class CUDACapture:
    """The Capture of a CUDA device, for one thread at a time.

    All graphs share a pool of memory: what one leaves in it the next overwrites, so that they take as much as the largest. A
    graph's results therefore lie outside.
    """

    def __init__(self, device: torch.device, name: str) -> None:
        """name: whose graphs they are, for the log."""
        self._device, self._name = device, name
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self.num_graphs = self.num_bytes = 0
        self._given_up = False

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """The graph's replay; the function itself where it cannot be recorded, which is said once."""
        if self._given_up:
            return function
        free_bytes = torch.cuda.mem_get_info(self._device)[0]
        try:
            graph = self._record(function)
        except RuntimeError as error:  # out of memory, or something in the function that no graph can hold
            self._given_up = True
            logger.warning(
                "%s: no more CUDA graphs after %d of them, steps take longer: %s",
                self._name, self.num_graphs, error,
            )  # fmt: skip
            return function
        self.num_graphs += 1
        self.num_bytes += max(0, free_bytes - torch.cuda.mem_get_info(self._device)[0])
        if self.num_graphs in LOGGED_AT:
            logger.info("%s: %d CUDA graphs take %.1f MB", self._name, self.num_graphs, self.num_bytes / 1e6)
        return graph.replay

    def _record(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with _recording, torch.cuda.stream(self._stream):
            # Other threads of this process may go on to use the device.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                function()
            finally:
                graph.capture_end()
        return graph


class Captured:
    """A function that runs as it is the first time, which compiles what there is to compile, and as a graph from then on."""

    def __init__(self, function: Callable[[], None], capture: Capture) -> None:
        self._function, self._capture = function, capture
        self._replay: Callable[[], None] | None = None

    def __call__(self) -> None:
        if self._replay is not None:
            self._replay()
            return
        self._function()
        self._replay = self._capture(self._function)
