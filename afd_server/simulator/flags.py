"""The flags of `afd simulate`, and what a value that makes no sense is told.

What lives here: flags and their checks. What does not: what is made of them (command.py). Flags that `afd serve` has mean what they
mean there, those of `vllm bench serve` what they mean there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from afd_server.command_line import Parser, not_negative, positive, whole
from afd_server.config import MAX_MICRO_BATCHES, ServeConfig, flag
from afd_server.errors import ConfigError
from afd_server.planner.inputs import MODELS, add_workload_flags
from afd_server.simulator.scenario import Detail, Kill, Resize

# Settings of the server that a simulation depends on.
SERVE_SETTINGS = (
    "attention_workers", "ffn_workers", "ffn_replicas", "ffn_parallel", "max_num_seqs", "max_num_batched_tokens", "max_model_len",
    "enable_chunked_prefill", "tpot_sla_ms", "ttft_sla_ms", "max_queue_len", "ffn_timeout", "drain_timeout",
)  # fmt: skip
# An estimate: of a request of 8 tokens 11 ms were not its step, on two busy cores where steps took twice their usual time.
FRONT_END_MS = 5.0
STUDIES = ("ratio", "undivided", "ffn-loss", "lockstep")


def parser() -> Parser:
    parser = Parser(
        prog="afd simulate",
        description="A deployment in simulated time: this server's own router, admission and scheduler, against workers that are a\n"
        f"model of their times. MODEL_OR_CONFIG, as for `afd plan`, is {MODELS}.",
    )
    parser.add_argument("model", metavar="MODEL_OR_CONFIG")
    _add_layout(parser.add_argument_group("layout, as in afd serve"))
    _add_cards(parser.add_argument_group("cards, as in afd plan"))
    _add_demand(parser.add_argument_group("what clients ask for"))
    _add_disturbances(parser.add_argument_group("what happens to workers"))
    _add_run(parser.add_argument_group("the run"))
    return parser


def _add_layout(group: argparse._ArgumentGroup) -> None:
    settings = {setting.name: setting for setting in fields(ServeConfig)}
    for name in SERVE_SETTINGS:
        _add_setting(group, settings[name])
    choices = ("auto", *map(str, range(1, MAX_MICRO_BATCHES + 1)))
    group.add_argument(
        "--micro-batches", choices=choices, default="auto", help="in flight; auto: by simulated times"
    )
    group.add_argument("--wire-dtype", choices=("fp8", "bfloat16", "float32"), default="bfloat16", help="default: %(default)s")  # fmt: skip


def _add_setting(group: argparse._ArgumentGroup, setting: Field[Any]) -> None:
    kind = str(setting.type).split(" ")[0]
    converter: Callable[[str], Any] = {"int": int, "float": float, "str": str, "bool": bool}[kind]
    shown = "" if setting.default is None else f". Default: {setting.default}"
    common: dict[str, Any] = {
        "dest": setting.name, "default": argparse.SUPPRESS, "help": f"{setting.metadata['help']}{shown}",
    }  # fmt: skip
    if kind == "bool":
        group.add_argument(flag(setting.name), action=argparse.BooleanOptionalAction, **common)
    else:
        metavar = {"int": "N", "float": "NUMBER", "str": "TEXT"}[kind]
        group.add_argument(flag(setting.name), type=converter, metavar=metavar, **common)


def _add_cards(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--attention-card",
        default="h800",
        metavar="CARD",
        help="of each attention worker. Default: %(default)s",
    )
    add("--ffn-card", default="h800", metavar="CARD", help="of each FFN worker. Default: %(default)s")
    add_workload_flags(group)


def _add_demand(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--request-rate", type=positive, metavar="R", help="requests a second, at random times")
    add("--burstiness", type=positive, default=1.0, metavar="B", help="1: Poisson; below it in bursts. Default: %(default)g")  # fmt: skip
    add("--max-concurrency", type=whole, metavar="N", help="so many clients instead, each asking again when it is answered")  # fmt: skip
    add("--trace", type=Path, metavar="FILE", help="requests of a CSV file instead: Azure's LLM traces or BurstGPT")  # fmt: skip
    add("--trace-speed", type=positive, default=1.0, metavar="X", help="of the trace. Default: %(default)g")
    lengths = "tokens: N, uniform:LOW:HIGH or lognormal:MEAN:CV. Default: %(default)s"
    add("--input-len", default="lognormal:1024:1", metavar="DIST", help=lengths)
    add("--output-len", default="lognormal:256:1", metavar="DIST", help=lengths)
    add("--duration", type=positive, default=60.0, metavar="S", help="seconds of traffic. Default: %(default)g")
    add("--front-end-ms", type=not_negative, default=FRONT_END_MS, metavar="MS", help="of a request's way to its replica and its first "
        "token's way back: HTTP, text, the control channel. Default: %(default)g")  # fmt: skip
    add("--seed", type=int, default=0, help="of all that is drawn. Default: %(default)s")


def _add_disturbances(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--mtbf-hours", type=positive, metavar="H", help="mean time between failures of one GPU. Default: none fail")  # fmt: skip
    add("--attention-restart", type=positive, default=60.0, metavar="S", help="until a lost or new one serves. Default: %(default)g")  # fmt: skip
    add("--ffn-restart", type=positive, default=60.0, metavar="S", help="default: %(default)g")
    add("--kill", type=kill, action="append", default=[], metavar="AT:NAME", help="as in 30:ffn-0; may be given again")  # fmt: skip
    add("--slow", type=slow, action="append", default=[], metavar="NAME=X", help="as in attention-3=1.5: times of a worker; may be given again")  # fmt: skip
    add("--resize", type=resize, action="append", default=[], metavar="AT:WHAT=N", help="as in 30:attention-workers=4 or 30:ffn-replicas=2; may be given again")  # fmt: skip


def _add_run(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--detail", choices=tuple(map(str, Detail)), default="auto", help="hops: every call is an event; steps: a step is, which is an estimate; "
        "auto: hops where they are few; lockstep, undivided: for comparison. Default: %(default)s")  # fmt: skip
    add("--warm-up", type=not_negative, metavar="S", help="at first, which results leave out. Default: a fifth")
    add(
        "--study",
        choices=STUDIES,
        help="a question answered by many runs, as a table and with --plot a picture",
    )
    add("--json", action="store_true", help="print JSON only")
    add("--plot", type=Path, metavar="DIR", help="write pictures there as PNG and SVG; needs matplotlib")


# --- values --------------------------------------------------------------------------------------------------------


def kill(text: str) -> Kill:
    at, _, name = text.partition(":")
    return Kill(_moment(at, text), _worker(name, text))


def slow(text: str) -> tuple[str, float]:
    name, _, factor = text.partition("=")
    return _worker(name, text), positive(factor or "0")


def resize(text: str) -> Resize:
    at, _, change = text.partition(":")
    what, _, number = change.partition("=")
    if what not in ("attention-workers", "ffn-replicas") or not number.isdigit() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not AT:attention-workers=N or AT:ffn-replicas=N")
    return Resize(_moment(at, text), **{what.replace("-", "_"): int(number)})


def _moment(at: str, text: str) -> float:
    try:
        return positive(at)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} does not begin with seconds and a colon") from None


def _worker(name: str, text: str) -> str:
    role, _, index = name.rpartition("-")
    if role not in ("attention", "ffn") or not index.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} names no worker as in attention-0 or ffn-0")
    return name


def check_workers(names: list[str], config: ServeConfig, what: str) -> None:
    """Raises ConfigError for a worker that the layout does not have."""
    for name in names:
        role, _, index = name.rpartition("-")
        count = config.attention_workers if role == "attention" else config.ffn_workers
        if int(index) >= count:
            raise ConfigError(what, f"there is no {name}", f"the last is {role}-{count - 1}")
