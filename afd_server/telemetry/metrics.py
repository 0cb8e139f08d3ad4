"""The Prometheus metrics of a server, under vLLM's names with `afd:` in front where vLLM has the thing.

Two sources write here: the front-end tells of requests (it sees their first and last token), each attention replica's
stats tell of steps. What lives here: names, labels, buckets, and turning growing totals into counters. What does not:
when something happened (api/, engine/).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from afd_server.telemetry.key_metrics import KeyMetrics
from afd_server.telemetry.straggler_metrics import StragglerMetrics
from afd_server.telemetry.worker_metrics import WorkerMetrics
from afd_server.types import ReplicaStats, StepTiming

TTFT_BUCKETS_S = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
)
TOKEN_BUCKETS_S = (
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
REQUEST_BUCKETS_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
# A hop is one layer of one micro-batch: tens of microseconds on a GPU, milliseconds on a CPU.
HOP_BUCKETS_S = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1)
SHARE_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
MICRO_BATCH_BUCKETS = (1, 2, 3, 4)

# How a request ends that was not admitted, and why.
REFUSED = "refused"
REFUSALS = ("ttft_predicted", "ttft_deadline", "queue_full")

# Totals that a replica reports -> the counter that they feed.
TOTALS = {
    "num_preemptions": ("num_preemptions", "Requests that gave up their KV blocks and were computed again."),
    "prefix_cache_queried_tokens": ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    "prefix_cache_hit_tokens": ("prefix_cache_hits", "Prompt tokens found in the prefix cache."),
}


class Listener(Protocol):
    """Who looks on while it happens. Called on the event loop's thread, for every token: it must be quick."""

    def prompt(self, num_tokens: int) -> None: ...
    def tokens(self, num_tokens: int, since_last_s: float, *, first: bool) -> None: ...
    def finished(self, time_per_output_token_s: float | None) -> None: ...
    def stepped(self, replica: str, stats: ReplicaStats) -> None: ...


