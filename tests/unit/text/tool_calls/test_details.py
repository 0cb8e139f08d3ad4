"""What models write that is not quite the format, and where a call begins and ends."""

import pytest

from afd_server.text.message import WholeMessage
from afd_server.text.tool_calls.registry import format_of, parser_class
from tests.unit.text.tool_calls.written import FUNCTIONS

DEEP = "[" * 2000 + "]" * 2000


def coder(parameter, value):
    return f"<tool_call><function=get_weather><parameter={parameter}>{value}</parameter></function></tool_call>"


def parse(name, text):
    parser = parser_class(name)(FUNCTIONS)
    message = WholeMessage.of([*(parser.feed(character) for character in text), parser.finish()])
    return message.content, [(call.name, call.arguments) for call in message.calls]


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"),
    [
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}, "x": [1]}</tool_call>b', "b", [("f", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>b', "b", [("f", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [1}}</tool_call>', "}</tool_call>", [("f", '{"a": [1')]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "x', "", [("f", '{"a": "x')]),
        ("hermes", '<tool_call>{"name": "f", "argum', '<tool_call>{"name": "f", "argum', []),
        ("hermes", '<tool_call>{"name": 1, "arguments": {}}', '<tool_call>{"name": 1, "arguments": {}}', []),
        ("hermes", '<tool_call>{"name": "\\ud800"}', '<tool_call>{"name": "\\ud800"}', []),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"\\ud800\\"}"}', "", [("f", '{"a": "\\ud800"}')]),
        ("hermes", f'<tool_call>{{"name": {DEEP}}}', f'<tool_call>{{"name": {DEEP}}}', []),
        ("hermes", '<tool_call>\n<tool_call>{"name": "f"}', "<tool_call>", [("f", "{}")]),
        ("hermes", "a <tool_ call> b ", "a <tool_ call> b ", []),
        ("llama3_json", '{"name": "unknown", "parameters": {}}', '{"name": "unknown", "parameters": {}}', []),
        ("llama3_json", '{"name": "now"}', '{"name": "now"}', []),
        ("llama3_json", 'So: {"name": "now", "parameters": {}}', 'So: {"name": "now", "parameters": {}}', []),
        ("llama3_json", '{"name": "now", "parameters": {}}; and so on', "; and so on", [("now", "{}")]),
        ("pythonic", "[now(), later()]", ", later()]", [("now", "{}")]),
        ("pythonic", "[get_weather(exact=true, tags=[null])]", "", [("get_weather", '{"exact": true, "tags": [null]}')]),
        ("pythonic", "[get_weather(open('x'))]", "[get_weather(open('x'))]", []),
        ("pythonic", "[1, 2]", "[1, 2]", []),
        ("pythonic", "[get_weather(share=1e999)]", "[get_weather(share=1e999)]", []),
        ("pythonic", "[get_weather(city='\\ud800')]", "", [("get_weather", '{"city": "\\ud800"}')]),
        ("qwen3_coder", coder("share", "NaN"), "", [("get_weather", '{"share": "NaN"}')]),
        ("qwen3_coder", coder("share", "1e999"), "", [("get_weather", '{"share": "1e999"}')]),
        ("qwen3_coder", coder("tags", DEEP), "", [("get_weather", f'{{"tags": "{DEEP}"}}')]),
        ("qwen3_coder", coder("tags", '["\\ud800"]'), "", [("get_weather", '{"tags": ["\\ud800"]}')]),
        ("mistral", "[TOOL_CALLS]no", "[TOOL_CALLS]no", []),
        ("mistral", '[TOOL_CALLS]f{"a": 1}', "", [("f", '{"a": 1}')]),
        ("deepseek_v31", "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜>", "", [("f", "{}")]),
        (
            "step3",
            '<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="get_weather">'
            '<steptml:parameter name="days">12</steptml:parameter><steptml:parameter name="city">Par',
            "",
            [("get_weather", '{"days": 12, "city": "Par')],
        ),
        (
            "step3",
            '<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="get_weather">'
            '<steptml:parameter name="days">many</steptml:parameter><steptml:parameter name="other">1</steptml:parameter>'
            "</steptml:invoke><｜tool_call_end｜>",
            "",
            [("get_weather", '{"days": "many", "other": "1"}')],
        ),
    ],
)  # fmt: skip
def test_what_is_a_call(name, text, content, calls):
    assert parse(name, text) == (content, calls)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("{{ tools }}", None),
        ('<tool_call>{"name": , "arguments": }</tool_call>', "hermes"),
        ("<tool_call><function=f><parameter=p>", "qwen3_coder"),
        ("[TOOL_CALLS]", "mistral"),
        ("<｜tool▁call▁begin｜>function<｜tool▁sep｜>\n```json", "deepseek_v3"),
        ("<｜tool▁call▁begin｜>name<｜tool▁sep｜>", "deepseek_v31"),
        ("<｜tool_call_begin｜><steptml:invoke", "step3"),
        ("<|start_header_id|>'\"parameters\": '", "llama3_json"),
        ("<|start_header_id|>[func_name1(params_name1=params_value1", "pythonic"),
        ("<|header_start|><|python_start|>", "llama4_pythonic"),
    ],
)
def test_which_format_a_template_is_written_for(source, name):
    assert format_of(source) == name
