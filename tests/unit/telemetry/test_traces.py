"""Spans of requests as a collector gets them, over OTLP, from the front-end in this process."""

import asyncio
import http.server
import logging
import threading
import time
from dataclasses import replace

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from afd_server.errors import OverloadedError, UnavailableError
from afd_server.telemetry import traces as module
from afd_server.telemetry.traces import Traces, url_of
from afd_server.types import FinishReason, GenerationRequest, RequestTimes, SamplingParams
from tests.unit.api.scripted_service import ScriptedService, client_for, says

DEADLINE_S = 20
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """Takes OTLP over HTTP on a free port, and keeps the spans that it is sent."""

    def __init__(self):
        self.spans = []
        self.resources = []
        self.paths = set()
        self.status = 200
        self._news = threading.Condition()
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                sent = ExportTraceServiceRequest()
                sent.ParseFromString(self.rfile.read(int(self.headers["content-length"])))
                with collector._news:
                    collector.paths.add(self.path)
                    if collector.status == 200:
                        for each in sent.resource_spans:
                            collector.resources.append(values(each.resource.attributes))
                            collector.spans += [span for scope in each.scope_spans for span in scope.spans]
                    collector._news.notify_all()
                self.send_response(collector.status)
                self.end_headers()

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def wait_for(self, condition):
        with self._news:
            assert self._news.wait_for(condition, DEADLINE_S)

    def close(self):
        self._server.shutdown()
        self._server.server_close()


class Pause(asyncio.Event):
    """In a script: the machine takes so long."""

    length_s = 0.1

    async def wait(self):
        await asyncio.sleep(self.length_s)


def values(attributes):
    """Of OTLP's list of attributes: a dictionary."""
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


@pytest.fixture(autouse=True)
def loggers():
    """As they were."""
    library = logging.getLogger("opentelemetry")
    level = library.level
    yield
    library.setLevel(level)


@pytest.fixture
def collector(monkeypatch):
    monkeypatch.setattr(module, "SEND_EVERY_S", 0.02)
    collector = Collector()
    yield collector
    collector.close()


async def trace(collector, script, *, headers=(), count, **body):
    """All spans of one completion."""
    traces = Traces(collector.url, "tiny")
    try:
        async with client_for(ScriptedService(script), traces) as client:
            given = {"X-Request-Id": "r1", **dict(headers)}
            await client.post("/v1/completions", json={"prompt": "hi", **body}, headers=given)
        await asyncio.to_thread(collector.wait_for, lambda: len(collector.spans) >= count)
    finally:
        traces.end()
    assert len(collector.spans) == count
    return {span.name: span for span in collector.spans}