class Metrics:
    """All metrics of one server, in a registry of their own. Methods are called on the event loop's thread.

    tpot_sla_s, ttft_sla_s: the promises whose keeping is counted; None where there is none.
    listener: is told of everything besides, while there is one. queue_length: requests that wait for admission.
    """

    def __init__(
        self, model_name: str, *, tpot_sla_s: float | None = None, ttft_sla_s: float | None = None
    ) -> None:
        self._registry = CollectorRegistry()
        self._model_name = model_name
        self.promises_s = {
            name: seconds for name, seconds in (("ttft", ttft_sla_s), ("tpot", tpot_sla_s)) if seconds
        }
        self.listener: Listener | None = None
        self.queue_length = 0
        self._last_stats: dict[str, ReplicaStats] = {}
        self._create_request_metrics()
        self._create_promise_metrics()
        self._create_replica_metrics()
        self.workers = WorkerMetrics(self._registry, model_name, self._replica_down)
        self.keys = KeyMetrics(self._registry, model_name)
        self.stragglers = StragglerMetrics(self._registry, model_name)

    def exposition(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)

    @property
    def replica_stats(self) -> Mapping[str, ReplicaStats]:
        """The last word of every replica that ever ran a step."""
        return self._last_stats

    # --- requests, as the front-end sees them ----------------------------------------------------------------------

    def observe_prompt(self, num_tokens: int) -> None:
        """A request was handed to the router."""
        self._prompt_tokens.inc(num_tokens)
        if self.listener is not None:
            self.listener.prompt(num_tokens)

    def observe_tokens(self, num_tokens: int, since_last_s: float, *, first: bool) -> None:
        """Tokens came, `since_last_s` seconds after the ones before, or after the request's arrival."""
        self._generation_tokens.inc(num_tokens)
        (self._time_to_first_token if first else self._inter_token_latency).observe(since_last_s)
        if self.listener is not None:
            self.listener.tokens(num_tokens, since_last_s, first=first)

    def observe_lost(self, replica: str, num_requests: int) -> None:
        """A replica was lost with so many requests under way, which go on elsewhere."""
        self._resubmitted.labels(model_name=self._model_name, engine=replica).inc(num_requests)

    def observe_finish(
        self,
        reason: str,
        total_s: float,
        decode_s: float,
        num_tokens: int,
        ttft_s: float = 0.0,
        prefill_s: float = 0.0,
    ) -> None:
        """A request ended. reason: stop, length, abort, error or refused. decode_s: from its first to its last token. prefill_s: from
        its first step to its first token."""
        self._request_success.labels(model_name=self._model_name, finished_reason=reason).inc()
        if reason in ("abort", "error", REFUSED):
            return  # their times tell of the client or of the failure, not of the server's pace
        self._e2e_request_latency.observe(total_s)
        time_per_output_token_s = decode_s / (num_tokens - 1) if num_tokens > 1 else None
        if time_per_output_token_s is not None:
            self._time_per_output_token.observe(time_per_output_token_s)
        if self.listener is not None:
            self.listener.finished(time_per_output_token_s)
        if num_tokens:  # nothing is promised about reading a prompt alone
            self._queue_time.observe(max(0.0, ttft_s - prefill_s))
            self._prefill_time.observe(prefill_s)
            self._decode_time.observe(decode_s)
            self._observe_promises({"ttft": ttft_s, "tpot": decode_s / max(1, num_tokens - 1)}, num_tokens)

    def _observe_promises(self, taken_s: dict[str, float], num_tokens: int) -> None:
        kept = {name: taken_s[name] <= promised_s for name, promised_s in self.promises_s.items()}
        for name, is_kept in kept.items():
            self._promises.labels(self._model_name, name, "met" if is_kept else "missed").inc()
        if kept and all(kept.values()):
            self._goodput_requests.inc()
            self._goodput_tokens.inc(num_tokens)

    # --- admission -------------------------------------------------------------------------------------------------

    def observe_refusal(self, reason: str) -> None:
        """A request was refused: ttft_predicted, ttft_deadline or queue_full."""
        self._refused.labels(self._model_name, reason).inc()

    def observe_queued(self) -> None:
        """A request could not start at once."""
        self._queued.inc()

    def observe_queue_time(self, seconds: float) -> None:
        """A request was handed to a replica, so long after it came."""
        self._admission_time.observe(seconds)

    def set_queue_length(self, length: int) -> None:
        self.queue_length = length
        self._queue_length.set(length)

    # --- steps, as the replicas report them ------------------------------------------------------------------------

    def observe_step(self, replica: str, stats: ReplicaStats) -> None:
        """A replica's word after a step. Totals that fell are those of a restarted replica, which counts from 0."""
        labels = {"model_name": self._model_name, "engine": replica}
        self._running.labels(**labels).set(stats.num_running)
        self._waiting.labels(**labels).set(stats.num_waiting)
        used = (stats.num_blocks - stats.num_free_blocks) / stats.num_blocks if stats.num_blocks else 0.0
        self._kv_cache_usage.labels(**labels).set(used)
        last = self._last_stats.get(replica, ReplicaStats())
        restarted = any(getattr(stats, name) < getattr(last, name) for name in TOTALS)
        for name, counter in self._totals.items():
            counter.labels(**labels).inc(getattr(stats, name) - (0 if restarted else getattr(last, name)))
        self._last_stats[replica] = stats
        if self.listener is not None:
            self.listener.stepped(replica, stats)
        if stats.timing is not None:
            self._observe_timing(stats.timing, labels)

    def _replica_down(self, worker: str) -> None:
        """Nothing runs or waits there any more; the totals stay."""
        if worker in self._last_stats:
            labels = {"model_name": self._model_name, "engine": worker}
            for gauge in (self._running, self._waiting, self._kv_cache_usage):
                gauge.labels(**labels).set(0)

    def _observe_timing(self, timing: StepTiming, labels: dict[str, str]) -> None:
        self._step_time.labels(**labels).observe(timing.total_s)
        if timing.predicted_s and timing.period_s:
            self._step_period.labels(**labels).observe(timing.period_s)
            self._step_predicted.labels(**labels).observe(timing.predicted_s)
            error = abs(timing.predicted_s - timing.period_s) / timing.period_s
            self._step_error.labels(**labels).observe(error)
        self._micro_batches.labels(**labels).observe(timing.num_micro_batches)
        self._resent.labels(**labels).inc(timing.num_resent)
        if timing.total_s > 0:
            self._bubble_share.labels(**labels).observe(timing.bubble_s / timing.total_s)
        if timing.num_hops:
            # Means over the step's hops: a step reports sums, and that one number per step is cheap.
            self._attention_hop.labels(**labels).observe(timing.attention_s / timing.num_hops)
            self._ffn_hop.labels(**labels).observe(timing.ffn_s / timing.num_hops)
            self._wire_hop.labels(**labels).observe(timing.wire_s / timing.num_hops)
            self._ffn_batch.labels(**labels).observe(timing.ffn_rows / timing.num_hops)

    # --- names and buckets -----------------------------------------------------------------------------------------

    def _create_request_metrics(self) -> None:
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._request_success = Counter(
            "afd:request_success", "Requests that ended, by reason.", ["model_name", "finished_reason"],
            registry=self._registry,
        )  # fmt: skip
        for reason in ("stop", "length", "abort", "error", REFUSED):
            self._request_success.labels(model_name=self._model_name, finished_reason=reason)
        self._time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", TTFT_BUCKETS_S
        )
        self._inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Between two successive outputs of a request.", TOKEN_BUCKETS_S
        )
        self._time_per_output_token = self._histogram(
            "request_time_per_output_token_seconds",
            "Mean time per token of a request after its first.",
            TOKEN_BUCKETS_S,
        )
        self._queue_time = self._histogram(
            "request_queue_time_seconds", "From a request's arrival to its first step.", TTFT_BUCKETS_S
        )
        self._prefill_time = self._histogram(
            "request_prefill_time_seconds", "From a request's first step to its first token.", TTFT_BUCKETS_S
        )
        self._decode_time = self._histogram(
            "request_decode_time_seconds", "From a request's first token to its last.", REQUEST_BUCKETS_S
        )
        self._e2e_request_latency = self._histogram(
            "e2e_request_latency_seconds", "From a request's arrival to its last token.", REQUEST_BUCKETS_S
        )

    def _create_promise_metrics(self) -> None:
        self._promises = Counter(
            "afd:sla_requests", "Requests that ended within or beyond a promise (ttft, tpot).",
            ["model_name", "sla", "outcome"], registry=self._registry,
        )  # fmt: skip
        for name in self.promises_s:
            for outcome in ("met", "missed"):
                self._promises.labels(self._model_name, name, outcome)
        self._goodput_requests = self._counter("goodput_requests", "Requests that met every promise.")
        self._goodput_tokens = self._counter("goodput_tokens", "Tokens of requests that met every promise.")
        self._refused = Counter(
            "afd:requests_refused", "Requests refused by admission, by reason.", ["model_name", "reason"],
            registry=self._registry,
        )  # fmt: skip
        for reason in REFUSALS:
            self._refused.labels(self._model_name, reason)
        self._queued = self._counter("requests_queued", "Requests that had to wait for admission.")
        self._queue_length = Gauge(
            "afd:num_requests_queued", "Requests that wait for admission.", ["model_name"],
            registry=self._registry,
        ).labels(self._model_name)  # fmt: skip
        self._admission_time = self._histogram(
            "request_admission_time_seconds",
            "From a request's arrival to its admission to a replica.",
            TTFT_BUCKETS_S,
        )

    def _create_replica_metrics(self) -> None:
        self._running = self._gauge("num_requests_running", "Requests in the running batch.")
        self._waiting = self._gauge("num_requests_waiting", "Requests waiting for a place in the batch.")
        self._kv_cache_usage = self._gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.")
        self._totals = {field: self._replica_counter(*named) for field, named in TOTALS.items()}
        self._resubmitted = self._replica_counter(
            "requests_resubmitted", "Requests under way at a replica when it was lost, to go on elsewhere."
        )
        self._resent = self._replica_counter(
            "ffn_calls_resent",
            "FFN calls sent again because their worker was lost or failed, of steps that succeeded.",
        )
        self._step_time = self._replica_histogram("step_seconds", "One step of a replica.", TOKEN_BUCKETS_S)
        self._step_period = self._replica_histogram(
            "step_period_seconds", "From the end of one step to the end of the next.", TOKEN_BUCKETS_S
        )
        self._step_predicted = self._replica_histogram(
            "step_predicted_seconds", "What the step-time model expected of the same.", TOKEN_BUCKETS_S
        )
        self._step_error = self._replica_histogram(
            "step_prediction_error", "|predicted - actual| / actual of a step's period.", SHARE_BUCKETS
        )
        self._attention_hop = self._replica_histogram(
            "attention_hop_seconds", "Attention computing per layer hop, mean of a step.", HOP_BUCKETS_S
        )
        self._ffn_hop = self._replica_histogram(
            "ffn_hop_seconds", "FFN computing per layer hop, mean of a step.", HOP_BUCKETS_S
        )
        self._wire_hop = self._replica_histogram(
            "wire_hop_seconds", "Time on the way per layer hop, mean of a step.", HOP_BUCKETS_S
        )
        self._bubble_share = self._replica_histogram(
            "bubble_share", "Share of a step in which the attention worker stood still.", SHARE_BUCKETS
        )
        self._micro_batches = self._replica_histogram(
            "micro_batches", "Micro-batches of a step.", MICRO_BATCH_BUCKETS
        )
        self._ffn_batch = self._replica_histogram(
            "ffn_batch_rows",
            "Rows of an FFN batch, calls of other replicas included, mean of a step.",
            ROW_BUCKETS,
        )

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"afd:{name}", text, ["model_name"], registry=self._registry).labels(self._model_name)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        metric = Histogram(f"afd:{name}", text, ["model_name"], registry=self._registry, buckets=buckets)
        return metric.labels(self._model_name)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"afd:{name}", text, ["model_name", "engine"], registry=self._registry)

    def _replica_counter(self, name: str, text: str) -> Counter:
        return Counter(f"afd:{name}", text, ["model_name", "engine"], registry=self._registry)

    def _replica_histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(
            f"afd:{name}", text, ["model_name", "engine"], registry=self._registry, buckets=buckets
        )
