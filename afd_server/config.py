"""Every setting of a server, once: name, default, unit, room of the house, and the checks that need no machine.

The command line, the YAML file of `--config` and the docs are all made from the fields of `ServeConfig`; its names are
vLLM's where vLLM has the thing. What depends on the machine ("auto") is resolved later and printed at start.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

from afd_server.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16")
KERNELS = ("auto", "native", "torch")
QUANTIZATIONS = ("int8",)
WIRE_DTYPES = ("auto", "float32", "bfloat16", "fp8")
TRANSPORTS = ("auto", "inproc", "shm", "tcp", "direct")
TOOL_CALL_PARSERS = (
    "auto", "none", "hermes", "llama3_json", "llama4_json", "pythonic", "llama4_pythonic", "mistral", "deepseek_v3",
    "deepseek_v31", "step3", "step3p5", "qwen3_coder",
)  # fmt: skip
REASONING_PARSERS = ("auto", "none", "qwen3", "deepseek_r1", "deepseek_v3", "step3", "mistral")
MAX_MICRO_BATCHES = 4
# From this many expert shards on a shard is sent only the rows that it owns an expert of. Below it the whole call is
# broadcast: a token needs a given one of 2 shards with probability 0.88 in Step-3, of 4 shards with 0.59.
SPARSE_DISPATCH_FROM = 4
MOST: Mapping[str, float] = {"int": 2**62, "float": 1e9}  # of a number; a timeout of 30 years is none
API_KEY_VARIABLE = "AFD_API_KEY"
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
LOG_FORMATS = ("text", "json")


def separate_keys(api_key: str) -> list[str]:
    """The API keys of a setting or of the environment, the operator's first."""
    return [key.strip() for key in api_key.split(",")]


