"""A CUDA driver whose device memory is this process's own, so that links of GPU workers can be tested where there is no GPU."""

from __future__ import annotations

import ctypes
import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from afd_server.transport import device_memory
from afd_server.transport.wire import Slots

CUDA = torch.device("cuda")
OUT_OF_MEMORY, INVALID_VALUE, NO_PEER_ACCESS = 2, 1, 217
_TEXTS = {OUT_OF_MEMORY: b"out of memory", INVALID_VALUE: b"invalid argument", NO_PEER_ACCESS: b"peer access is not supported"}  # fmt: skip


class FakeDriver:
    """The calls that device_memory.py makes. fails: what a function is to return, by its name."""

    def __init__(self) -> None:
        self.fails: dict[str, int] = {}
        self.pinned: dict[int, int] = {}  # bytes of host memory, by address
        self.largest_bytes = 1 << 40  # no allocation is larger than this, whatever was asked for
        self._allocated: dict[int, Any] = {}
        self._handles: dict[bytes, int] = {}
        self._mapped: Counter[int] = Counter()

    def num_allocated(self) -> int:
        return len(self._allocated)

    def num_mapped(self) -> int:
        return self._mapped.total()

    def holds(self, address: int) -> bool:
        return any(start <= address < start + len(memory) for start, memory in self._allocated.items())

    def cuMemAlloc_v2(self, address: Any, size: ctypes.c_size_t) -> int:
        if not (failure := self.fails.get("cuMemAlloc_v2", 0)):
            memory = (ctypes.c_ubyte * min(size.value, self.largest_bytes))()
            address._obj.value = ctypes.addressof(memory)
            self._allocated[ctypes.addressof(memory)] = memory
        return failure

    def cuMemFree_v2(self, address: ctypes.c_uint64) -> int:
        assert not self._mapped[address.value], "freed under the peer's hands"
        if not (failure := self.fails.get("cuMemFree_v2", 0)):
            del self._allocated[address.value]
        return failure

    def cuIpcGetMemHandle(self, handle: Any, address: ctypes.c_uint64) -> int:
        if not (failure := self.fails.get("cuIpcGetMemHandle", 0)):
            name = secrets.token_bytes(64)
            ctypes.memmove(handle, name, 64)
            self._handles[name] = address.value
        return failure

    def cuIpcOpenMemHandle_v2(self, address: Any, handle: Any, flags: ctypes.c_uint) -> int:
        name = bytes(handle)
        failure = self.fails.get("cuIpcOpenMemHandle_v2", 0 if name in self._handles else INVALID_VALUE)
        if not failure:
            address._obj.value = self._handles[name]
            self._mapped[address._obj.value] += 1
        return failure

    def cuIpcCloseMemHandle(self, address: ctypes.c_uint64) -> int:
        assert self._mapped[address.value]
        self._mapped[address.value] -= 1
        return 0

    def cuMemGetAddressRange_v2(self, start: Any, length: Any, address: ctypes.c_uint64) -> int:
        start._obj.value = address.value
        length._obj.value = len(self._allocated[address.value])
        return self.fails.get("cuMemGetAddressRange_v2", 0)

    def cuMemHostRegister_v2(
        self, address: ctypes.c_uint64, size: ctypes.c_size_t, flags: ctypes.c_uint
    ) -> int:
        if not (failure := self.fails.get("cuMemHostRegister_v2", 0)):
            self.pinned[address.value] = size.value
        return failure

    def cuMemHostUnregister(self, address: ctypes.c_uint64) -> int:
        ctypes.string_at(address.value, self.pinned.pop(address.value))  # it is mapped still, all of it
        return 0

    def cuGetErrorString(self, result: int, text: Any) -> int:
        if result in _TEXTS:
            text._obj.value = _TEXTS[result]
        return 0


@contextmanager
def fake_cuda() -> Iterator[FakeDriver]:
    """Every process and device is this one, while it lasts."""
    driver = FakeDriver()

    @contextmanager
    def on(device: torch.device) -> Iterator[tuple[FakeDriver, torch.device]]:
        assert device.type in ("cuda", "cpu")  # the latter when it lets go of what it made
        yield driver, torch.device("cpu")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_memory, "_on", on)
        patch.setattr(Slots, "on_host", property(lambda slots: not driver.holds(slots._memory.data_ptr())))
        yield driver
        device_memory.free_dropped()
