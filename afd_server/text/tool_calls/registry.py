"""The formats of tool calls by vLLM's names, and which one a model's chat template is written for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module

from afd_server.text.tool_calls.parser import ToolCallParser, call_id, short_call_id

# Name -> (module, class); several names where models of several makers write alike.
PARSERS: Mapping[str, tuple[str, str]] = {
    "hermes": ("hermes", "HermesParser"),
    "llama3_json": ("llama", "Llama3JsonParser"),
    "llama4_json": ("llama", "Llama3JsonParser"),
    "pythonic": ("llama", "PythonicParser"),
    "llama4_pythonic": ("llama", "PythonicParser"),
    "mistral": ("mistral", "MistralParser"),
    "deepseek_v3": ("deepseek", "DeepSeekV3Parser"),
    "deepseek_v31": ("deepseek", "DeepSeekV31Parser"),
    "step3": ("xml_parameters", "Step3Parser"),
    "step3p5": ("xml_parameters", "Qwen3CoderParser"),
    "qwen3_coder": ("xml_parameters", "Qwen3CoderParser"),
}

# (all that the template's source holds, name); the first that fits is taken. Marks that only one format has go first.
SIGNS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("<steptml:",), "step3"),
    (("<｜tool▁call▁begin｜>", "```json"), "deepseek_v3"),
    (("<｜tool▁call▁begin｜>",), "deepseek_v31"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<tool_call>", "<function="), "qwen3_coder"),
    (("<tool_call>", "arguments"), "hermes"),
    (("<|python_start|>",), "llama4_pythonic"),
    (("func_name1(params_name1=",), "pythonic"),
    (("<|start_header_id|>", '"parameters": '), "llama3_json"),
)


def parser_class(name: str) -> type[ToolCallParser]:
    module, cls = PARSERS[name]
    parser: type[ToolCallParser] = getattr(import_module(f"afd_server.text.tool_calls.{module}"), cls)
    return parser


def id_maker(name: str | None) -> Callable[[], str]:
    """How the models of this format want a call's id to look."""
    return short_call_id if name == "mistral" else call_id


def format_of(template_source: str) -> str | None:
    """The name of the format that a chat template shows its model, as far as it can be told."""
    for signs, name in SIGNS:
        if all(sign in template_source for sign in signs):
            return name
    return None
