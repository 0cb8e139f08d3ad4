"""The FFN side of all links over sockets, shm and tcp, in one epoll loop on the FFN worker's own thread.

Nothing here blocks but the one wait for events: bytes are read and written as far as they come, so a slow, frozen or
hostile peer costs the others nothing. What goes wrong on a connection ends that connection and is logged, no more.
What does not live here: serving calls (ffn/), encoding (wire.py).
"""

from __future__ import annotations

import logging
import secrets
import select
import socket
import sys
import time
from collections.abc import Sequence

import torch

from afd_server.kernels.call_account import CallAccount
from afd_server.kernels.hop import CallLoop, KernelFFN
from afd_server.transport.base import NUM_SLOTS, CallTag, Endpoint, IncomingCall, Listener
from afd_server.transport.frames import FrameError, Header, Kind
from afd_server.transport.handshake import HANDSHAKE_TIMEOUT_S, MAX_CANDIDATES, HandshakeError, Hello
from afd_server.transport.keepalive import notice_dead_host
from afd_server.transport.server_side import Candidate, ServedCall, ServedLink
from afd_server.transport.wire import HOST

logger = logging.getLogger(__name__)

_BACKLOG = 128
# How long nothing is accepted after no connection could be: the process has no descriptors left, say.
_ACCEPT_PAUSE_S = 0.5
# What all frames of a link in float32 begin with.
_SAMPLE_FRAME = Header(Kind.CALL, CallTag(0, 0, 0, 0), 0, 1, False, "float32", 0).pack()