def option(
    default: Any, room: str, help: str, choices: Iterable[str | int] | None = None, *, secret: bool = False
) -> Any:
    """A setting with what a person must know of it. `help` names the unit. secret: it is never shown."""
    metadata = {"room": room, "help": help, "choices": tuple(choices or ()), "secret": secret}
    return field(default=default, metadata=metadata, repr=not secret)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """How one server is laid out. Frozen: it is handed to every worker as it is."""

    model: str = option("default", "model", "a Hugging Face directory, or a hub name where the network allows")
    served_model_name: str | None = option(None, "model", "the name that clients use; default: MODEL as given")
    dtype: str = option("auto", "model", "type of weights and activations; auto: the checkpoint's", DTYPES)
    quantization: str | None = option(
        None, "model", "int8: weights of 8 bits, one scale a row; CPU kernels only", QUANTIZATIONS
    )
    max_model_len: int | None = option(
        None, "model", "longest prompt + output, tokens; default: the model's own"
    )
    trust_remote_code: bool = option(False, "model", "accepted for compatibility; no remote code is ever run")
    seed: int = option(0, "model", "seed from which the seeds of requests without one are drawn")

    host: str = option("127.0.0.1", "api", "address to listen on")
    port: int = option(8000, "api", "TCP port to listen on")
    api_key: str | None = option(
        None,
        "api",
        "clients must send it as a bearer token; several with commas between, of which the first is the operator's; "
        f"{API_KEY_VARIABLE} in the environment does the same, unseen by `ps`",
        secret=True,
    )
    max_logprobs: int = option(
        20,
        "api",
        "the most likely tokens that a request may have reported at each place; -1: the whole vocabulary",
    )
    api_key_file: str | None = option(
        None, "api", "file of keys' hashes, one a line, made by `afd key new`; read again when it changes"
    )
    allowed_origins: str = option(
        "[]", "api", "JSON list of the origins whose pages may ask from a browser (CORS); '[\"*\"]': any"
    )
    allowed_methods: str = option('["*"]', "api", "JSON list of the methods that such a page may use")
    allowed_headers: str = option('["*"]', "api", "JSON list of the headers that such a page may send")
    allow_credentials: bool = option(False, "api", "whether such a page may send cookies and the like")
    root_path: str = option("", "api", "path below which a proxy in front serves this server, as /llm")
    ssl_certfile: str | None = option(None, "api", "file of the certificate, PEM: the server speaks https")
    ssl_keyfile: str | None = option(None, "api", "file of its key; default: it is in --ssl-certfile")
    ssl_ca_certs: str | None = option(None, "api", "file of the authorities that clients' certificates are of")
    ssl_cert_reqs: int = option(
        0,
        "api",
        "certificates of clients, as Python numbers it: 0 none, 1 checked if sent, 2 demanded",
        (0, 1, 2),
    )
    client_timeout: float = option(
        60.0, "api", "seconds that a client may take to send a request, or let its answer lie unread"
    )
    chat_template: str | None = option(
        None, "api", "a file, or the template itself in one line; default: the model's own"
    )
    tool_call_parser: str = option(
        "auto", "api", "how the model writes tool calls; auto: as its chat template shows it", TOOL_CALL_PARSERS
    )
    enable_auto_tool_choice: bool = option(
        True, "api", 'let the model call tools by itself (tool_choice "auto")'
    )
    exclude_tools_when_tool_choice_none: bool = option(
        False, "api", 'do not show a request\'s tools to the model for tool_choice "none"'
    )
    reasoning_parser: str = option(
        "auto",
        "api",
        "how the model marks its reasoning; auto: as its chat template shows it",
        REASONING_PARSERS,
    )
    shutdown_timeout: float = option(30.0, "api", "seconds that running requests may take after SIGTERM")

    max_num_seqs: int = option(64, "engine", "requests running at once on each attention worker")
    max_num_batched_tokens: int = option(2048, "engine", "tokens of one step on each attention worker")
    tpot_sla_ms: float | None = option(
        None, "engine", "promise: milliseconds per output token, mean of a request; what does not fit queues"
    )
    ttft_sla_ms: float | None = option(
        None, "engine", "with --tpot-sla-ms: milliseconds to the first token, else a request is refused (429)"
    )
    max_queue_len: int = option(256, "engine", "with --tpot-sla-ms: requests that may queue; others get 429")
    profile: str | None = option(
        None,
        "engine",
        "a file of `afd profile`: what the model of step time starts from, in place of a warm-up's steps",
    )
    enable_chunked_prefill: bool = option(True, "engine", "cut long prompts to fit a step")
    enable_prefix_caching: bool = option(True, "kvcache", "share KV blocks of equal prompt beginnings")
    block_size: int = option(16, "kvcache", "tokens in one KV block")
    kv_cache_memory_bytes: int | None = option(
        None, "kvcache", "bytes of KV cache on each attention worker; default: a share of what is free"
    )

    attention_workers: int = option(1, "cluster", "attention workers, each a replica with its own requests")
    ffn_workers: int = option(1, "cluster", "FFN workers in all: replicas x expert shards x tensor shards")
    ffn_parallel: str = option(
        "ep", "cluster", "how FFN workers of a replica share the weights: ep, tp or <ep>x<tp>"
    )
    ffn_replicas: int = option(1, "cluster", "copies of the whole FFN side")
    gate_on: str = option(
        "attention", "cluster", "which side runs the router of a MoE layer", ("attention", "ffn")
    )
    executor: str = option(
        "ray", "cluster", "ray: one actor a worker; local: threads of one process", ("ray", "local")
    )
    ray_address: str | None = option(None, "cluster", "a running Ray cluster; default: start one on this host")
    device: str = option(
        "auto", "cluster", "where the tensors live; auto: cuda if there is one", ("auto", "cpu", "cuda")
    )
    kernels: str = option(
        "auto",
        "cluster",
        "native: this server's own (C++ on CPUs, Triton on GPUs); torch: torch's; auto: native where that can be had",
        KERNELS,
    )
    enforce_eager: bool = option(
        False,
        "cluster",
        "no CUDA graphs: every kernel of a step is launched by itself (graphs need native kernels)",
    )
    attention_resource: str | None = option(
        None, "cluster", "custom Ray resource that a node for attention workers must offer"
    )
    ffn_resource: str | None = option(
        None, "cluster", "custom Ray resource that a node for FFN workers must offer"
    )
    placement_timeout: float = option(
        15.0, "cluster", "seconds that the cluster may take, at a start, to offer what the workers need"
    )
    drain_timeout: float = option(
        30.0, "cluster", "seconds that requests may finish on a worker that leaves; then they move to another"
    )
    attach: bool | None = option(
        None,
        "cluster",
        "attach to running workers whose front-end has ended, or fail; default: if the same command started them",
    )
    orphan_timeout: float = option(
        60.0, "cluster", "seconds for which workers outlive a front-end that was killed"
    )
    start_timeout: float = option(
        300.0, "cluster", "seconds that the workers may take to load, at a start or one of them at a restart"
    )
    heartbeat_timeout: float = option(
        10.0, "cluster", "seconds without an answer after which a worker's process is ended and started again"
    )
    max_restarts: int = option(
        10, "cluster", "restarts of a worker before it is given up; each minute that it is up makes up for one"
    )

    micro_batches: str = option("auto", "pipeline", "micro-batches in flight, 1 to 4; auto: by measured times")
    transport: str = option(
        "auto",
        "pipeline",
        "path of the activations; auto: by where workers are; direct: none, for comparison",
        TRANSPORTS,
    )
    wire_dtype: str = option(
        "auto", "pipeline", "type of activations on the wire; auto: the model's", WIRE_DTYPES
    )
    ffn_timeout: float = option(60.0, "pipeline", "seconds to wait for one FFN answer, restarts included")

    log_level: str = option(
        "info",
        "telemetry",
        "least level of log lines; AFD_LOG_LEVEL in the environment does the same",
        LOG_LEVELS,
    )
    log_format: str = option(
        "text",
        "telemetry",
        "json: an object a line, on standard error alone; AFD_LOG_FORMAT does the same",
        LOG_FORMATS,
    )

    otlp_traces_endpoint: str | None = option(
        None,
        "telemetry",
        "URL of an OpenTelemetry collector (OTLP over HTTP, as http://HOST:4318): a span for each request",
    )

    def __post_init__(self) -> None:
        for setting in fields(self):
            _check_type(setting, getattr(self, setting.name))
        _check_positive(self, "max_num_seqs", "max_num_batched_tokens", "block_size", "attention_workers",
                        "ffn_workers", "ffn_replicas", "max_model_len", "kv_cache_memory_bytes",
                        "placement_timeout", "start_timeout", "heartbeat_timeout", "ffn_timeout", "tpot_sla_ms",
                        "ttft_sla_ms", "client_timeout")  # fmt: skip
        for name in (
            "model",
            "api_key",
            "api_key_file",
            "served_model_name",
            "ray_address",
            "profile",
            "chat_template",
        ):
            if getattr(self, name) == "":
                raise ConfigError(flag(name), "is empty")
        if self.api_key is not None and not all(separate_keys(self.api_key)):
            raise ConfigError(
                "--api-key", "one of the keys is empty", "give one, or several with commas between"
            )
        if self.otlp_traces_endpoint is not None and not _is_url(self.otlp_traces_endpoint):
            raise ConfigError("--otlp-traces-endpoint", f"{self.otlp_traces_endpoint!r} is not a URL of http or https",
                              "for example http://localhost:4318")  # fmt: skip
        for name in ("allowed_origins", "allowed_methods", "allowed_headers"):
            json_list(flag(name), getattr(self, name))
        if self.root_path and not (self.root_path.startswith("/") and len(self.root_path.rstrip("/")) > 0):
            raise ConfigError("--root-path", f"{self.root_path!r} is not a path", "for example /llm")
        if not 0 <= self.port <= 65535:
            raise ConfigError("--port", f"{self.port} is not a TCP port", "0 to 65535; 0 takes a free one")
        for name in ("shutdown_timeout", "max_queue_len", "max_restarts"):
            if getattr(self, name) < 0:
                raise ConfigError(flag(name), "is negative")
        if self.max_logprobs < -1:
            raise ConfigError("--max-logprobs", f"{self.max_logprobs} is no number of tokens", "-1 for all")
        if self.ttft_sla_ms is not None and self.tpot_sla_ms is None:
            raise ConfigError("--ttft-sla-ms", "is kept by what --tpot-sla-ms predicts", "give both")
        if self.micro_batches != "auto" and self.micro_batches not in map(str, range(1, MAX_MICRO_BATCHES + 1)):
            raise ConfigError(
                "--micro-batches", f"{self.micro_batches!r} is not auto or 1 to {MAX_MICRO_BATCHES}"
            )
        if self.transport in ("inproc", "direct") and self.executor != "local":
            raise ConfigError(
                "--transport", f"{self.transport} joins workers of one process", "add --executor local"
            )
        if self.attach and self.executor == "local":
            raise ConfigError("--attach", "workers of --executor local end with their process")
        if self.quantization and (self.kernels == "torch" or self.device == "cuda"):
            raise ConfigError("--quantization", "needs the CPU kernels", "use --device cpu --kernels native")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                "--max-num-batched-tokens",
                f"{self.max_num_batched_tokens} tokens a step for {self.max_num_seqs} running requests, which need one each",
                "raise it, or lower --max-num-seqs",
            )
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < (self.max_model_len or 0):
            raise ConfigError("--max-num-batched-tokens", "is below --max-model-len without chunked prefill",
                              "raise it, or leave --enable-chunked-prefill on")  # fmt: skip
        self.ffn_shards  # noqa: B018  raises when the layout is impossible

    @property
    def ffn_shards(self) -> tuple[int, int]:
        """(expert shards, tensor shards) of one FFN replica; their product times ffn_replicas is ffn_workers."""
        if self.ffn_workers % self.ffn_replicas:
            raise ConfigError(
                "--ffn-replicas", f"{self.ffn_workers} FFN workers do not make {self.ffn_replicas} equal copies"
            )
        per_replica = self.ffn_workers // self.ffn_replicas
        if self.ffn_parallel == "ep":
            return per_replica, 1
        if self.ffn_parallel == "tp":
            return 1, per_replica
        ep, _, tp = self.ffn_parallel.partition("x")
        if not (ep.isdigit() and tp.isdigit() and int(ep) > 0 and int(tp) > 0):
            raise ConfigError(
                "--ffn-parallel", f"{self.ffn_parallel!r} is not ep, tp or <ep>x<tp>", "for example 2x2"
            )
        if int(ep) * int(tp) != per_replica:
            raise ConfigError("--ffn-parallel", f"{self.ffn_parallel} needs {int(ep) * int(tp)} workers a replica, "
                              f"there are {per_replica}", "change --ffn-workers")  # fmt: skip
        return int(ep), int(tp)


