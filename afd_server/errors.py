"""Every error that a person or a client can meet, in one tree.

What lives here: the types and the sentences they carry. What does not: the mapping to HTTP (api/) or to an exit code
(cli). An `assert` elsewhere in the code is a programmer's invariant; a user's mistake or a failing peer is one of these.
"""

from __future__ import annotations


class ServingError(Exception):
    """Root of the tree: something this server can name and explain."""


# --- mistakes of whoever starts the server: one line on the terminal, exit code 2 ---------------------------------


class StartError(ServingError):
    """The server cannot start as asked. The message names the flag or file and the remedy."""


class ConfigError(StartError):
    """A flag or configuration key is unknown, out of range, or contradicts another."""

    def __init__(self, flag: str, problem: str, remedy: str = "") -> None:
        super().__init__(f"{flag}: {problem}" + (f" ({remedy})" if remedy else ""))
        self.flag = flag


class ModelError(StartError):
    """The checkpoint is missing, damaged, or of an architecture or feature that this server does not run."""


class InsufficientMemoryError(StartError):
    """Not even one request of full length fits the KV cache."""


# --- mistakes of a client: HTTP 4xx, the field named ---------------------------------------------------------------


class RequestError(ServingError):
    """A request is refused before it costs anything. `field` is the JSON field, None where no single one is at fault."""

    status = 400
    code = "invalid_request_error"

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class PromptTooLongError(RequestError):
    """The prompt leaves no room for a single output token within the model's length."""

    code = "context_length_exceeded"


class ModelNotFoundError(RequestError):
    """The request names a model that this server does not serve."""

    status = 404
    code = "model_not_found"


class ChangeUnderWayError(RequestError):
    """The workers are being changed already."""

    status = 409
    code = "change_under_way"


class CannotScaleError(RequestError):
    """The workers that are asked for cannot be had; nothing has changed."""

    status = 409
    code = "cannot_scale"


class TooManyRecordingsError(RequestError):
    """As many as may watch the workers' hops do so already."""

    status = 429
    code = "too_many_recordings"


# --- failures of the machine: a retry, or HTTP 503 -----------------------------------------------------------------


class WorkerError(ServingError):
    """A worker failed during a step. Says which worker, and layer and step where they are known."""

    def __init__(self, worker: str, problem: str, *, layer: int | None = None, step: int | None = None) -> None:
        where = "".join(
            f", {name} {value}" for name, value in (("layer", layer), ("step", step)) if value is not None
        )
        super().__init__(f"worker {worker}{where}: {problem}")
        self.worker, self.problem, self.layer, self.step = worker, problem, layer, step


class WorkerDiedError(WorkerError):
    """The connection to a worker ended: end of file, reset, or Ray's word that its actor is gone."""


class WorkerTimeoutError(WorkerError):
    """A worker did not answer within its deadline."""


class WorkerFrozenError(WorkerTimeoutError):
    """A worker's process answers nothing at all, not even that it is there."""


class WorkerFailedError(WorkerError):
    """A worker says that it could not compute a call. The call is idempotent and may be sent again."""


class WorkerGivenUpError(WorkerError):
    """A worker's restarts are used up, and no other one can do its part."""


class ProtocolError(WorkerError):
    """A peer sent bytes that are not this protocol: wrong magic, version, secret, length or order."""


class RayLostError(ServingError):
    """The Ray cluster of this server alone has ended while it served, and every worker with it."""


class UnavailableError(ServingError):
    """The server can take no request now: starting, draining, or without a live attention replica."""


class OverloadedError(ServingError):
    """The promises to those who run leave no room for this request: HTTP 429. The message says what was predicted.

    reason: a word for the metrics. retry_after_s: when the client may have better luck.
    """

    def __init__(self, message: str, *, reason: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.reason, self.retry_after_s = reason, retry_after_s


class RateLimitError(ServingError):
    """An API key is at its limit: HTTP 429. what: requests or tokens. retry_after_s: when something is free again."""

    def __init__(self, message: str, what: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.what, self.retry_after_s = what, retry_after_s