class SocketListener(Listener):
    """Listens on a unix socket (Linux only: its links share memory) and on TCP; `endpoint` says where.

    worker, node: who listens, on which machine, as `endpoint` passes them on. host: address to bind TCP to. device: what the
    worker computes on.
    """

    def __init__(
        self,
        worker: str,
        node: str,
        secret: bytes,
        *,
        host: str = "127.0.0.1",
        unix: bool = True,
        tcp: bool = True,
        device: torch.device = HOST,
    ) -> None:
        self._secret = secret
        self._device = device
        self._epoll = select.epoll()
        self._watched: dict[int, socket.socket] = {}  # by descriptor
        self._doors: list[socket.socket] = []
        self._closed_until: dict[socket.socket, float] = {}  # doors that pause; monotonic seconds
        self._candidates: dict[socket.socket, Candidate] = {}  # in order of arrival
        self._links: dict[socket.socket, ServedLink] = {}
        self._closed = False
        self._loop: CallLoop | None = None
        self._loop_links: list[ServedLink] = []  # those that the loop knows
        unix_name = port = None
        if unix and sys.platform == "linux":
            unix_name = f"afd-{secrets.token_hex(16)}"
            self._open_door(socket.AF_UNIX, "\0" + unix_name)
        if tcp:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            port = self._open_door(family, (host, 0)).getsockname()[1]
        self.endpoint = Endpoint(worker, node, unix_name, host, port)

    def wait(self, timeout_s: float) -> list[IncomingCall]:
        deadline = time.monotonic() + timeout_s
        calls: list[ServedCall] = []
        while True:
            left_s = 0.0 if calls else max(0.0, deadline - time.monotonic())
            if self._candidates:
                left_s = min(left_s, HANDSHAKE_TIMEOUT_S / 10)
            if self._closed_until:
                left_s = min(left_s, _ACCEPT_PAUSE_S)
                self._open_doors_again()
            for descriptor, events in self._epoll.poll(left_s):
                sock = self._watched.get(descriptor)
                if sock is None:
                    continue  # ended while the events of this round were served
                if sock in self._links:
                    self._exchange(sock, events, calls)
                elif sock in self._candidates:
                    self._introduce(sock)
                else:
                    self._accept(sock)
            if self._candidates:
                self._drop_silent_candidates()
            if calls or time.monotonic() >= deadline:
                # A call read first may have been sent again by what was read after it.
                return [call for call in calls if call.wanted]

    def serve_usual_calls(
        self, layers: Sequence[KernelFFN | None], account: CallAccount, timeout_s: float
    ) -> bool:
        links = [*self._links.values()]
        if not links or self._candidates or not all(link.is_idle for link in links):
            return False
        if self._loop is None:
            self._loop = CallLoop(layers, NUM_SLOTS, _SAMPLE_FRAME, account)
        if self._loop_links != links:
            self._loop_links = links
            places = [link.place(self._loop.hidden_size) for link in links]
            self._loop.use(self._epoll.fileno(), [place for place in places if place is not None])
        unsent = self._loop.serve(timeout_s)
        if unsent is not None:
            descriptor, rest = unsent
            sock = self._watched[descriptor]
            try:
                self._links[sock].send_rest(rest)
            except OSError as error:
                self._drop(sock, logging.INFO, f"the connection ended ({error})")
        return True

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for sock, link in self._links.items():
            link.close()
            sock.close()
        for sock, candidate in self._candidates.items():
            candidate.close()
            sock.close()
        for sock in self._doors:
            sock.close()
        self._links.clear()
        self._candidates.clear()
        self._watched.clear()
        self._epoll.close()

    # --- events ----------------------------------------------------------------------------------------------------

    def _exchange(self, sock: socket.socket, events: int, calls: list[ServedCall]) -> None:
        link = self._links[sock]
        try:
            if events & ~select.EPOLLIN:
                link.flush()
            if events & ~select.EPOLLOUT:
                calls.extend(link.read_calls())
            if link.has_output != link.watched_for_writes:
                self._watch_writes(sock, link)
        except FrameError as error:
            self._drop(sock, logging.WARNING, f"it does not follow the protocol: {error}")
        except (EOFError, OSError) as error:
            self._drop(sock, logging.INFO, f"the connection ended{f' ({error})' if str(error) else ''}")
        except Exception as error:  # short of memory, or a bug: no reason to leave the other links unserved
            self._drop(sock, logging.ERROR, f"it cannot be served: {type(error).__name__}: {error}")

    def _watch_writes(self, sock: socket.socket, link: ServedLink) -> None:
        link.watched_for_writes = link.has_output
        self._epoll.modify(sock, select.EPOLLIN | (select.EPOLLOUT if link.has_output else 0))

    def output_pending(self, sock: socket.socket) -> None:
        """A link's answer did not leave at once: `wait` sends the rest when the peer takes it."""
        if sock in self._links:
            self._watch_writes(sock, self._links[sock])

    def _watch(self, sock: socket.socket) -> None:
        self._epoll.register(sock, select.EPOLLIN)
        self._watched[sock.fileno()] = sock

    def _watch_no_more(self, sock: socket.socket) -> None:
        if self._watched.pop(sock.fileno(), None) is not None:
            self._epoll.unregister(sock)

    def _accept(self, door: socket.socket) -> None:
        try:
            sock, _ = door.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # gone again already
        except OSError as error:  # it still waits, and would be the next event again at once
            self._watch_no_more(door)
            self._closed_until[door] = time.monotonic() + _ACCEPT_PAUSE_S
            logger.warning("%s: a connection could not be accepted: %s", self.endpoint.worker, error)
            return
        if len(self._candidates) >= MAX_CANDIDATES:
            self._reject(next(iter(self._candidates)), "too many connections that do not introduce themselves")
        try:
            sock.setblocking(False)
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                # An attention worker that leaves answers unread for as long as a dead one can dial again.
                notice_dead_host(sock, peer_reads_at_once=True)
            self._candidates[sock] = Candidate(sock, self._secret)
            self._watch(sock)
        except OSError as error:
            self._candidates.pop(sock, None)
            sock.close()
            logger.info("%s: a connection ended at once: %s", self.endpoint.worker, error)

    def _open_doors_again(self) -> None:
        now = time.monotonic()
        for door in [door for door, until in self._closed_until.items() if until <= now]:
            del self._closed_until[door]
            self._watch(door)

    def _introduce(self, sock: socket.socket) -> None:
        candidate = self._candidates[sock]
        try:
            hello = candidate.read()
            if hello is None:
                return
            link = self._welcome(candidate, hello)
        except HandshakeError as error:
            self._reject(sock, str(error))
        except (EOFError, OSError) as error:
            self._reject(sock, f"the connection ended {error}")
        except Exception as error:  # as in _exchange
            self._reject(sock, f"it cannot be served: {type(error).__name__}: {error}")
        else:
            del self._candidates[sock]
            self._links[sock] = link

    def _welcome(self, candidate: Candidate, hello: Hello) -> ServedLink:
        slots = candidate.open_slots(hello, self._device)
        candidate.accept(hello)
        on_socket = hello.purpose == "tcp"
        return ServedLink(candidate.socket, slots, hello.replica, on_socket, self.output_pending)

    def _drop_silent_candidates(self) -> None:
        now = time.monotonic()
        for sock, candidate in list(self._candidates.items()):
            if now < candidate.connected_at + HANDSHAKE_TIMEOUT_S:
                return  # the rest came later
            self._reject(sock, f"it did not introduce itself within {HANDSHAKE_TIMEOUT_S:g} s")

    def _reject(self, sock: socket.socket, reason: str) -> None:
        self._candidates.pop(sock).close()
        self._end(sock)
        logger.warning("%s: a connection was dropped: %s", self.endpoint.worker, reason)

    def _drop(self, sock: socket.socket, level: int, reason: str) -> None:
        link = self._links.pop(sock)
        link.close()
        self._end(sock)
        logger.log(level, "%s: link of attention-%d dropped: %s", self.endpoint.worker, link.replica, reason,
                   exc_info=level >= logging.ERROR)  # fmt: skip

    def _end(self, sock: socket.socket) -> None:
        self._watch_no_more(sock)
        sock.close()

    def _open_door(self, family: int, address: str | tuple[str, int]) -> socket.socket:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.bind(address)
            sock.listen(_BACKLOG)
        except BaseException:
            sock.close()
            raise
        sock.setblocking(False)
        self._doors.append(sock)
        self._watch(sock)
        return sock
