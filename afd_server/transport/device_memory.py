"""Memory of a GPU that two processes of one host share: the attention side allocates it, the FFN side maps it (CUDA IPC).

What lives here: allocating it with a handle for the other process, mapping by handle, and letting go; and pinning a host's
memory, for links that cannot have it. What does not: who offers it and what follows when it cannot be had (connect.py,
server_side.py), and what lies in it (wire.py).

The calls are the CUDA driver's own. Torch has a pair for its own use, which shares blocks of its caching allocator: those go to
the next tensor while a peer that is late still writes into them; it counts receivers in a file, where one that died is
counted forever; and it believes sizes and offsets that come from the peer. Here every link has an allocation of its own, and the
driver says how large what was mapped is.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import socket
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from afd_server.transport.handshake import DEVICE_HANDLE_BYTES

logger = logging.getLogger(__name__)

# The driver shares whole granules: a smaller allocation would take what lies beside it along.
_GRANULE_BYTES = 2 << 20
# Pinning takes all pages at once, where a link otherwise takes those that its calls reach.
_MAX_PINNED_BYTES = 256 << 20
# Closed links whose peers have not noticed; a peer that hangs and is dialled over and over shall not take the whole GPU.
_MAX_KEPT = 4
_ENABLE_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS, for another GPU's memory


class DeviceMemoryError(Exception):
    """This memory cannot be shared between these two processes, for the reason given; activations go another way."""


class _Handle(ctypes.Structure):
    """CUipcMemHandle, which the driver takes by value."""

    _fields_ = (("bytes", ctypes.c_ubyte * DEVICE_HANDLE_BYTES),)


def share_device_memory(size_bytes: int, device: torch.device) -> tuple[Tensor, bytes]:
    """uint8 [size_bytes] on the device, and the handle by which another process of this host maps it.

    It is freed when the last view of it is gone; see keep_until_dropped. Raises DeviceMemoryError.
    """
    free_dropped()
    if len(_kept) >= _MAX_KEPT:
        raise DeviceMemoryError(f"{len(_kept)} closed links still hold device memory")
    with _on(device) as (driver, device):
        address, handle = ctypes.c_uint64(), _Handle()
        allocated_bytes = -(-size_bytes // _GRANULE_BYTES) * _GRANULE_BYTES
        _check(driver, driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(allocated_bytes)),
               f"{size_bytes} bytes of device memory")  # fmt: skip
        memory = _tensor_at(address.value, size_bytes, device, driver.cuMemFree_v2)
        _check(driver, driver.cuIpcGetMemHandle(ctypes.byref(handle), address), "a handle of device memory")
        return memory, bytes(handle)


def map_device_memory(handle: bytes, size_bytes: int, device: torch.device) -> Tensor:
    """uint8 [size_bytes] over the other process's memory, for work on `device`; unmapped when the last view of it is gone.

    Raises DeviceMemoryError when it cannot be mapped here, ValueError when it is too small.
    """
    with _on(device) as (driver, device):
        address, start, length = ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_size_t()
        opened = driver.cuIpcOpenMemHandle_v2(
            ctypes.byref(address), _Handle.from_buffer_copy(handle), ctypes.c_uint(_ENABLE_PEER_ACCESS)
        )
        _check(driver, opened, "mapping the caller's device memory")
        memory = _tensor_at(address.value, size_bytes, device, driver.cuIpcCloseMemHandle)
        found = driver.cuMemGetAddressRange_v2(ctypes.byref(start), ctypes.byref(length), address)
        _check(driver, found, "the size of the caller's device memory")
        usable_bytes = start.value + length.value - address.value
        if usable_bytes < size_bytes:
            raise ValueError(f"the device memory has {usable_bytes} bytes, the link needs {size_bytes}")
        return memory


def pin_host_memory(memory: Tensor, device: torch.device) -> None:
    """Lets a GPU copy straight into and out of the mapped host memory of a link, until that is unmapped.

    Where it cannot be, which the log says, the driver copies everything once more on its way.
    """
    try:
        if len(memory) > _MAX_PINNED_BYTES:
            raise DeviceMemoryError(f"{len(memory)} bytes are more than {_MAX_PINNED_BYTES}")
        with _on(device) as (driver, device):
            address, size = ctypes.c_uint64(memory.data_ptr()), ctypes.c_size_t(len(memory))
            pinned = driver.cuMemHostRegister_v2(address, size, ctypes.c_uint(0))
            _check(driver, pinned, f"{len(memory)} bytes of host memory")
            _when_unused(memory.untyped_storage(), driver.cuMemHostUnregister, address.value, device)
    except DeviceMemoryError as error:
        logger.info("host memory of a link is not pinned: %s", error)


# --- the end of shared memory ------------------------------------------------------------------------------------------

# Memory of links that this side has closed and the other, as far as is known, has not.
_kept: dict[socket.socket, object] = {}


def keep_until_dropped(sock: socket.socket, memory: object) -> None:
    """Takes the connection over from a link and ends this side of it; keeps what holds its memory until the other has ended too.

    The peer may be at a call this moment, and what becomes of memory that is freed while another process has it mapped
    is undefined. A peer that died has ended its side.
    """
    with contextlib.suppress(OSError):  # it has ended already
        sock.shutdown(socket.SHUT_WR)
    sock.setblocking(False)
    _kept[socket.socket(fileno=sock.detach())] = memory
    free_dropped()


def free_dropped() -> None:
    """Lets go of the memory of all links that have ended on both sides."""
    for sock in [*_kept]:
        if _has_ended(sock):
            _kept.pop(sock, None)
            sock.close()


def _has_ended(sock: socket.socket) -> bool:
    """Whether the peer has closed the connection; what it still sent goes nowhere."""
    try:
        while sock.recv(1 << 16):
            pass
    except (BlockingIOError, InterruptedError):
        return False
    except OSError:
        pass
    return True


# --- the driver --------------------------------------------------------------------------------------------------------


@cache
def _load_driver() -> Any:
    """The CUDA driver's library. Raises OSError where there is none."""
    return ctypes.CDLL("libcuda.so.1")


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[tuple[Any, torch.device]]:
    """The driver, and the device with its index, while it is this thread's current one. Raises DeviceMemoryError."""
    if not torch.cuda.is_available():
        raise DeviceMemoryError("there is no CUDA device")
    try:
        driver = _load_driver()
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # makes the context that torch uses this thread's own
            yield driver, torch.device("cuda", torch.cuda.current_device())
    except (OSError, RuntimeError) as error:
        raise DeviceMemoryError(str(error).partition("\n")[0]) from None


