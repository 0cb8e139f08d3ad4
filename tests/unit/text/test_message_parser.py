from afd_server.config import REASONING_PARSERS, TOOL_CALL_PARSERS
from afd_server.text.message import Function, WholeMessage
from afd_server.text.message_parser import MessageFormat
from afd_server.text.reasoning import FORMATS
from afd_server.text.tool_calls.registry import PARSERS, SIGNS

FUNCTIONS = (Function("f"), Function("g"))
CALLS = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call><tool_call>{"name": "g"}</tool_call>'


def parse(text, step=1, **form):
    parser = MessageFormat(functions=FUNCTIONS, **form).parser()
    pieces = [text[at : at + step] for at in range(0, len(text), step)]
    return WholeMessage.of([*(parser.feed(piece) for piece in pieces), parser.finish()])


def calls_of(message):
    return [(call.name, call.arguments) for call in message.calls]


def test_the_flags_name_what_there_is():
    assert set(TOOL_CALL_PARSERS) == {"auto", "none", *PARSERS} >= {name for _, name in SIGNS}
    assert set(REASONING_PARSERS) == {"auto", "none", *FORMATS}


def test_without_a_format_all_is_content():
    text = "<think>a</think>" + CALLS
    assert parse(text).content == text


def test_calls_are_looked_for_after_the_reasoning_only():
    form = {"reasoning_parser": "qwen3", "tool_call_parser": "hermes", "reads_calls": "auto"}
    text = f"I could {CALLS}\n</think>\n\nLet me see.\n{CALLS}"
    for step in (1, 7, 1000):
        message = parse(text, step, prompt_tail="<think>\n", **form)
        assert message.reasoning == f"I could {CALLS}"
        assert (message.content, calls_of(message)) == ("Let me see.", [("f", '{"a": 1}'), ("g", "{}")])


def test_reasoning_can_be_left_out():
    assert parse("<think>a</think>b", reasoning_parser="qwen3", shows_reasoning=False) == WholeMessage("b")


def test_calls_can_be_held_to_one():
    message = parse(CALLS, tool_call_parser="hermes", reads_calls="auto", most_calls=1)
    assert calls_of(message) == [("f", '{"a": 1}')]


def test_required_calls():
    text = '[{"name": "f", "parameters": {"a": [1]}}, {"name": "g", "parameters": {}}]'
    for step in (1, 5, 1000):
        assert calls_of(parse(text, step, reads_calls="required")) == [("f", '{"a": [1]}'), ("g", "{}")]
    cut = parse(text[:36], reads_calls="required")
    assert calls_of(cut) == [("f", '{"a": [')]
    assert parse("no", reads_calls="required") == WholeMessage("no")


def test_a_named_call():
    text = '{"a": "}"}'
    assert calls_of(parse(text, reads_calls="named")) == [("f", text)]
    assert calls_of(parse("", reads_calls="named")) == [("f", "")]


def test_ids_look_as_the_model_wants_them():
    (call,) = parse("{}", reads_calls="named", tool_call_parser="mistral").calls
    assert len(call.id) == 9 and call.id.isalnum()
    (call,) = parse("{}", reads_calls="named", tool_call_parser="hermes").calls
    assert call.id.startswith("chatcmpl-tool-")


def test_marks_are_those_of_what_is_looked_for():
    assert MessageFormat(tool_call_parser="hermes").marks == ()
    form = MessageFormat(reasoning_parser="qwen3", tool_call_parser="hermes", reads_calls="auto")
    assert set(form.marks) == {"<think>", "</think>", "<tool_call>", "</tool_call>"}
