"""The one thread of an attention replica: it takes requests in, runs step after step, and sleeps when there are none.

What lives here: the thread, the queue before it, where requests also wait for their grammars to be compiled, and the
updates after it. What does not: what a step is (engine.py).
Whoever carries requests (the control server, or the router in the same process) calls `submit` and `abort` from any thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from afd_server.engine.engine import Engine
from afd_server.errors import UnavailableError
from afd_server.kvcache.block_pool import BlockAccountError
from afd_server.types import FinishReason, GenerationRequest, ReplicaUpdate, RequestOutput

logger = logging.getLogger(__name__)

# Makes a request with a constraint ready, on a thread of its own, then calls back with what is wrong with it, or "".
Prepare = Callable[[GenerationRequest, Callable[[str], None]], None]
# A request, the id of one to abort, or what one gives that never comes to the engine.
Command = GenerationRequest | str | RequestOutput


class EngineLoop:
    """Runs an engine from construction until `stop`.

    on_update: called on the loop's thread with everything that a step or a command changed, so no change of the
    statistics goes without one. It must not block. What it raises is logged and goes no further.
    prepare: None where no request has a constraint.
    """

    def __init__(
        self, engine: Engine, on_update: Callable[[ReplicaUpdate], None], prepare: Prepare | None = None
    ) -> None:
        self._engine = engine
        self._on_update = on_update
        self._prepare = prepare
        self._preparing: dict[str, GenerationRequest] = {}
        self._wake = threading.Condition()
        self._commands: deque[Command] = deque()
        self._stopping = False
        self._busy_since: float | None = None  # monotonic seconds; None while it sleeps for want of work
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest) -> None:
        """Queues a request; its outputs come with the updates. Raises UnavailableError after `stop`."""
        needs_preparing = request.sampling.constraint is not None
        with self._wake:
            if self._stopping:
                raise UnavailableError("this attention worker is stopping")
            if needs_preparing:
                self._preparing[request.request_id] = request
            else:
                self._enqueue(request)
        if needs_preparing:
            assert self._prepare is not None
            self._prepare(request, partial(self._prepared, request))

    def abort(self, request_id: str) -> None:
        """Ends a request before the next step. Does nothing when it is unknown or has ended."""
        with self._wake:
            if self._stopping:
                return
            if self._preparing.pop(request_id, None) is not None:
                self._enqueue(RequestOutput(request_id, finish_reason=FinishReason.ABORT))
            else:
                self._enqueue(request_id)

    def _prepared(self, request: GenerationRequest, problem: str) -> None:
        """It goes to the engine, or ends. Any thread."""
        request_id = request.request_id
        with self._wake:
            if self._preparing.get(request_id) is not request:
                return  # it was aborted meanwhile
            del self._preparing[request_id]
            if problem:
                self._enqueue(RequestOutput(request_id, finish_reason=FinishReason.ERROR, error=problem))
            else:
                self._enqueue(request)

    def _enqueue(self, command: Command) -> None:
        self._commands.append(command)
        self._wake.notify()

    def is_alive(self) -> bool:
        """Whether the thread runs. It ends by `stop`, or by a bug of this server."""
        return self._thread.is_alive()

    @property
    def busy_since(self) -> float | None:
        """When the step under way began, in monotonic seconds; None while there is nothing to do. Any thread."""
        return self._busy_since

    def stop(self) -> None:
        """Returns when the step under way is over and the thread has ended. What is unfinished ends as aborted."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            commands, stopping = self._next_commands()
            outputs = [output for command in commands for output in self._carry_out(command)]
            if stopping:
                outputs += self._engine.abort_all()
            if outputs:
                self._publish(ReplicaUpdate(tuple(outputs), self._engine.stats()))
            if stopping:
                return
            if self._engine.has_work:
                self._publish(self._engine.step())
            if not self._engine.has_work:
                self._check()

    def _next_commands(self) -> tuple[Sequence[Command], bool]:
        """What came since the last step; sleeps for it when there is nothing to run."""
        with self._wake:
            while not (self._commands or self._stopping or self._engine.has_work):
                self._busy_since = None
                self._wake.wait()
            self._busy_since = time.monotonic()
            commands = list(self._commands)
            self._commands.clear()
            if self._stopping:
                commands += [RequestOutput(each, finish_reason=FinishReason.ABORT) for each in self._preparing]
                self._preparing.clear()
            return commands, self._stopping

    def _carry_out(self, command: Command) -> list[RequestOutput]:
        if isinstance(command, RequestOutput):
            return [command]
        if isinstance(command, str):
            return self._engine.abort(command)
        return self._engine.submit(command)

    def _check(self) -> None:
        """Idle: the time to see that no block was lost."""
        try:
            self._engine.check()
        except BlockAccountError:
            logger.exception("the account of KV blocks is wrong; this is a bug of this server")

    def _publish(self, update: ReplicaUpdate) -> None:
        try:
            self._on_update(update)
        except Exception:
            logger.exception("an update could not be delivered")