def test_where_spans_go():
    assert url_of("http://host:4318") == url_of("http://host:4318/") == "http://host:4318/v1/traces"
    assert url_of("https://host/otlp/v1/traces") == "https://host/otlp/v1/traces"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_with_its_parts(collector, stream):
    first, *rest = says("abc", FinishReason.LENGTH)
    before_ns = time.time_ns()
    spans = await trace(
        collector, [Pause(), replace(first, prefill_s=0.05), *rest], count=4, stream=stream,
        max_tokens=3, temperature=0.5, top_p=0.9,
        headers={"traceparent": f"00-{TRACE}-{PARENT}-01"},
    )  # fmt: skip
    after_ns = time.time_ns()
    request = spans.pop("llm_request")
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE, PARENT)
    assert before_ns <= request.start_time_unix_nano < request.end_time_unix_nano <= after_ns
    assert set(spans) == {"queue", "prefill", "decode"}
    for part in spans.values():
        assert (part.trace_id, part.parent_span_id) == (request.trace_id, request.span_id)
    queue, prefill, decode = (spans[name] for name in ("queue", "prefill", "decode"))
    assert queue.start_time_unix_nano == request.start_time_unix_nano
    assert queue.end_time_unix_nano == prefill.start_time_unix_nano
    assert prefill.end_time_unix_nano == decode.start_time_unix_nano
    assert prefill.end_time_unix_nano - prefill.start_time_unix_nano == pytest.approx(0.05e9, abs=1e4)
    told = values(request.attributes)
    assert told["gen_ai.request.id"].startswith("cmpl-r1-0-")
    assert told["gen_ai.response.model"] == "tiny"
    assert (told["gen_ai.usage.prompt_tokens"], told["gen_ai.usage.completion_tokens"]) == (2, 3)
    assert [told[f"gen_ai.request.{name}"] for name in ("max_tokens", "temperature", "top_p")] == [3, 0.5, 0.9]
    latency = {name.rpartition(".")[2]: value for name, value in told.items() if ".latency." in name}
    assert latency["time_to_first_token"] >= Pause.length_s > latency["time_in_model_prefill"]
    assert latency["time_in_queue"] + 0.05 == pytest.approx(latency["time_to_first_token"], abs=1e-4)
    assert latency["e2e"] >= latency["time_to_first_token"] + latency["time_in_model_decode"]
    assert latency["time_in_model_inference"] == pytest.approx(0.05 + latency["time_in_model_decode"], abs=1e-4)
    assert collector.paths == {"/v1/traces"}
    assert collector.resources[0]["service.name"] == "afd-server"


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (UnavailableError("gone"), "error"),
        (OverloadedError("full", reason="queue_full", retry_after_s=1), "refused"),
    ],
)
async def test_a_request_that_gets_nothing(collector, failure, reason):
    spans = await trace(collector, [failure], count=2)
    request = spans["llm_request"]
    assert (request.status.code, request.status.message) == (2, reason)
    assert request.parent_span_id == b""  # the client had sent no span, or one that is none
    assert set(spans) == {"llm_request", "queue"}


async def test_every_choice_is_a_request(collector):
    service = ScriptedService(says("ab"), says("cd"))
    traces = Traces(collector.url, "tiny")
    async with client_for(service, traces) as client:
        await client.post("/v1/completions", json={"prompt": "hi", "n": 2}, headers={"traceparent": "nonsense"})
    traces.end()
    requests = [span for span in collector.spans if span.name == "llm_request"]
    assert {values(span.attributes)["gen_ai.request.id"] for span in requests} == {
        request.request_id for request in service.requests
    }


def test_a_collector_that_is_down_is_told_of_once_and_costs_no_request(collector, caplog, monkeypatch):
    monkeypatch.setattr(module, "SEND_TIMEOUT_S", 0.05)
    monkeypatch.setattr(module, "MAX_WAITING_SPANS", 600)
    caplog.set_level(logging.INFO)
    collector.status = 503
    traces = Traces(collector.url, "tiny")
    record = traces.recorder({})
    request = GenerationRequest("r", (1,), SamplingParams(1))
    times = RequestTimes(1.0, 1.1, 1.2, 1.3, 1.4)
    began = time.monotonic()
    for _ in range(2000):
        record(request, times, "stop", 1)
    assert time.monotonic() - began < DEADLINE_S

    def told(words):
        return [line for line in caplog.messages if words in line]

    deadline = time.monotonic() + DEADLINE_S
    while not told("traces are lost") and time.monotonic() < deadline:
        time.sleep(0.01)
    collector.status = 200
    while not told("taken again") and time.monotonic() < deadline:
        record(request, times, "stop", 1)
        time.sleep(0.01)
    traces.end()
    assert caplog.messages == [
        f"traces are lost: {collector.url}/v1/traces does not take them",
        f"traces are taken again by {collector.url}/v1/traces",
    ]


def test_the_end_waits_for_no_collector(monkeypatch):
    monkeypatch.setattr(module, "END_TIMEOUT_S", 0.1)
    traces = Traces("http://192.0.2.1:4318", "tiny")  # an address of nobody
    traces.recorder({})(GenerationRequest("r", (1,), SamplingParams(1)), RequestTimes(1, 2, 3, 4, 5), "stop", 1)
    began = time.monotonic()
    traces.end()
    assert time.monotonic() - began < module.SEND_TIMEOUT_S
