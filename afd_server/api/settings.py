"""What the front-end is told once, and what it needs of the machine behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from afd_server.api.keys import KeyRing
from afd_server.telemetry.stragglers import StragglerReport
from afd_server.text.chat_template import ChatTemplate
from afd_server.types import GenerationRequest, RequestOutput, WorkerState, WorkerTotals, WorkerTrace

# Room for a body's fields, its batch of prompts or its messages, and more of it for the tokens of a longer context.
BODY_BYTES = 4 * 2**20
BODY_BYTES_PER_TOKEN = 32


@dataclass(frozen=True, slots=True)
class CrossOrigin:
    """Whose pages may ask, and what. For starlette's CORSMiddleware."""

    origins: Sequence[str]
    methods: Sequence[str] = ("*",)
    headers: Sequence[str] = ("*",)
    credentials: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiSettings:
    """The front-end's share of a server's settings.

    max_model_len: prompt and output of a request, tokens. vocab_size: rows of the model's embedding, the bound of ids.
    max_logprobs: how many of the most likely tokens may be reported at one place.
    created: when the server started, seconds since 1970. seed: from which seeds of requests without one are drawn.
    priorities: whether requests queue, so that one may go before another.
    default_sampling: request field -> value, for what a request leaves open (text.generation_defaults).
    tool_call_parser, reasoning_parser: names of text.tool_calls.registry and text.reasoning; None: nothing is looked for.
    cross_origin: None: pages of other origins may ask nothing. root_path: see --root-path.
    max_body_bytes: what is read of a request. Its JSON is parsed on the event loop, 20 to 50 ms a megabyte.
    """

    model_name: str
    max_model_len: int
    vocab_size: int
    max_logprobs: int = 20
    chat_template: ChatTemplate | None = None
    cross_origin: CrossOrigin | None = None
    root_path: str = ""
    keys: KeyRing = field(default_factory=KeyRing)
    version: str = ""
    created: int = 0
    seed: int = 0
    priorities: bool = False
    default_sampling: Mapping[str, float] = field(default_factory=dict)
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    enable_auto_tool_choice: bool = True
    exclude_tools_when_tool_choice_none: bool = False
    max_body_bytes: int = BODY_BYTES


class OperatedWorkers(Protocol):
    """The machine's workers, for whoever operates it."""

    def worker_states(self) -> list[WorkerState]:
        """Every worker, those that come and go included."""
        ...

    def change_under_way(self) -> str:
        """What is being changed now, in words; empty when nothing is."""
        ...

    async def scale(self, attention_workers: int | None, ffn_replicas: int | None) -> None:
        """Returns when there are so many; None leaves a number as it is. Raises RequestError, and has changed nothing then."""

    async def restart(self) -> None:
        """Returns when every worker runs in a new process. Raises RequestError or WorkerError."""

    async def trace(self, seconds: float) -> list[WorkerTrace]:
        """Records every hop of every worker for so long, and gives it, on this process's monotonic clock.

        What a worker that dies meanwhile, or does not answer, would have said is missing. Raises RequestError where too many
        record at once.
        """
        ...

    async def totals(self) -> list[WorkerTotals]:
        """What each worker has done since it was loaded; of those that answer."""
        ...


class Service(Protocol):
    """Whatever generates. Closing the iterator early frees what the request holds."""

    @property
    def workers(self) -> OperatedWorkers: ...

    def generate(self, request: GenerationRequest) -> AsyncIterator[RequestOutput]:
        """All that the request gives, until an output with a finish_reason. Raises UnavailableError."""
        ...

    async def stragglers(self) -> StragglerReport:
        """Which worker, layer or expert is slow."""
        ...

    def health(self) -> list[str]:
        """A sentence for each thing that is wrong; empty when all is well."""
        ...

    def is_serving(self) -> bool:
        """Whether requests get on now, with what is wrong."""
        ...
