"""The verbs of the activation path, and the data they take: what a link is, whatever carries it.

What lives here: the two ends as abstract classes (an attention worker holds Links, an FFN worker holds one Listener)
and the plain data both agree on. What does not: bytes, sockets, threads (the other files of this room).

A link carries micro-batches 0 to NUM_SLOTS - 1. Each has at most one call under way, so it owns one slot of memory per
direction, and sending again simply takes the slot again: the call that was in it is superseded, and its answer, should
it still come, is discarded. What is made anew for every call is a NamedTuple, which costs a third of a frozen dataclass.
Shapes: T rows of a micro-batch, H hidden size, K experts per token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from afd_server.config import MAX_MICRO_BATCHES
from afd_server.errors import ConfigError

if TYPE_CHECKING:  # an Endpoint travels to processes that have not imported torch yet
    from torch import Tensor

    from afd_server.kernels.call_account import CallAccount
    from afd_server.kernels.hop import CallPlace, KernelFFN
    from afd_server.models.ffn_call import FFNCall

NUM_SLOTS = MAX_MICRO_BATCHES

# Bounds of what a peer may ask memory for; far beyond any model, near enough to stop a wild number.
MAX_ROWS = 1 << 20
MAX_HIDDEN_SIZE = 1 << 18
MAX_TOP_K = 1 << 10


class CallTag(NamedTuple):
    """Names one call. Two calls of equal tag ask for the same result, so a call may be sent again after a failure."""

    replica: int
    step: int
    layer: int
    micro_batch: int


@dataclass(frozen=True, slots=True)
class LinkShape:
    """What both ends of a link agree on: the largest call, and how activations are encoded.

    max_rows: T of the largest call. top_k: K, 0 where no call names experts. wire_dtype: type of the activations on the
    wire, "float32", "bfloat16" or "fp8" (float8_e4m3fn with one float32 scale a row). Answers are float32 for
    float32 and bfloat16 for the other two; so is `FFNCall.x` when it comes out at the far end.
    """

    max_rows: int
    hidden_size: int
    top_k: int
    wire_dtype: str

    def __post_init__(self) -> None:
        if self.wire_dtype not in ("float32", "bfloat16", "fp8"):
            raise ConfigError("--wire-dtype", f"{self.wire_dtype!r} is not float32, bfloat16 or fp8")
        for name, value, least, most in (
            ("rows", self.max_rows, 1, MAX_ROWS),
            ("hidden size", self.hidden_size, 1, MAX_HIDDEN_SIZE),
            ("experts per token", self.top_k, 0, MAX_TOP_K),
        ):
            if not least <= value <= most:
                raise ConfigError("link", f"{value} {name}: a link carries {least} to {most}")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a worker listens: plain data for Ray or any encoder to carry.

    node: identity of the machine (Ray's node id), to decide whether memory can be shared. unix_name: name of a unix
    socket in the abstract namespace, None where there is none; port: TCP, None where it does not listen on TCP.
    """

    worker: str
    node: str
    unix_name: str | None
    host: str
    port: int | None


class Answer(NamedTuple):
    """An FFN worker's answer to one call.

    y: [T, H], the shard's partial sum. It is a view of the link's slot: valid until the next `send` of the same
    micro-batch. ffn_us: time spent computing; queue_us: time the call lay at the worker before that; batch_rows: rows
    of the batch it was computed in, merged with other callers'.
    """

    y: Tensor
    ffn_us: int
    queue_us: int
    batch_rows: int


class Link(ABC):
    """An attention worker's end of the path to one FFN worker. Used by one thread at a time."""

    worker: str
    """Name of the FFN worker at the other end, for errors."""

    @abstractmethod
    def send(self, tag: CallTag, call: FFNCall) -> None:
        """Hands a call over and returns, without waiting for it to be computed.

        The call's tensors (T >= 1 rows, any device, any float dtype) are copied, so they may be reused at once. Views
        of the previous answer to this micro-batch become invalid. What a busy peer does not take at once is sent on by
        the next `send` or `receive`. Raises WorkerDiedError when the connection is gone.
        """

    @abstractmethod
    def receive(self, tag: CallTag, timeout_s: float) -> Answer:
        """Waits for the answer to `tag`, the last call sent for its micro-batch.

        Raises WorkerTimeoutError when none came in time (the call stays under way and may be received later or sent
        again), WorkerDiedError as soon as the connection ends, WorkerFailedError when the worker says that it failed, and
        ProtocolError, after which the link is closed, when it talks nonsense.
        """

    def begin_run(self, tag: CallTag, rows: int) -> CallPlace | None:
        """For calls that a kernel makes by itself, `rows` rows in each: the place of the micro-batch, where `tag` is the
        first of them. None where that cannot be; else `end_run` follows, and nothing between."""
        return None

    def end_run(self, tag: CallTag, rows: int, num_sent: int, torn: bool) -> None:
        """So many calls left, the last of them is `tag`; torn: in part only, which ends the link."""
        raise NotImplementedError

    @abstractmethod
    def close(self) -> None:
        """Ends the connection; the worker forgets this link's calls. May be called twice."""


class IncomingCall(ABC):
    """A call at the FFN worker, from arrival to answer. Answered at most once, on the listener's thread.

    arrived_at: when it was read, monotonic seconds. call: views of the link's slot, in host memory unless both ends share a GPU's. Valid until the answer, or
    until its sender sends the micro-batch again: then the numbers may change under way, but what is computed from them
    reaches nobody, and expert ids stay expert ids of that sender.
    """

    tag: CallTag
    call: FFNCall
    arrived_at: float

    @abstractmethod
    def answer_buffer(self) -> Tensor:
        """[T, H] in the answer's dtype to write the partial sum into: the answer's place on the wire, no copy follows."""

    @abstractmethod
    def finish(self) -> None:
        """Waits for a device that still writes into `answer_buffer`, where the other end could see it unfinished. `answer` does
        so too; who measures the time of computing calls this first. Raises RuntimeError when the device has failed."""

    @abstractmethod
    def answer(self, ffn_us: int, batch_rows: int) -> None:
        """Sends what `answer_buffer` holds. Never blocks. Raises WorkerDiedError when the caller is gone.

        ffn_us: time spent computing; batch_rows: rows of the batch it was part of.
        """

    @abstractmethod
    def fail(self, message: str) -> None:
        """Tells the caller, in a sentence, why there is no answer. Otherwise as `answer`."""


class Listener(ABC):
    """An FFN worker's end of all its links. Used by one thread, which drives it by calling `wait`."""

    @abstractmethod
    def wait(self, timeout_s: float) -> list[IncomingCall]:
        """Every call that is waiting now, oldest first; sleeps up to timeout_s for the first. [] when none came.

        Connects, drops and writes on the side. No peer, whatever it sends or does not, makes it raise or wait longer.
        """

    def serve_usual_calls(
        self, layers: Sequence[KernelFFN | None], account: CallAccount, timeout_s: float
    ) -> bool:
        """Serves calls by kernels alone for a time; returns early for whatever `wait` is needed for. Whether it could.

        layers: the same in every call; some are not None. account: the same in every call; they are noted there.
        """
        return False

    @abstractmethod
    def close(self) -> None:
        """Ends every link and stops listening. May be called twice."""
