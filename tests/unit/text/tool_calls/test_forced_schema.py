import json

import pytest
from llguidance import LLMatcher, LLTokenizer

from afd_server.text.message import Function
from afd_server.text.message_parser import MessageFormat
from afd_server.text.tool_calls.forced_schema import forced_schema

BYTES = LLTokenizer("byte")


def place(kind):
    """A schema that refers to one of its own, under a name that another function's schema has, too."""
    return {
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/Place"}},
        "required": ["at"],
        "additionalProperties": False,
        "$defs": {"Place": {"type": kind}},
    }


FUNCTIONS = (Function("go", place("string")), Function("dial", place("integer")), Function("now"))


def follows(text, functions=FUNCTIONS, **form):
    schema = forced_schema(MessageFormat(functions=functions, **form))
    matcher = LLMatcher(BYTES, LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    assert not matcher.get_error()
    return matcher.try_consume_tokens(list(text.encode())) == len(text.encode()) and matcher.is_accepting()


def calls(*named):
    return json.dumps([{"name": name, "parameters": arguments} for name, arguments in named])


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (calls(("go", {"at": "home"})), True),
        (calls(("dial", {"at": 110})), True),
        (calls(("go", {"at": "home"}), ("now", {}), ("dial", {"at": 1})), True),
        (calls(("dial", {"at": "home"})), False),
        (calls(("go", {"at": 110})), False),
        (calls(("go", {})), False),
        (calls(("away", {})), False),
        ("[]", False),
        ("Hello", False),
    ],
)
def test_required_calls(text, right):
    assert follows(text, reads_calls="required") == right


def test_one_call_only():
    text = calls(("now", {}), ("now", {}))
    assert follows(text, reads_calls="required")
    assert not follows(text, reads_calls="required", most_calls=1)
    assert follows(calls(("now", {})), reads_calls="required", most_calls=1)


def test_a_named_call():
    assert follows('{"at": "home"}', reads_calls="named")
    assert not follows('{"at": "home", "more": 1}', reads_calls="named")
    assert not follows("[]", (Function("now"),), reads_calls="named")


def test_a_schema_that_is_too_deep():
    deep = {}
    for _ in range(500):
        deep = {"items": deep}
    with pytest.raises(ValueError, match="deep"):
        forced_schema(MessageFormat(functions=(Function("f", deep),), reads_calls="required"))
