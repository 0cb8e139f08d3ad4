"""The command line: `afd serve` and the other commands (COMMANDS, below).

What lives here: flags, the configuration file, and the one clear line that a mistake ends in (exit code 2). What does
not: anything that a command does. Each command imports its room only when it runs, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from afd_server import __version__
from afd_server.command_line import USAGE_ERROR, Parser
from afd_server.config import API_KEY_VARIABLE, ServeConfig, flag, settings_of
from afd_server.errors import ConfigError, ServingError, StartError

# The rooms of the house in the order in which a newcomer meets them, with what their flags are about.
ROOMS = {
    "model": "what is served",
    "api": "the HTTP front-end",
    "engine": "continuous batching on each attention worker",
    "kvcache": "the paged KV cache of each attention worker",
    "cluster": "the workers and where they run",
    "pipeline": "the way of the activations",
    "telemetry": "what the server tells of itself",
}
# What vLLM's users type for things that are done otherwise here.
HERE_CALLED = {
    "--gpu-memory-utilization": "--kv-cache-memory-bytes",
    "--tensor-parallel-size": "--ffn-parallel tp --ffn-workers N",
    "-tp": "--ffn-parallel tp --ffn-workers N",
    "--data-parallel-size": "--attention-workers",
    "-dp": "--attention-workers",
    "--enable-expert-parallel": "--ffn-parallel ep --ffn-workers N",
}
# Settings that the environment may hold.
VARIABLES = {API_KEY_VARIABLE: "api_key", "AFD_LOG_LEVEL": "log_level", "AFD_LOG_FORMAT": "log_format"}
MAX_LINE = 2000  # characters of a mistake's one line
MAX_CONFIG_FILE_BYTES = 64 * 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and gives its exit code: 0, 1 for a failure while running, 2 for a mistake of the caller."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog="afd", description="Large language models, every decoder layer split in two.")
    parser.add_argument("--version", action="version", version=f"afd-server {__version__}")
    parser.add_argument(
        "command", choices=sorted(COMMANDS), help="; ".join(f"{k}: {v[1]}" for k, v in COMMANDS.items())
    )
    chosen = parser.parse_args(arguments[:1])
    try:
        code = COMMANDS[chosen.command][0](arguments[1:])
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read what is printed has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ServingError as error:
        print(f"afd {chosen.command}: {_one_line(str(error))}", file=sys.stderr)
        return USAGE_ERROR if isinstance(error, StartError) else 1
    except KeyboardInterrupt:
        return 130


def _one_line(message: str) -> str:
    """What a file says may stand in a message: a page of it helps nobody, and a terminal must not obey it."""
    line = "".join(character if character.isprintable() else " " for character in message)
    line = " ".join(line.split())
    return line if len(line) <= MAX_LINE else f"{line[: MAX_LINE // 2]} ... {line[-MAX_LINE // 2 :]}"


# --- serve ---------------------------------------------------------------------------------------------------------


def serve_parser() -> Parser:
    """The flags of `afd serve`, made from the fields of ServeConfig and grouped by room."""
    parser = Parser(
        prog="afd serve",
        description="Serve MODEL to OpenAI clients, split between attention and FFN workers.\n"
        "Flags that vLLM has too carry vLLM's names.",
        called_here=HERE_CALLED,
    )
    parser.add_argument(
        "model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL",
        help="a Hugging Face directory, or a hub name where the network allows; 'default' (SmolLM2-135M-Instruct) "
        "and 'default-moe' (the same, upcycled to 8 experts) are made on first use. Default: default",
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE", help="YAML file with the same keys; flags given here win")
    groups = {room: parser.add_argument_group(room, about) for room, about in ROOMS.items()}
    for setting in fields(ServeConfig):
        if setting.name != "model":
            _add_flag(groups[setting.metadata["room"]], setting)
    return parser


def _add_flag(group: argparse._ArgumentGroup, setting: Field[Any]) -> None:
    help_text = setting.metadata["help"]
    if setting.default is not None:
        help_text += f". Default: {'on' if setting.default is True else 'off' if setting.default is False else setting.default}"
    common: dict[str, Any] = {
        "default": argparse.SUPPRESS,
        "help": help_text.replace("%", "%%"),
        "dest": setting.name,
    }
    kind = str(setting.type).split(" ")[0]
    if kind == "bool":
        group.add_argument(flag(setting.name), action=argparse.BooleanOptionalAction, **common)
        return
    converter: Callable[[str], Any] = {"int": int, "float": float, "str": str}[kind]
    choices = setting.metadata["choices"] or None
    unit = "MS" if setting.name.endswith("_ms") else "SECONDS"
    metavar = None if choices else {"int": "N", "float": unit, "str": setting.name.split("_")[-1].upper()}[kind]
    group.add_argument(flag(setting.name), type=converter, choices=choices, metavar=metavar, **common)


def parse_serve(argv: Sequence[str]) -> ServeConfig:
    """Flags over the file of --config over the environment over the defaults.

    Raises ConfigError; exits with 2 on a mistyped flag.
    """
    given = vars(serve_parser().parse_args(list(argv)))
    path = given.pop("config", None)
    from_environment = {
        name: os.environ[variable] for variable, name in VARIABLES.items() if variable in os.environ
    }
    for name in ("log_level", "log_format"):
        if name in from_environment:
            from_environment[name] = from_environment[name].lower()
    from_file = {} if path is None else settings_of(_read_config_file(Path(path)), source=path)
    return ServeConfig(**{**from_environment, **from_file, **given})


def _read_config_file(path: Path) -> dict[str, Any]:
    """A mapping of keys to single values; anything else that YAML can say is refused before it is built."""
    import yaml

    try:
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG_FILE_BYTES + 1)
        if len(content) > MAX_CONFIG_FILE_BYTES:
            raise ConfigError("--config", f"{path} is larger than {MAX_CONFIG_FILE_BYTES} bytes")
        root = yaml.compose(content.decode(), Loader=yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError("--config", f"{path} does not hold a mapping of keys to values")
        values: dict[str, Any] = {}
        for key_node, value_node in root.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or not isinstance(value_node, yaml.ScalarNode):
                raise ConfigError(str(path), f"line {line} does not give one key one value")
            if key_node.value in values:
                raise ConfigError(
                    str(path), f"{key_node.value!r} is given twice, the second time in line {line}"
                )
            values[key_node.value] = yaml.SafeLoader("").construct_object(value_node)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "--config", f"cannot read {path}: {getattr(error, 'strerror', None) or error}"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError("--config", f"{path} is not YAML: {error}") from error
    return values


def serve(argv: Sequence[str]) -> int:
    config = parse_serve(argv)
    os.environ.pop(API_KEY_VARIABLE, None)  # of no use to the processes that this one starts
    # Until the server sets its own handler: to be told to end is not a failure, also while it starts.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    began_s = time.monotonic()
    from afd_server.serving import run_server

    return run_server(config, began_s)


# --- the other commands --------------------------------------------------------------------------------------------


def chat(argv: Sequence[str]) -> int:
    parser = Parser(prog="afd chat", description="Talk to a running server in the terminal.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server. Default: %(default)s")
    parser.add_argument("--model", help="model name; default: the server's first")
    parser.add_argument(
        "--api-key",
        default=os.environ.get(API_KEY_VARIABLE),
        help=f"the key the server asks for. Default: {API_KEY_VARIABLE} in the environment",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=512, metavar="N", help="of one answer. Default: %(default)s"
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="default: the model's recommendation")
    given = parser.parse_args(list(argv))
    from afd_server.chat import run_chat

    sampling = {"max_tokens": given.max_tokens, "temperature": given.temperature}
    return run_chat(given.url, given.model, given.api_key, sampling)


def convert(argv: Sequence[str]) -> int:
    parser = Parser(prog="afd convert", description="Turn a GGUF file into a Hugging Face directory.")
    parser.add_argument("source", type=Path, metavar="IN", help="a .gguf file")
    parser.add_argument("out", type=Path, metavar="OUT", help="the directory to write; must not exist")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s"
    )
    given = parser.parse_args(list(argv))
    from afd_server.checkpoints.convert import convert

    convert(given.source, given.out, dtype=given.dtype)
    return 0


def upcycle(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="afd upcycle", description="Turn a dense Llama directory into a Mixtral of equal experts."
    )
    parser.add_argument("source", type=Path, metavar="IN", help="a Hugging Face directory of a dense Llama")
    parser.add_argument("out", type=Path, metavar="OUT", help="the directory to write; must not exist")
    parser.add_argument("--experts", type=int, default=8, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--top-k", type=int, default=2, metavar="K", help="experts per token. Default: %(default)s"
    )
    parser.add_argument("--noise", type=float, default=0.0, metavar="STD",
                        help="relative noise on each expert's weights; 0: the dense model's output. Default: %(default)s")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of router and noise. Default: %(default)s")
    given = parser.parse_args(list(argv))
    from afd_server.checkpoints.upcycle import upcycle

    upcycle(
        given.source, given.out, experts=given.experts, top_k=given.top_k, noise=given.noise, seed=given.seed
    )
    return 0


def _admin_parser(command: str, about: str) -> Parser:
    parser = Parser(prog=f"afd {command}", description=about)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server. Default: %(default)s")
    parser.add_argument("--api-key", help="the key the server asks for")
    return parser


def scale(argv: Sequence[str]) -> int:
    parser = _admin_parser("scale", "Add or remove workers of a running server. No request fails of it.")
    parser.add_argument("--attention-workers", type=int, metavar="N", help="how many there shall be")
    parser.add_argument(
        "--ffn-replicas", type=int, metavar="N", help="how many copies of the FFN side there shall be"
    )
    given = parser.parse_args(list(argv))
    names = ("attention_workers", "ffn_replicas")
    numbers = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    if not numbers:
        parser.error("give --attention-workers or --ffn-replicas")
    from afd_server.admin import change

    return change(given.url, given.api_key, "/admin/scale", numbers)


def restart(argv: Sequence[str]) -> int:
    about = "Give every worker of a running server a new process, one after the other. No request fails of it."
    given = _admin_parser("restart", about).parse_args(list(argv))
    from afd_server.admin import change

    return change(given.url, given.api_key, "/admin/restart", None)


def workers(argv: Sequence[str]) -> int:
    given = _admin_parser("workers", "Show the workers of a running server.").parse_args(list(argv))
    from afd_server.admin import show_workers

    return show_workers(given.url, given.api_key)


def key(argv: Sequence[str]) -> int:
    from afd_server.api.key_command import key_command

    return key_command(argv)


def bench(argv: Sequence[str]) -> int:
    from afd_server.bench.command import bench

    return bench(argv)


def plan(argv: Sequence[str]) -> int:
    from afd_server.planner.command import plan

    return plan(argv)


def simulate(argv: Sequence[str]) -> int:
    from afd_server.simulator.command import simulate

    return simulate(argv)


def top(argv: Sequence[str]) -> int:
    from afd_server.watching.command import top

    return top(argv)


def report(argv: Sequence[str]) -> int:
    from afd_server.watching.command import report

    return report(argv)


def trace(argv: Sequence[str]) -> int:
    from afd_server.watching.command import trace

    return trace(argv)


def profile(argv: Sequence[str]) -> int:
    from afd_server.profiling.command import profile

    return profile(argv)


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "serve": (serve, "start a server"),
    "workers": (workers, "show a running server's workers"),
    "scale": (scale, "add or remove them"),
    "restart": (restart, "renew them one by one"),
    "key": (key, "make an API key"),
    "top": (top, "watch it, once a second"),
    "report": (report, "which of its workers, layers or experts is slow"),
    "trace": (trace, "record every hop of its workers"),
    "bench": (bench, "measure any server under load"),
    "plan": (plan, "what a model costs, and the layout that suits it"),
    "simulate": (simulate, "a deployment under traffic and failures, in simulated time"),
    "profile": (profile, "measure a model's times on this machine, for plan, simulate and serve"),
    "chat": (chat, "talk to a running server"),
    "convert": (convert, "GGUF file to Hugging Face directory"),
    "upcycle": (upcycle, "dense checkpoint to mixture of experts"),
}
