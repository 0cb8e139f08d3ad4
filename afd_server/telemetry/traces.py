"""Traces: a span for each request, in it queue, prefill and decode, sent to an OpenTelemetry collector in the background.

What lives here: the spans, under vLLM's names of attributes, and how they leave this process. What does not: when what
happened (api/generation.py measures it, the attention worker tells how long it had the request before the first token).
The rest of the server knows `Traces` alone; without --otlp-traces-endpoint this module is not even imported.

A collector that is down costs the requests nothing: spans wait in a bounded queue, the oldest go when it is full, and the log
says once that they are lost and once that they are sent again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from afd_server.types import GenerationRequest, RequestTimes

logger = logging.getLogger(__name__)

MAX_WAITING_SPANS = 8192  # 4 a request
MAX_BATCH_SPANS = 512
SEND_EVERY_S = 1.0
SEND_TIMEOUT_S = 5.0  # with whatever is tried again
END_TIMEOUT_S = 3.0  # what has not left by then, at the end of the server, is lost
PATH = "/v1/traces"


class Traces:
    """The spans of one front-end. endpoint: URL of a collector that takes OTLP over HTTP (protobuf)."""

    def __init__(self, endpoint: str, model_name: str) -> None:
        logging.getLogger("opentelemetry").setLevel(
            logging.CRITICAL
        )  # it would tell of each try: see _Exporter
        self._model_name = model_name
        self._propagator = TraceContextTextMapPropagator()
        exporter = _Exporter(url_of(endpoint))
        processor = BatchSpanProcessor(
            exporter, MAX_WAITING_SPANS, SEND_EVERY_S * 1e3, MAX_BATCH_SPANS, SEND_TIMEOUT_S * 1e3
        )
        resource = Resource.create({SERVICE_NAME: "afd-server"})  # the environment's OTEL_SERVICE_NAME wins
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("afd_server")

    def recorder(
        self, headers: Mapping[str, str]
    ) -> Callable[[GenerationRequest, RequestTimes, str, int], None]:
        """Of requests that came with these headers: to be called with each when it has ended, when what was, why it has ended,
        and its number of output tokens. Within the client's span, if W3C's headers (traceparent, tracestate) name one."""
        return partial(self._record, self._propagator.extract(headers, Context()))

    def _record(
        self, parent: Context, request: GenerationRequest, times: RequestTimes, reason: str, num_tokens: int
    ) -> None:
        # The clock of the day is read once: differences are those of the monotonic one.
        offset_ns = time.time_ns() - round(time.monotonic() * 1e9)

        def ns(at_s: float) -> int:
            return offset_ns + round(at_s * 1e9)

        span = self._tracer.start_span(
            "llm_request",
            parent,
            SpanKind.SERVER,
            {**_attributes(request, times, num_tokens), "gen_ai.response.model": self._model_name,
             "gen_ai.response.finish_reasons": [reason]},
            start_time=ns(times.arrived_s),
        )  # fmt: skip
        if reason in ("error", "refused"):
            span.set_status(Status(StatusCode.ERROR, reason))
        inside = set_span_in_context(span, Context())
        for name, began_s, ended_s in _parts(times):
            part = self._tracer.start_span(name, inside, start_time=ns(began_s))
            part.end(ns(ended_s))
        span.end(ns(times.ended_s))

    def end(self) -> None:
        """Sends what waits, for END_TIMEOUT_S at most."""
        ending = threading.Thread(target=self._provider.shutdown, daemon=True)
        ending.start()
        ending.join(END_TIMEOUT_S)


def url_of(endpoint: str) -> str:
    """An address without a path means the path that collectors have."""
    scheme, _, rest = endpoint.partition("://")
    return endpoint if rest.rstrip("/").count("/") else f"{scheme}://{rest.rstrip('/')}{PATH}"


def _parts(times: RequestTimes) -> list[tuple[str, float, float]]:
    """(name, began, ended) of those that it has come to. The first token belongs to prefill."""
    if times.first_token_s is None or times.scheduled_s is None or times.last_token_s is None:
        return [("queue", times.arrived_s, times.ended_s)]
    return [
        ("queue", times.arrived_s, times.scheduled_s),
        ("prefill", times.scheduled_s, times.first_token_s),
        ("decode", times.first_token_s, times.last_token_s),
    ]


def _attributes(
    request: GenerationRequest, times: RequestTimes, num_tokens: int
) -> dict[str, str | int | float]:
    """In vLLM's names."""
    sampling = request.sampling
    lasted_s = {name: ended_s - began_s for name, began_s, ended_s in _parts(times)}
    attributes: dict[str, str | int | float] = {
        "gen_ai.request.id": request.request_id,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.usage.prompt_tokens": len(request.prompt_token_ids),
        "gen_ai.usage.completion_tokens": num_tokens,
        "gen_ai.latency.time_in_queue": lasted_s["queue"],
        "gen_ai.latency.e2e": times.ended_s - times.arrived_s,
    }
    if times.first_token_s is not None and "decode" in lasted_s:
        attributes |= {
            "gen_ai.latency.time_to_first_token": times.first_token_s - times.arrived_s,
            "gen_ai.latency.time_in_model_prefill": lasted_s["prefill"],
            "gen_ai.latency.time_in_model_decode": lasted_s["decode"],
            "gen_ai.latency.time_in_model_inference": lasted_s["prefill"] + lasted_s["decode"],
        }
    return attributes


class _Exporter(SpanExporter):
    """OpenTelemetry's own, which tells once when the collector does not take spans any more, and once when it does again."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._inner = OTLPSpanExporter(url, timeout=SEND_TIMEOUT_S)
        self._is_failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._inner.export(spans)
        is_failing = result is not SpanExportResult.SUCCESS
        if is_failing and not self._is_failing:
            logger.warning("traces are lost: %s does not take them", self._url)
        if self._is_failing and not is_failing:
            logger.info("traces are taken again by %s", self._url)
        self._is_failing = is_failing
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()
