"""How soon a TCP connection ends whose other host is gone without a word: switched off, or cut off the network.

A process that dies has its sockets closed by the kernel, and the other end reads an end of file at once. A host that is
gone closes nothing. Therefore both kernels ask over every idle connection: after IDLE_S without a byte, then every
INTERVAL_S; NUM_PROBES questions without a reply end it. A dead host is thus noticed within 20 s, and reads and writes
then fail with an OSError (ETIMEDOUT). Other kinds of death, such as a process that hangs, are not noticed here: its
kernel goes on replying. Called by whoever opens or accepts a TCP connection of this room.
"""

from __future__ import annotations

import socket

IDLE_S = 5
INTERVAL_S = 5
NUM_PROBES = 3
DEAD_AFTER_S = IDLE_S + NUM_PROBES * INTERVAL_S

# By name, for not every platform has them all. TCP_KEEPALIVE is what macOS calls TCP_KEEPIDLE.
_OPTIONS = {
    "TCP_KEEPIDLE": IDLE_S,
    "TCP_KEEPALIVE": IDLE_S,
    "TCP_KEEPINTVL": INTERVAL_S,
    "TCP_KEEPCNT": NUM_PROBES,
}


def notice_dead_host(sock: socket.socket, *, peer_reads_at_once: bool) -> None:
    """Makes this end of a TCP connection notice within DEAD_AFTER_S that the other host is gone. Raises OSError.

    The kernel asks only while nothing of this end's is under way. peer_reads_at_once: bytes that are still not
    acknowledged, or not even taken, after DEAD_AFTER_S mean death as well (TCP_USER_TIMEOUT). That is so where the
    reader has nothing else to do; a worker that computes for longer than this must not be taken for dead, so who
    writes to one needs a deadline of its own.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _OPTIONS.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    if peer_reads_at_once and hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_AFTER_S * 1000)
