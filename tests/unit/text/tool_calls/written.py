"""How a model writes a message in each format: what the parsers are held to."""

import json

from afd_server.text.message import Function

FUNCTIONS = (
    Function(
        "get_weather",
        {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "exact": {"type": "boolean"},
                "share": {"type": ["number", "null"]},
                "where": {"anyOf": [{"type": "object"}, {"type": "null"}]},
                "tags": {"type": "array", "items": {"type": "string"}},
            },
        },
    ),
    Function("now"),
)


def as_json(value):
    return json.dumps(value, ensure_ascii=False)


def hermes(calls):
    return "\n".join(
        f'<tool_call>\n{{"name": {as_json(name)}, "arguments": {as_json(arguments)}}}\n</tool_call>'
        for name, arguments in calls
    )


def mistral_list(calls):
    return "[TOOL_CALLS] " + as_json([{"name": name, "arguments": arguments} for name, arguments in calls])


def mistral_named(calls):
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{as_json(arguments)}" for name, arguments in calls)


def mistral_without_args(calls):
    return "".join(f"[TOOL_CALLS]{name}{as_json(arguments)}" for name, arguments in calls)


def mistral_with_ids(calls):
    return "".join(
        f"[TOOL_CALLS]{name}[CALL_ID]abcdefghi[ARGS]{as_json(arguments)}" for name, arguments in calls
    )


def deepseek_v3(calls):
    written = [
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{as_json(arguments)}\n```<｜tool▁call▁end｜>"
        for name, arguments in calls
    ]
    return "<｜tool▁calls▁begin｜>" + "\n".join(written) + "<｜tool▁calls▁end｜>"


def deepseek_v31(calls):
    written = [
        f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{as_json(arguments)}<｜tool▁call▁end｜>"
        for name, arguments in calls
    ]
    return "<｜tool▁calls▁begin｜>" + "".join(written) + "<｜tool▁calls▁end｜>"


def in_tags(value):
    return value if isinstance(value, str) else as_json(value)


def step3(calls):
    written = []
    for name, arguments in calls:
        parameters = "\n".join(
            f'<steptml:parameter name="{key}">{in_tags(value)}</steptml:parameter>'
            for key, value in arguments.items()
        )
        written.append(
            f'<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="{name}">\n{parameters}</steptml:invoke>'
            "<｜tool_call_end｜>"
        )
    return "<｜tool_calls_begin｜>\n" + "\n".join(written) + "\n<｜tool_calls_end｜>"


def qwen3_coder(calls):
    written = []
    for name, arguments in calls:
        parameters = "".join(
            f"<parameter={key}>\n{in_tags(value)}\n</parameter>\n" for key, value in arguments.items()
        )
        written.append(f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>")
    return "\n".join(written)


def llama3_json(calls):
    return "; ".join(as_json({"name": name, "parameters": arguments}) for name, arguments in calls)


def llama3_tagged(calls):
    return "<|python_tag|>" + llama3_json(calls)


def pythonic(calls):
    written = [
        f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
        for name, arguments in calls
    ]
    return "[" + ", ".join(written) + "]"


def pythonic_tagged(calls):
    return "<|python_start|>" + pythonic(calls) + "<|python_end|>"


# (parser name, writer, whether content may stand before the calls)
WRITERS = {
    "hermes": ("hermes", hermes, True),
    "mistral, one list": ("mistral", mistral_list, True),
    "mistral, a name each": ("mistral", mistral_named, True),
    "mistral, without ARGS": ("mistral", mistral_without_args, True),
    "mistral, with ids": ("mistral", mistral_with_ids, True),
    "deepseek_v3": ("deepseek_v3", deepseek_v3, True),
    "deepseek_v31": ("deepseek_v31", deepseek_v31, True),
    "step3": ("step3", step3, True),
    "qwen3_coder": ("qwen3_coder", qwen3_coder, True),
    "llama3_json": ("llama3_json", llama3_json, False),
    "llama3_json, tagged": ("llama3_json", llama3_tagged, True),
    "pythonic": ("pythonic", pythonic, False),
    "pythonic, tagged": ("llama4_pythonic", pythonic_tagged, True),
}
