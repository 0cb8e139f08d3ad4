"""The FFN side as an attention worker sees it: one call out, one summed answer back, whatever stands behind.

What lives here: which worker of a shard is asked, and what happens when it fails, by dying, hanging or saying so: the call
is sent again, since it is idempotent, to another replica of that shard at once, or to the same worker when it is back.
What does not: rows and sums (dispatch.py), bytes and sockets (transport/), or the restart itself (cluster/).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from afd_server.attention.dispatch import GroupLayout, Part, divide, in_turn, summed
from afd_server.attention.group_timing import GroupTiming
from afd_server.attention.hop_notes import HopNotes
from afd_server.attention.preference import by_preference
from afd_server.errors import (
    WorkerDiedError,
    WorkerError,
    WorkerFailedError,
    WorkerGivenUpError,
    WorkerTimeoutError,
)
from afd_server.kernels.hop import CallPlace, LayerRun
from afd_server.models.ffn_call import FFNCall
from afd_server.transport.base import Answer, CallTag, Link

# How often a lost worker is tried again while its deadline runs. It is dialled, not polled: a refused connection costs
# microseconds.
REDIAL_EVERY_S = 0.05

# How long a worker is dialled while another replica of its shard may answer the call, and how long when there is none: it
# may have been started elsewhere meanwhile.
DIAL_TIMEOUT_S = 2.0
DIAL_ALONE_TIMEOUT_S = 10.0
# How long a worker that failed a call, or let it time out, is used only when no other replica of its shard is left.
SUSPECT_FOR_S = 60.0
# A call that so many workers, or one worker so many times, could not compute is not sent again. Each of them is restarted.
MAX_FAILURES = 3
# Between two looks whether the calls to a worker that is to leave have ended.
RETIRE_POLL_S = 0.005

Connector = Callable[[float], Link]  # timeout in seconds -> a fresh link; raises WorkerError


@dataclass(slots=True)
class _Flight:
    """A call under way: its tag, its parts by shard, when it was to leave, how long handing it over took, and
    when it left, as far as this side can know.

    holders: the worker that each part was sent to last. failures: of workers that could not compute it.
    """

    tag: CallTag
    call: FFNCall
    parts: dict[int, Part]
    sent_at: float
    sending_s: float = 0.0
    left_at: float = 0.0
    holders: dict[int, int] = field(default_factory=dict)
    failures: list[WorkerFailedError] = field(default_factory=list)

    def leave(self) -> float:
        """It is handed over; gives the time. A device computes on meanwhile: handing over waits for it."""
        now = time.monotonic()
        self.sending_s = now - self.sent_at
        self.left_at = now if self.call.x.is_cuda else self.sent_at
        return now


@dataclass(slots=True)
class _Peer:
    """One FFN worker: how to reach it, and the link while there is one."""

    connector: Connector
    link: Link | None = None
    calls: set[CallTag] = field(default_factory=set)  # sent over this link and not answered yet
    suspected_until: float = 0.0  # monotonic seconds; it has let a call time out


class FFNGroup:
    """Channel of a pipeline (see pipeline.py) over the links to all FFN workers.

    Used by one thread, the engine's; `replace`, `retire` and `give_up` may come from any other. So what they change (_peers, _choices)
    is never changed in place: a new object takes its place. unplaced: what the cluster lacks for FFN workers that have no
    place, by index; set from any thread. progressed_at: when the last answer came, monotonic seconds. hops: what is noted of each.
    """

    def __init__(
        self,
        connectors: Mapping[int, Connector],
        layout: GroupLayout,
        *,
        replica: int,
        dtype: torch.dtype,
        timeout_s: float,
        hops: HopNotes,
    ) -> None:
        self.hops = hops
        self._layout = layout
        self._replica = replica
        self._dtype = dtype
        self._timeout_s = timeout_s
        self._num_shards = layout.shards
        self._peers = {index: _Peer(connector) for index, connector in sorted(connectors.items())}
        self._retired: frozenset[int] = frozenset()
        self._given_up: dict[int, str] = {}  # index -> reason
        self.unplaced: Mapping[int, str] = {}
        self._choices = self._choose()
        assert all(self._choices), "every shard has a worker"
        self._flights: dict[int, _Flight] = {}
        self._lock = threading.Lock()
        self._step = self._running_at = 0
        self.timing = GroupTiming()
        self.progressed_at = 0.0

    def begin_step(self, step: int) -> None:
        """Calls from now on belong to `step`; whatever a failed step left under way is forgotten."""
        self._step, self.timing = step, GroupTiming()
        self.hops.computing_since = time.monotonic()
        self._flights.clear()
        if self._retired:
            self._forget_retired()
        for peer in self._peers.values():
            peer.calls.clear()

    # --- Channel ---------------------------------------------------------------------------------------------------

    def send(self, micro_batch: int, call: FFNCall) -> None:
        """Sends each shard its rows. Raises WorkerDiedError or WorkerTimeoutError when a shard stays out of reach."""
        tag = CallTag(self._replica, self._step, call.layer, micro_batch)
        sent_at = time.monotonic()
        parts = divide(call, self._layout)
        flight = self._flights[micro_batch] = _Flight(tag, call, parts, sent_at)
        for shard in parts:
            self._send_part(flight, shard, sent_at + self._timeout_s)
        now = flight.leave()
        self.hops.computed(tag, len(call.x), flight.left_at, now)

    def receive(self, micro_batch: int) -> Tensor:
        """The sum of all shards' partial results, [T, H] in the model's dtype; valid until the next `send`."""
        flight = self._flights.pop(micro_batch)
        deadline = flight.sent_at + self._timeout_s
        waiting_since = since = time.monotonic()
        answers: dict[int, Answer] = {}
        for shard in in_turn(flight.parts, flight.tag):
            answer = answers[shard] = self._receive_part(flight, shard, deadline)
            moments = (flight.left_at, since, since := time.monotonic())
            self.hops.answered(flight.tag, flight.holders[shard], answer, moments)
        received_at = self.progressed_at = self.hops.computing_since = since
        waited_s = flight.sending_s + received_at - waiting_since
        self.timing.note(answers.values(), received_at - flight.sent_at, waited_s)
        return summed(flight.call, flight.parts, answers, self._dtype)

    # --- runs: calls that a kernel makes by itself, one after the other (shortcut.py) -------------------------------

    def begin_run(self, rows: int) -> tuple[CallPlace, float] | None:
        """Where its calls go, and for how long an answer is waited for. None where there is more than one shard, or no link.

        Raises WorkerGivenUpError. `end_run` follows, and nothing between.
        """
        if self._num_shards > 1:
            return None
        index = self._in_order_of_trust(0)[0]
        peer, tag = self._peers[index], CallTag(self._replica, self._step, 0, 0)
        place = None if peer.link is None else peer.link.begin_run(tag, rows)
        if place is None:
            return None
        peer.calls.add(tag)  # the worker may not leave before its end
        self._running_at = index
        return place, self._timeout_s / (1 + self._num_others(0, index))

    def end_run(self, run: LayerRun, rows: int) -> None:
        """Raises WorkerTimeoutError when an answer did not come and nobody else can be asked."""
        index = self._running_at
        peer, tag = self._peers[index], CallTag(self._replica, self._step, max(0, run.sent - 1), 0)
        assert peer.link is not None
        worker = peer.link.worker
        peer.link.end_run(tag, rows, run.sent, run.torn)
        peer.calls.clear()
        self.timing.note_run(run)
        self.hops.ran(tag, index, run, rows)
        if run.answered:
            self.progressed_at = run.answered_at
        if run.late:
            self._drop(index, suspect=True)
            if not self._num_others(0, index):
                raise WorkerTimeoutError(worker, f"no answer within {self._timeout_s:g} s",
                                         layer=tag.layer, step=tag.step)  # fmt: skip

    # --- one shard, with its failures ------------------------------------------------------------------------------

    def _send_part(self, flight: _Flight, shard: int, deadline: float) -> None:
        """Sends to the first replica of the shard that can be reached, dialling all of them until the deadline."""
        while True:
            failure: WorkerError | None = None
            for index in self._in_order_of_trust(shard):
                try:
                    link = self._link(index, self._dial_timeout_s(shard, deadline))
                    link.send(flight.tag, flight.parts[shard].call)
                except (WorkerDiedError, WorkerTimeoutError) as error:
                    self._drop(index, suspect=isinstance(error, WorkerTimeoutError))
                    failure = failure or error
                    continue
                self._peers[index].calls.add(flight.tag)
                flight.holders[shard] = index
                return
            assert failure is not None
            if time.monotonic() + REDIAL_EVERY_S >= deadline:
                raise _out_of_reach(flight.tag, failure, self._choices[shard], self.unplaced, self._timeout_s)
            time.sleep(REDIAL_EVERY_S)

    def _receive_part(self, flight: _Flight, shard: int, deadline: float) -> Answer:
        while True:
            index = self._holder(flight, shard)
            if index is None:  # the link it was sent over is gone, and with it the call
                self.timing.num_resent += 1
                self._send_part(flight, shard, deadline)
                continue
            peer = self._peers[index]
            assert peer.link is not None
            # A worker may hang with its connection open. While there are other replicas, each gets its share of the time.
            others = self._num_others(shard, index)
            left_s = max(0.0, deadline - time.monotonic())
            try:
                answer = peer.link.receive(flight.tag, left_s / (1 + others))
            except WorkerTimeoutError:
                self._drop(index, suspect=True)
                if not others:
                    raise
                continue
            except WorkerDiedError:
                self._drop(index)
                if not others:  # whatever ended the link may do so again at once
                    time.sleep(REDIAL_EVERY_S)
                continue
            except WorkerFailedError as error:
                self._drop(index, suspect=True)
                flight.failures.append(error)
                if len(flight.failures) >= MAX_FAILURES:
                    raise flight.failures[0] from None
                continue
            peer.calls.discard(flight.tag)
            return answer

    def _holder(self, flight: _Flight, shard: int) -> int | None:
        """The worker that has the part, as far as is known: its link, and with it the call, may be gone."""
        index = flight.holders[shard]
        peer = self._peers[index]
        return index if flight.tag in peer.calls and peer.link is not None else None

    def _num_others(self, shard: int, index: int) -> int:
        """Replicas of the shard that may be asked instead of this one."""
        return sum([not self._is_suspected(other) for other in self._choices[shard] if other != index])

    def _is_suspected(self, index: int) -> bool:
        return self._peers[index].suspected_until > time.monotonic()

    def _in_order_of_trust(self, shard: int) -> list[int]:
        """The shard's replicas, the preferred one first and those that failed a call lately last.

        Raises WorkerGivenUpError when none is left.
        """
        choices = self._choices[shard]
        if not choices:
            raise self._given_up_error(shard)
        return sorted(choices, key=self._is_suspected) if len(choices) > 1 else choices

    # --- links -----------------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Opens every link, so that a wrong address or secret shows at start.

        Raises WorkerError when no replica of a shard can be reached in time: the only one may be restarting. One that is
        down while another is up may come later.
        """
        deadline = time.monotonic() + self._timeout_s
        for shard in range(self._num_shards):
            while (choices := self._choices[shard]) and len(failures := self._dial(choices, deadline)) == len(
                choices
            ):
                if time.monotonic() + REDIAL_EVERY_S >= deadline:
                    raise failures[0]
                time.sleep(REDIAL_EVERY_S)

    def _dial_timeout_s(self, shard: int, deadline: float) -> float:
        """A frozen process still takes connections: where there is another replica, little time is spent on it."""
        alone = len(self._choices[shard]) == 1
        return min(deadline - time.monotonic(), DIAL_ALONE_TIMEOUT_S if alone else DIAL_TIMEOUT_S)

    def _dial(self, choices: Collection[int], deadline: float) -> list[WorkerError]:
        """Opens the links to a shard's replicas; gives the failures."""
        failures: list[WorkerError] = []
        for index in choices:
            try:
                self._link(index, self._dial_timeout_s(index % self._num_shards, deadline))
            except (WorkerDiedError, WorkerTimeoutError) as error:
                failures.append(error)
        return failures

    def replace(self, index: int, connector: Connector) -> None:
        """FFN worker `index` is reached this way from now on: it is new, or was restarted. Callable from any thread.

        A new one is asked from the next call on, also in the middle of a step.
        """
        with self._lock:
            peer = self._peers.get(index)
            if peer is None:
                self._peers = {**self._peers, index: _Peer(connector)}
            else:
                peer.connector, peer.suspected_until = connector, 0.0
            self._given_up.pop(index, None)
            self._retired -= {index}
            self._choices = self._choose()

    def retire(self, index: int, timeout_s: float) -> bool:
        """Sends no call to FFN worker `index` any more. Whether those under way have ended; they are waited for.

        Callable from any thread but the engine's. Another worker must hold the same shard.
        """
        with self._lock:
            if index not in self._peers:
                return True
            self._retired |= {index}
            self._choices = self._choose()
            peer = self._peers[index]
        deadline = time.monotonic() + timeout_s
        while peer.calls and time.monotonic() < deadline:
            time.sleep(RETIRE_POLL_S)
        return not peer.calls

    def give_up(self, index: int, reason: str) -> None:
        """FFN worker `index` will not come back. Callable from any thread.

        What only it could compute fails at once, by WorkerGivenUpError.
        """
        with self._lock:
            self._given_up[index] = reason
            self._choices = self._choose()

    def _given_up_error(self, shard: int) -> WorkerGivenUpError:
        with self._lock:
            index, reason = next(each for each in self._given_up.items() if each[0] % self._num_shards == shard)
        return WorkerGivenUpError(f"ffn-{index}", reason, step=self._step)

    def _choose(self) -> list[list[int]]:
        """Every shard's workers, the one this attention replica prefers first: the load spreads without a word."""
        serving = [index for index in self._peers if index not in self._retired and index not in self._given_up]
        return by_preference(serving, self._num_shards, self._replica)

    def _forget_retired(self) -> None:
        """Between two steps: nothing is under way."""
        with self._lock:
            retired, self._retired = self._retired, frozenset()
            peers = [self._peers[index] for index in retired]
            self._peers = {index: peer for index, peer in self._peers.items() if index not in retired}
        for peer in peers:
            if peer.link is not None:
                peer.link.close()

    def close(self) -> None:
        for index in self._peers:
            self._drop(index)

    def _link(self, index: int, timeout_s: float) -> Link:
        peer = self._peers[index]
        if peer.link is None:
            with self._lock:
                connector = peer.connector
            peer.link = connector(max(0.001, timeout_s))
        return peer.link

    def _drop(self, index: int, suspect: bool = False) -> None:
        peer = self._peers[index]
        if suspect:
            peer.suspected_until = time.monotonic() + SUSPECT_FOR_S
        link, peer.link = peer.link, None
        peer.calls.clear()
        if link is not None:
            link.close()


def _out_of_reach(
    tag: CallTag, failure: WorkerError, choices: Collection[int], unplaced: Mapping[int, str], timeout_s: float
) -> WorkerTimeoutError:
    """Of a shard. That one of its workers cannot be placed says more than that nobody listens there."""
    worker, problem = failure.worker, failure.problem
    for index in choices:
        if index in unplaced:
            worker, problem = f"ffn-{index}", f"cannot be placed: {unplaced[index]}"
    return WorkerTimeoutError(
        worker, f"out of reach for {timeout_s:g} s: {problem}", layer=tag.layer, step=tag.step
    )
