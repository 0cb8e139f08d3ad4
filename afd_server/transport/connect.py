"""Opening a link: which way the activations go, and the client's side of connecting.

Called by attention workers. What does not live here: the local executor's path (inproc.py), which needs no address.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time

import torch
from torch import Tensor

from afd_server.errors import ConfigError, WorkerDiedError, WorkerTimeoutError
from afd_server.transport.base import Endpoint, Link, LinkShape
from afd_server.transport.device_memory import (
    DeviceMemoryError,
    keep_until_dropped,
    pin_host_memory,
    share_device_memory,
)
from afd_server.transport.handshake import new_hello, shake_hands
from afd_server.transport.keepalive import notice_dead_host
from afd_server.transport.link import SocketLink
from afd_server.transport.wire import HOST, SlotLayout, Slots

logger = logging.getLogger(__name__)


def choose_transport(setting: str, own_node: str, endpoint: Endpoint) -> str:
    """The path to a worker of another process. `setting` is --transport; own_node this process's node id.

    auto takes shared memory where both are on one Linux node, else TCP. Raises ConfigError when the setting cannot be.
    """
    memory_shared = sys.platform == "linux" and endpoint.unix_name is not None and endpoint.node == own_node
    if setting == "tcp" or (setting == "auto" and not memory_shared):
        return "tcp"
    if setting not in ("auto", "shm"):
        raise ConfigError("--transport", f"{setting} does not reach {endpoint.worker} in another process",
                          "use auto, shm or tcp")  # fmt: skip
    if not memory_shared:
        raise ConfigError("--transport", f"shm: {endpoint.worker} is not on this Linux node", "use auto or tcp")
    return "shm"


def connect(
    endpoint: Endpoint,
    shape: LinkShape,
    replica: int,
    secret: bytes,
    transport: str,
    timeout_s: float,
    device: torch.device = HOST,
) -> Link:
    """A link of attention replica `replica` to the FFN worker at `endpoint`. transport: "shm" or "tcp".

    device: where the caller's activations are. With shm those of a GPU stay in its memory where both sides can reach it; where
    they cannot, the log says why, and they go through host memory.
    Raises WorkerDiedError when nobody listens there, WorkerTimeoutError when the link does not stand in time, and
    ProtocolError when the other end has another secret or speaks another protocol.
    """
    assert transport in ("shm", "tcp"), transport
    deadline = time.monotonic() + timeout_s
    sock = dial(endpoint, timeout_s, unix=transport == "shm")
    try:
        if transport == "tcp":
            if device.type == "cuda":
                _through_host_memory(endpoint.worker, "the transport is TCP")
            shake_hands(sock, endpoint.worker, secret, new_hello("tcp", replica, shape), [], deadline)
            return SocketLink(endpoint.worker, sock, Slots(shape), replica, payload_on_socket=True)
        slots = _agree_on_slots(sock, endpoint.worker, secret, shape, replica, device, deadline)
        return SocketLink(endpoint.worker, sock, slots, replica, payload_on_socket=False)
    except BaseException:
        sock.close()
        raise


def dial(endpoint: Endpoint, timeout_s: float, *, unix: bool) -> socket.socket:
    """A connected socket. Raises WorkerDiedError or WorkerTimeoutError."""
    try:
        if unix:
            assert endpoint.unix_name is not None, "the endpoint has no unix socket"
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.settimeout(timeout_s)
                sock.connect("\0" + endpoint.unix_name)
            except BaseException:
                sock.close()
                raise
            return sock
        assert endpoint.port is not None, "the endpoint has no TCP port"
        sock = socket.create_connection((endpoint.host, endpoint.port), timeout=timeout_s)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # The FFN worker reads nothing while it computes. Every call has its deadline in `receive` instead.
            notice_dead_host(sock, peer_reads_at_once=False)
        except BaseException:
            sock.close()
            raise
        return sock
    except TimeoutError:
        raise WorkerTimeoutError(endpoint.worker, f"no connection within {timeout_s:g} s") from None
    except OSError as error:
        raise WorkerDiedError(endpoint.worker, f"cannot be reached: {error}") from None


def _agree_on_slots(
    sock: socket.socket,
    worker: str,
    secret: bytes,
    shape: LinkShape,
    replica: int,
    device: torch.device,
    deadline: float,
) -> Slots:
    """Shakes hands over a unix socket. The slots lie in memory of the device if the worker can map it, else in the host's."""
    memory, handle = _device_memory(worker, shape, device)
    host_memory, descriptor = _host_memory(shape)
    try:
        hello = new_hello("shm", replica, shape, handle)
        reply = shake_hands(sock, worker, secret, hello, [descriptor], deadline)
    except BaseException:
        if memory is not None:
            keep_until_dropped(sock, memory)
            del memory  # which the traceback would hold for as long as somebody has the error
        raise
    finally:
        os.close(descriptor)
    if memory is not None and not reply.device_refusal:
        logger.info("%s: activations stay in the memory of %s", worker, memory.device)
        return Slots(shape, memory)
    if memory is not None:
        _through_host_memory(worker, reply.device_refusal)
    if device.type == "cuda":
        pin_host_memory(host_memory, device)
    return Slots(shape, host_memory)


def _device_memory(worker: str, shape: LinkShape, device: torch.device) -> tuple[Tensor | None, bytes]:
    """Memory of the device to offer to the worker, and its handle. None where the device is the CPU, or shares none."""
    if device.type != "cuda":
        return None, b""
    try:
        return share_device_memory(SlotLayout(shape).total_bytes, device)
    except DeviceMemoryError as error:
        _through_host_memory(worker, str(error))
        return None, b""


def _through_host_memory(worker: str, reason: str) -> None:
    logger.info("%s: activations go through host memory: %s", worker, reason)


def _host_memory(shape: LinkShape) -> tuple[Tensor, int]:
    """New shared memory for the link, and its descriptor to pass on."""
    from afd_server.transport.shared_memory import create_shared_memory, map_shared_memory

    size_bytes = SlotLayout(shape).total_bytes
    descriptor = create_shared_memory(size_bytes)
    try:
        with torch.inference_mode(False):  # see Slots
            return map_shared_memory(descriptor, size_bytes), descriptor
    except BaseException:
        os.close(descriptor)
        raise
