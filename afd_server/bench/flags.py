"""The flags of `afd bench`, and what becomes of them. Names are those of `vllm bench serve` where it has the thing.

What lives here: parsing and its mistakes. Called by command.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from afd_server.bench.client import Target
from afd_server.bench.dataset import NAMES, DatasetSettings
from afd_server.bench.statistics import METRICS, PROMISED
from afd_server.command_line import Parser, number, positive, whole, whole_or_none
from afd_server.config import API_KEY_VARIABLE, separate_keys
from afd_server.errors import ConfigError

# vllm: what vLLM's benchmark calls the same.
BACKENDS = {"openai": "/v1/completions", "vllm": "/v1/completions", "openai-chat": "/v1/chat/completions"}
KEY_VARIABLES = (API_KEY_VARIABLE, "OPENAI_API_KEY")
SAMPLING = (
    "top_p",
    "top_k",
    "min_p",
    "temperature",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
)
# What vLLM's users type for things that are done otherwise here.
CALLED_HERE = {
    "--url": "--base-url",
    "--api-key": f"{API_KEY_VARIABLE} in the environment",
    "--concurrency": "--max-concurrency",
}


def add_target_flags(parser: Parser) -> None:
    group = parser.add_argument_group("the server")
    group.add_argument("--base-url", metavar="URL", help="the server; instead of --host and --port")
    group.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    group.add_argument("--port", type=int, default=8000, metavar="N", help="default: %(default)s")
    group.add_argument("--backend", choices=sorted(BACKENDS), default="openai",
                       help="completions or chat completions. Default: %(default)s")  # fmt: skip
    group.add_argument("--endpoint", metavar="ROUTE", help="default: the backend's")
    group.add_argument("--model", help="name of the model; default: the server's first")
    group.add_argument("--served-model-name", metavar="NAME", help="the same, and wins over --model")
    group.add_argument("--tokenizer", metavar="DIRECTORY",
                       help="to make prompts of an exact length; default: the server's own count of two short ones")  # fmt: skip
    group.add_argument("--header", nargs="+", default=[], metavar="KEY=VALUE", help="of every request; a key for the server "
                       f"is taken from {' or '.join(KEY_VARIABLES)} in the environment")  # fmt: skip
    group.add_argument("--insecure", action="store_true", help="accept any certificate")
    group.add_argument("--request-timeout", type=positive, default=600.0, metavar="SECONDS",
                       help="of one request, after which it has failed. Default: %(default)g")  # fmt: skip
    sampling = parser.add_argument_group("fields of every request")
    sampling.add_argument("--ignore-eos", action="store_true", help="ask for all output tokens")
    for name in SAMPLING:
        sampling.add_argument(_flag(name), type=int if name == "top_k" else float, metavar="X",
                              help="default: the server's")  # fmt: skip
    sampling.add_argument(
        "--extra-body", type=_json_object, default={}, metavar="JSON", help="any other fields"
    )


def add_dataset_flags(parser: Parser) -> None:
    group = parser.add_argument_group("what is asked")
    default = DatasetSettings()
    group.add_argument("--dataset-name", default=default.dataset_name, metavar="NAME",
                       help=f"{', '.join(NAMES)}. Default: %(default)s")  # fmt: skip
    group.add_argument("--dataset-path", type=Path, metavar="FILE", help="of every dataset but random")
    group.add_argument("--random-input-len", "--input-len", type=int, default=default.random_input_len, metavar="N",
                       help="tokens of a prompt. Default: %(default)s")  # fmt: skip
    group.add_argument("--random-output-len", "--output-len", type=int, default=default.random_output_len, metavar="N",
                       help="tokens asked for. Default: %(default)s")  # fmt: skip
    group.add_argument("--random-range-ratio", type=float, default=default.random_range_ratio, metavar="R",
                       help="lengths are drawn from (1 - R) to (1 + R) times theirs. Default: %(default)s")  # fmt: skip
    group.add_argument("--random-prefix-len", type=int, default=default.random_prefix_len, metavar="N",
                       help="more tokens, which all prompts begin with. Default: %(default)s")  # fmt: skip
    group.add_argument(
        "--sharegpt-output-len", type=whole, metavar="N", help="default: the length of each answer"
    )
    group.add_argument("--custom-output-len", type=int, default=default.custom_output_len, metavar="N",
                       help="-1 takes each line's output_tokens. Default: %(default)s")  # fmt: skip
    group.add_argument(
        "--no-oversample", action="store_true", help="do not repeat a file that is short of prompts"
    )
    group.add_argument("--disable-shuffle", action="store_true", help="take a file's prompts in their order")
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of prompts and times. Default: %(default)s"
    )


def add_run_flags(parser: Parser) -> None:
    """What all three commands have."""
    group = parser.add_argument_group("the run")
    group.add_argument("--num-warmups", type=whole_or_none, default=1, metavar="N",
                       help="requests before, which are not counted. Default: %(default)s")  # fmt: skip
    group.add_argument("--disable-tqdm", action="store_true", help="no progress bar")
    group.add_argument("--label", help="what the server is called in results; default: the backend")
    group.add_argument(
        "--save-result", action="store_true", help="write the JSON of the last line into a file, too"
    )
    group.add_argument("--result-dir", type=Path, metavar="DIRECTORY", help="for that file")
    group.add_argument("--result-filename", metavar="NAME", help="of that file")
    group.add_argument(
        "--metadata", nargs="+", default=[], metavar="KEY=VALUE", help="to be noted in the results"
    )


def target_of(given: argparse.Namespace, url: str | None = None) -> Target:
    """url: another server than the one that the flags name. Raises ConfigError."""
    url = url or given.base_url or f"http://{given.host}:{given.port}"
    headers = pairs("--header", given.header)
    key = next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)
    if key is not None:
        if not key.isprintable():
            raise ConfigError(" or ".join(KEY_VARIABLES), "in the environment is not one line of text")
        headers = {"Authorization": f"Bearer {separate_keys(key)[0]}", **headers}
    body = {name: getattr(given, name) for name in SAMPLING if getattr(given, name) is not None}
    if given.ignore_eos:
        body["ignore_eos"] = True
    return Target(
        url=(url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1"),
        model=given.served_model_name or given.model or "",
        endpoint=given.endpoint or BACKENDS[given.backend],
        is_chat=given.backend == "openai-chat",
        headers=headers,
        fields={**body, **given.extra_body},
        timeout_s=given.request_timeout,
        verify_certificate=not given.insecure,
    )


def dataset_of(given: argparse.Namespace) -> DatasetSettings:
    """Raises ConfigError."""
    return DatasetSettings(**{field.name: getattr(given, field.name) for field in fields(DatasetSettings)})


def pairs(flag: str, given: Sequence[str]) -> dict[str, str]:
    """KEY=VALUE pairs of a flag. Raises ConfigError."""
    found = {}
    for pair in given:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(flag, f"{pair!r} is not KEY=VALUE")
        if not pair.isprintable():
            raise ConfigError(flag, f"{pair!r} is more than one line of text")
        found[key.strip()] = value.strip()
    return found


def promises_of(given: Sequence[str]) -> dict[str, float]:
    """--goodput tpot:50 ttft:2000. Raises ConfigError."""
    found = {}
    for pair in given:
        metric, _, value = pair.partition(":")
        if metric not in PROMISED:
            raise ConfigError("--goodput", f"{metric!r} is none of {', '.join(PROMISED)}")
        try:
            found[metric] = positive(value)
        except argparse.ArgumentTypeError as error:
            raise ConfigError("--goodput", f"{pair!r}: {error}", "milliseconds, as in tpot:50") from None
    return found


def metrics_of(given: str) -> tuple[str, ...]:
    """--percentile-metrics ttft,tpot. Raises ConfigError."""
    names = tuple(name.strip() for name in given.split(","))
    for name in names:
        if name not in METRICS:
            raise ConfigError("--percentile-metrics", f"{name!r} is none of {', '.join(METRICS)}")
    return names


def percentiles_of(given: str) -> tuple[float, ...]:
    """--metric-percentiles 50,99. Raises ConfigError."""
    found = []
    for text in given.split(","):
        value = number(text)
        if not 0 <= value <= 100:
            raise ConfigError("--metric-percentiles", f"{text!r} is not a number from 0 to 100")
        found.append(value)
    return tuple(found)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def rate(text: str) -> float:
    """A number above 0; "inf" is one."""
    return math.inf if number(text) == math.inf else positive(text)


def percentile(text: str) -> float:
    value = positive(text)
    if value > 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 100")
    return value


def _json_object(text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value