def _tensor_at(
    address: int, size_bytes: int, device: torch.device, let_go: Callable[[ctypes.c_uint64], int]
) -> Tensor:
    """uint8 [size_bytes] at an address. let_go: called with it once no tensor uses it any more."""
    storage = torch._C._construct_storage_from_data_pointer(address, device, size_bytes)
    _when_unused(storage, let_go, address, device)
    with torch.inference_mode(False):  # see Slots
        return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def _when_unused(
    storage: object,
    let_go: Callable[[ctypes.c_uint64], int],
    address: int,
    device: torch.device,
) -> None:
    # Torch keeps a storage's Python object for as long as any tensor, also a view, uses the storage, and then ends the object
    # before it lets go of the bytes. At the end of the process the driver lets go by itself.
    weakref.finalize(storage, _let_go, let_go, address, device).atexit = False


def _let_go(let_go: Callable[[ctypes.c_uint64], int], address: int, device: torch.device) -> None:
    try:
        with _on(device) as (driver, _):  # which waits for what the device still does with it
            _check(driver, let_go(ctypes.c_uint64(address)), "letting go of device memory")
    except DeviceMemoryError as error:  # a device that has failed frees nothing before its process ends
        logger.warning("memory of a link stays until this process ends: %s", error)


def _check(driver: Any, result: int, what: str) -> None:
    """Raises DeviceMemoryError unless the driver's call succeeded."""
    if result == 0:
        return
    text = ctypes.c_char_p()
    driver.cuGetErrorString(result, ctypes.byref(text))
    raise DeviceMemoryError(f"{what}: {(text.value or b'error %d' % result).decode()}")
