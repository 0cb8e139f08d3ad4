"""`afd serve`: from a configuration to a running server, and down again.

The order matters. What can be refused without a worker (model, flags, a taken port) is refused first, in one line. Then
the front-end opens, answering 503 on /health, while the workers load. A worker that cannot start ends it all with the
first cause.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import aclosing
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING, Any, Protocol

import uvloop

from afd_server import __version__
from afd_server.api.app import create_app
from afd_server.api.keys import KeyRing
from afd_server.api.server import bind_port, serve
from afd_server.api.settings import (
    BODY_BYTES,
    BODY_BYTES_PER_TOKEN,
    ApiSettings,
    CrossOrigin,
    OperatedWorkers,
)
from afd_server.api.tls import tls_context
from afd_server.checkpoints.default_model import afd_home
from afd_server.checkpoints.find import find_model
from afd_server.cluster.layout import resolve
from afd_server.cluster.workers import Started, WorkerInfo
from afd_server.config import ServeConfig, json_list
from afd_server.errors import UnavailableError
from afd_server.models.checkpoint import check_checkpoint
from afd_server.models.families import read_model_spec
from afd_server.models.spec import ModelSpec
from afd_server.router.admission import Admission
from afd_server.router.replica_client import ReplicaClient
from afd_server.router.router import Router
from afd_server.telemetry.logs import Phases, configure_logging
from afd_server.telemetry.metrics import Metrics
from afd_server.telemetry.straggler_watch import StragglerWatch
from afd_server.telemetry.stragglers import StragglerReport
from afd_server.telemetry.worker_metrics import WorkerMetrics
from afd_server.text import reasoning
from afd_server.text.chat_template import ChatTemplate
from afd_server.text.generation_defaults import read_generation_defaults
from afd_server.text.tokenizer import Tokenizer, read_tokenizer_config
from afd_server.text.tool_calls import registry
from afd_server.types import GenerationRequest, RequestOutput

if TYPE_CHECKING:
    from afd_server.telemetry.traces import Traces

logger = logging.getLogger(__name__)

# Models that this server makes itself, on first use.


class Workers(OperatedWorkers, Protocol):
    """The workers of a server, wherever they run: llm.LocalWorkers or cluster.ray_cluster.RayCluster."""

    def start(self, cancelled: threading.Event) -> Started: ...
    async def connect(self) -> Sequence[ReplicaClient]: ...
    async def supervise(self, router: Router, metrics: WorkerMetrics) -> None: ...
    def health(self) -> list[str]: ...
    def is_serving(self) -> bool: ...
    def refusal(self) -> str: ...
    def stop(self) -> None: ...


class Service:
    """What the front-end sees: requests and health, also while there is no worker yet."""

    def __init__(self, workers: Workers, metrics: Metrics) -> None:
        self.workers = workers
        self.watch = StragglerWatch(workers.totals, metrics.stragglers)
        self._router: Router | None = None

    def open(self, router: Router) -> None:
        """Every worker is ready: requests go to `router` from now on."""
        self._router = router

    async def generate(self, request: GenerationRequest) -> AsyncIterator[RequestOutput]:
        """See Router.generate. Raises UnavailableError until the workers are ready, and when too many are given up."""
        if self._router is None:
            raise UnavailableError("the workers are still starting")
        if refusal := self.workers.refusal():
            raise UnavailableError(refusal)
        async with aclosing(self._router.generate(request)) as outputs:
            async for output in outputs:
                yield output

    async def stragglers(self) -> StragglerReport:
        return await self.watch.report()

    def health(self) -> list[str]:
        if self._router is None:
            return ["the workers are still starting"]
        return [*self.workers.health(), *self._router.health()]

    def is_serving(self) -> bool:
        return self._router is not None and self._router.is_serving() and self.workers.is_serving()


def run_server(config: ServeConfig, began_s: float | None = None) -> int:
    """Serves until SIGTERM or SIGINT; gives the exit code. Raises StartError if it cannot start.

    began_s: when the imports of this module began, monotonic.
    """
    configure_logging("server", config.log_level, config.log_format)
    phases = Phases(began_s)
    phases.over("importing")
    directory = find_model(config.model)
    spec = read_model_spec(directory)
    check_checkpoint(directory, spec)
    config = resolve(config, spec, directory)
    tokenizer = Tokenizer.load(directory)
    settings = _api_settings(config, spec, tokenizer)
    tls = tls_context(config)
    listening = bind_port(config.host, config.port)
    phases.over("reading and checking the model")
    metrics = Metrics(
        settings.model_name, tpot_sla_s=_seconds(config.tpot_sla_ms), ttft_sla_s=_seconds(config.ttft_sla_ms)
    )
    traces = _traces(config, settings.model_name)
    workers = _workers(config)
    try:
        service = Service(workers, metrics)
        app = create_app(settings, service, tokenizer, metrics, traces)
        front_end = serve(
            app,
            config.host,
            config.port,
            config.shutdown_timeout,
            [listening],
            client_timeout_s=config.client_timeout,
            tls=tls,
            on_end=app.state.on_end,
        )
        machine = _run_workers(config, spec, service, metrics, _url(listening, "https" if tls else "http"))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run(front_end, machine))
    finally:
        listening.close()
        workers.stop()
        if traces is not None:
            traces.end()
    return 0


def _traces(config: ServeConfig, model_name: str) -> Traces | None:
    if config.otlp_traces_endpoint is None:
        return None
    from afd_server.telemetry.traces import Traces

    return Traces(config.otlp_traces_endpoint, model_name)


def _workers(config: ServeConfig) -> Workers:
    if config.executor == "local":
        from afd_server.llm import LocalWorkers

        return LocalWorkers(config)
    from afd_server.cluster.own_ray import own_ray
    from afd_server.cluster.ray_environment import prepare_environment

    prepare_environment(
        own_cluster=config.ray_address is None, log_level=config.log_level, log_format=config.log_format
    )
    own = own_ray(config, afd_home()) if config.ray_address is None else None
    try:
        from afd_server.cluster.ray_cluster import RayCluster  # imports ray, which reads the environment

        return RayCluster(config, own)
    except BaseException:  # a signal, too
        if own is not None:
            own.end()
        raise


async def _run(front_end: Coroutine[None, None, None], machine: Coroutine[None, None, None]) -> None:
    """Both side by side: the front-end ends by a signal, the machine only by an error."""
    serving, working = asyncio.create_task(front_end), asyncio.create_task(machine)
    try:
        await asyncio.wait((serving, working), return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            working.result()  # raises what ended it
        serving.result()
    finally:
        for task in (working, serving):
            task.cancel()
        await asyncio.gather(working, serving, return_exceptions=True)


def _api_settings(config: ServeConfig, spec: ModelSpec, tokenizer: Tokenizer) -> ApiSettings:
    assert config.served_model_name and config.max_model_len
    template = _chat_template(config, tokenizer)
    source = "" if template is None else template.source
    shows_tools = template is not None and template.shows_tools
    tool_call_parser = _parser(config.tool_call_parser, registry.format_of(source) if shows_tools else None)
    reasoning_parser = _parser(config.reasoning_parser, reasoning.format_of(source))
    logger.info(
        "chats: tool calls are read by %s (--tool-call-parser %s), reasoning by %s (--reasoning-parser %s)",
        f"the parser {tool_call_parser}" if tool_call_parser else "no parser",
        config.tool_call_parser,
        f"the parser {reasoning_parser}" if reasoning_parser else "no parser",
        config.reasoning_parser,
    )
    return ApiSettings(
        model_name=config.served_model_name,
        max_model_len=config.max_model_len,
        vocab_size=spec.vocab_size,
        max_logprobs=spec.vocab_size if config.max_logprobs == -1 else config.max_logprobs,
        chat_template=template,
        tool_call_parser=tool_call_parser,
        reasoning_parser=reasoning_parser,
        enable_auto_tool_choice=config.enable_auto_tool_choice,
        exclude_tools_when_tool_choice_none=config.exclude_tools_when_tool_choice_none,
        cross_origin=_cross_origin(config),
        root_path=config.root_path.rstrip("/"),
        keys=KeyRing(config.api_key, config.api_key_file),
        version=__version__,
        created=int(time.time()),
        seed=config.seed,
        tokenizer_info=_tokenizer_info(config, source) if config.enable_tokenizer_info_endpoint else None,
        priorities=config.tpot_sla_ms is not None,
        default_sampling=read_generation_defaults(config.model),
        max_body_bytes=BODY_BYTES + BODY_BYTES_PER_TOKEN * config.max_model_len,
        page=not config.disable_ui,
    )


def _chat_template(config: ServeConfig, tokenizer: Tokenizer) -> ChatTemplate | None:
    if config.chat_template is not None:
        return ChatTemplate.given(config.chat_template, tokenizer.special_tokens)
    return ChatTemplate.load(config.model, tokenizer.special_tokens)


def _parser(named: str, of_template: str | None) -> str | None:
    """named: a setting. of_template: what the chat template is written for, as far as it can be told."""
    return of_template if named == "auto" else None if named == "none" else named


def _tokenizer_info(config: ServeConfig, template: str) -> dict[str, Any]:
    """tokenizer_config.json, and what may stand in other files."""
    beside = {"tokenizer_class": "PreTrainedTokenizerFast", **({"chat_template": template} if template else {})}
    return {**beside, **read_tokenizer_config(Path(config.model))}


def _cross_origin(config: ServeConfig) -> CrossOrigin | None:
    lists = (config.allowed_origins, config.allowed_methods, config.allowed_headers)
    origins, methods, headers = (json_list("", text) for text in lists)
    return CrossOrigin(origins, methods, headers, config.allow_credentials) if origins else None


async def _run_workers(
    config: ServeConfig, spec: ModelSpec, service: Service, metrics: Metrics, url: str
) -> None:
    """Starts the workers, opens the service, and watches over them until cancelled."""
    began = time.monotonic()
    logger.info(
        "starting %d attention and %d FFN workers (%s)",
        config.attention_workers,
        config.ffn_workers,
        config.executor,
    )
    cancelled = threading.Event()
    try:
        started = await asyncio.to_thread(service.workers.start, cancelled)
    finally:
        cancelled.set()  # the thread outlives this task by a moment only
    admission = _admission(config, metrics)
    async with Router(
        await service.workers.connect(), metrics.observe_step, metrics.observe_lost, admission=admission
    ) as router:
        service.open(router)
        seconds = time.monotonic() - began
        if config.log_format == "text":
            print(_ready_lines(config, spec, started, url, seconds), flush=True)
        logger.info("ready after %.1f s: %s", seconds, url, extra={"seconds": round(seconds, 3), "url": url})
        watching = asyncio.create_task(service.watch.run())
        try:
            await service.workers.supervise(router, metrics.workers)
        finally:
            watching.cancel()


def _admission(config: ServeConfig, metrics: Metrics) -> Admission | None:
    """What requests pass where there is a promise to keep."""
    tpot_sla_s = _seconds(config.tpot_sla_ms)
    if tpot_sla_s is None:
        return None
    return Admission(tpot_sla_s, _seconds(config.ttft_sla_ms), config.max_queue_len, metrics)


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


def _ready_lines(config: ServeConfig, spec: ModelSpec, started: Started, url: str, seconds: float) -> str:
    """What a person wants to know of a server that has just become ready."""
    ep, tp = config.ffn_shards
    body = f'{{"model": "{config.served_model_name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    key = ' -H "Authorization: Bearer $AFD_API_KEY"' if config.api_key or config.api_key_file else ""
    attention, ffn = started.attention, started.ffn
    lines = {
        "url": url,
        **({"attached": _attached_line(started)} if started.attached else {}),
        "model": f"{config.served_model_name} ({spec.architecture}, {spec.num_layers} layers, {config.dtype})",
        "attention": f"{_count(attention, 'worker')} on {attention[0].device}, {_megabytes(attention)} of weights each",
        "FFN": f"{_count(ffn, 'worker')} on {ffn[0].device}, {_megabytes(ffn)} of weights each "
        f"({config.ffn_replicas} x {ep} expert shards x {tp} tensor shards)",
        "transport": f"{', '.join(started.transports)}, {config.wire_dtype} on the wire, router on {config.gate_on}",
        "pipeline": f"micro-batches {config.micro_batches}",
        "KV cache": f"{attention[0].kv_cache_tokens:,} tokens per attention worker, {config.max_model_len:,} per request",
        "try": f"curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'",
    }
    width = max(map(len, lines))
    return "\n".join(
        [
            f"afd-server {__version__} is ready after {seconds:.1f} s",
            *(f"  {k:<{width}}  {v}" for k, v in lines.items()),
        ]
    )


def _attached_line(started: Started) -> str:
    """The front-end before this one was killed."""
    loaded = len(started.attention) + len(started.ffn) - started.attached
    return f"to {started.attached} running workers" + (
        f"; {loaded} were loaded" if loaded else ", none loaded again"
    )


def _url(listening: socket, scheme: str) -> str:
    host, port = listening.getsockname()[:2]
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def _count(workers: Sequence[WorkerInfo], noun: str) -> str:
    return f"{len(workers)} {noun}{'s' if len(workers) > 1 else ''}"


def _megabytes(workers: Sequence[WorkerInfo]) -> str:
    return f"{max(worker.weight_bytes for worker in workers) / 1e6:.0f} MB"