def settings_of(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Settings from a file's keys (dashes or underscores), to be given to ServeConfig.

    Raises ConfigError, naming the file, for an unknown key (with a near one), one given twice, or a value of another type.
    """
    known = {setting.name: setting for setting in fields(ServeConfig)}
    settings: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(source, f"unknown key {name!r}", f"did you mean {near[0]!r}?" if near else "")
        if name in settings:
            raise ConfigError(source, f"{name!r} is given twice")
        # YAML takes a text of digits for a number.
        is_text = str(known[name].type).startswith("str") and type(value) in (int, float)
        settings[name] = str(value) if is_text else value
        try:
            _check_type(known[name], settings[name])
        except ConfigError as error:
            raise ConfigError(source, str(error)) from None
    return settings


def flag(name: str) -> str:
    """The command-line spelling of a setting."""
    return "--" + name.replace("_", "-") if name != "model" else "MODEL"


def json_list(source: str, text: str) -> list[str]:
    """Of a flag that holds a list. Raises ConfigError."""
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ConfigError(source, f"{text!r} is not a JSON list of texts", """for example '["GET", "POST"]'""")
    return values


def _is_url(text: str) -> bool:
    scheme, _, rest = text.partition("://")
    return scheme in ("http", "https") and bool(rest.strip("/")) and not any(map(str.isspace, text))


def _check_type(setting: Field[Any], value: Any) -> None:
    wanted = str(setting.type)
    if value is None:
        if "None" not in wanted:
            raise ConfigError(flag(setting.name), "has no value")
        return
    kind = wanted.split(" ")[0]
    accepted: tuple[type, ...] = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}[kind]
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind != "bool"):
        shown = "its value" if setting.metadata["secret"] else repr(value)
        raise ConfigError(flag(setting.name), f"{shown} is not of type {kind}")
    most = MOST.get(kind, 0.0)
    if most and isinstance(value, int | float) and not -most <= value <= most:  # nor a float that is no number
        raise ConfigError(flag(setting.name), f"{value} is out of range")
    choices = setting.metadata["choices"]
    if choices and value not in choices:
        raise ConfigError(flag(setting.name), f"{value!r} is not one of {', '.join(map(str, choices))}")


def _check_positive(config: ServeConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ConfigError(flag(name), f"{value} is not positive")
