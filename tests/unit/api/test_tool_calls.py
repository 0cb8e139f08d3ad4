"""Tools and reasoning on the chat route, as the openai client sees them."""

import json

import openai
import pytest
from llguidance import LLMatcher, LLTokenizer
from pydantic import BaseModel

from afd_server.text.chat_template import ChatTemplate
from tests.unit.api.running_server import Running
from tests.unit.api.scripted_service import TOKENIZER, ScriptedService, events, openai_client, post, says

TEMPLATE = ChatTemplate(
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }} {{ c.id }}]{% endfor %}"
    "{{ m.tool_call_id }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking %}<think>{% endif %}{% endif %}"
)
SETTINGS = {
    "chat_template": TEMPLATE,
    "max_model_len": 2048,
    "tool_call_parser": "hermes",
    "reasoning_parser": "qwen3",
}
HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells it.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
CALLS = (
    '<think>\nWhere?\n</think>\n\nLet me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)
EXPECTED = [("get_weather", '{"city": "Köln"}'), ("now", "{}")]


def prompt_of(service):
    return TOKENIZER.decode(service.requests[0].prompt_token_ids, skip_special_tokens=False)


async def ask(service, settings=None, **body):
    body = {"messages": HELLO, **body}
    return await post(service, "/v1/chat/completions", {**SETTINGS, **(settings or {})}, **body)


async def create(service, settings=None, **body):
    client = openai_client(service, **{**SETTINGS, **(settings or {})})
    return await client.chat.completions.create(model="tiny", **{"messages": HELLO, **body})


async def test_calls_of_a_whole_answer():
    service = ScriptedService(says(CALLS))
    answer = await create(service, tools=[WEATHER, NOW])
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert (choice.message.content, choice.message.reasoning, choice.message.reasoning_content) == (
        "Let me see.", "Where?", "Where?",
    )  # fmt: skip
    calls = choice.message.tool_calls
    assert [(call.function.name, call.function.arguments) for call in calls] == EXPECTED
    assert len({call.id for call in calls}) == 2
    assert prompt_of(service) == f"{json.dumps(WEATHER)}\n{json.dumps(NOW)}\n<user>Hello<assistant>"


@pytest.mark.parametrize("step", [1, 3, 1000])
async def test_calls_of_a_stream(step):
    stream = await create(
        ScriptedService(says(CALLS, step=step)),
        tools=[WEATHER, NOW],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(choice.delta.content or "" for choice in choices) == "Let me see."
    assert "".join(getattr(choice.delta, "reasoning", "") for choice in choices) == "Where?"
    calls = {}
    for delta in (call for choice in choices for call in choice.delta.tool_calls or []):
        if delta.id is not None:
            assert delta.type == "function" and delta.index == len(calls)
            calls[delta.index] = [delta.function.name, ""]
        calls[delta.index][1] += delta.function.arguments
    assert [tuple(call) for call in calls.values()] == EXPECTED
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["tool_calls"]
    assert chunks[-1].usage.completion_tokens == len(TOKENIZER.encode(CALLS)) + 1
    assert not [choice for choice in choices[1:-1] if not choice.delta.model_dump(exclude_none=True)]


async def test_every_choice_has_calls_of_its_own():
    whole = (await ask(ScriptedService(says(CALLS), says("No.")), tools=[WEATHER, NOW], n=2)).json()
    assert [choice["finish_reason"] for choice in whole["choices"]] == ["tool_calls", "stop"]
    assert whole["choices"][1]["message"] == {"role": "assistant", "content": "No.", "refusal": None}
    chunks = events(
        await ask(ScriptedService(says(CALLS), says("No.")), tools=[WEATHER, NOW], n=2, stream=True)
    )
    ends = {chunk["choices"][0]["index"]: chunk["choices"][0]["finish_reason"] for chunk in chunks}
    assert ends == {0: "tool_calls", 1: "stop"}


async def test_logprobs_lose_no_token_where_text_is_held_back():
    chunks = events(
        await ask(ScriptedService(says(CALLS, logprob=-0.5)), tools=[WEATHER], stream=True, logprobs=True)
    )
    reported = [entry for chunk in chunks[1:] for entry in chunk["choices"][0]["logprobs"]["content"]]
    assert len(reported) == len(TOKENIZER.encode(CALLS)) + 1


def follows(service, text):
    """Whether the constraint that the worker was given allows this output, and no more after it."""
    constraint = service.requests[0].sampling.constraint
    matcher = LLMatcher(LLTokenizer("byte"), constraint)
    return matcher.try_consume_tokens(list(text.encode())) == len(text.encode()) and matcher.is_accepting()


REQUIRED = '[{"name": "get_weather", "parameters": {"city": "Köln"}}, {"name": "now", "parameters": {}}]'


@pytest.mark.parametrize("thought", ["", "<think>\nhm\n</think>\n\n"])
async def test_calls_that_are_required(thought):
    body = {"tools": [WEATHER, NOW], "tool_choice": "required"}
    service = ScriptedService(says(thought + REQUIRED))
    (choice,) = (await create(service, NO_TOOLS, **body)).choices
    assert follows(service, thought + REQUIRED) and not follows(service, "Hello")
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    calls = choice.message.tool_calls
    assert [(call.function.name, call.function.arguments) for call in calls] == EXPECTED
    stream = await create(ScriptedService(says(thought + REQUIRED)), NO_TOOLS, stream=True, **body)
    deltas = [call async for chunk in stream for call in chunk.choices[0].delta.tool_calls or []]
    assert [delta.function.name for delta in deltas if delta.id] == ["get_weather", "now"]
    assert "".join(delta.function.arguments for delta in deltas) == "".join(
        arguments for _, arguments in EXPECTED
    )
    service = ScriptedService(says(REQUIRED))
    await create(service, parallel_tool_calls=False, **body)
    assert not follows(service, REQUIRED) and follows(service, '[{"name": "now", "parameters": {}}]')


async def test_a_call_of_the_function_that_is_named():
    body = {"tools": [WEATHER, NOW], "tool_choice": {"type": "function", "function": {"name": "get_weather"}}}
    service = ScriptedService(says('{"city": "Köln"}'))
    (choice,) = (await create(service, NO_TOOLS, **body)).choices
    assert follows(service, '{"city": "Köln"}') and not follows(service, "{}")
    (call,) = choice.message.tool_calls
    assert (call.function.name, call.function.arguments) == EXPECTED[0]
    assert (choice.finish_reason, choice.message.content) == ("stop", None)


async def test_reasoning_before_an_answer_of_a_wanted_form():
    service = ScriptedService(says('hm</think>{"a": 1}'))
    body = {"response_format": {"type": "json_object"}, "chat_template_kwargs": {"enable_thinking": True}}
    message = (await ask(service, **body)).json()["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("hm", '{"a": 1}')
    assert follows(service, 'hm</think>{"a": 1}') and not follows(service, '{"a": 1}')


class GetWeather(BaseModel):
    city: str


async def test_the_clients_own_helpers_over_a_real_connection():
    text = '<tool_call>{"name": "GetWeather", "arguments": {"city": "Köln"}}</tool_call>'
    tool = openai.pydantic_function_tool(GetWeather)
    async with Running(ScriptedService(says(text)), **SETTINGS) as running:
        client = openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="k", max_retries=0)
        parsed = await client.chat.completions.parse(model="tiny", messages=HELLO, tools=[tool])
        (call,) = parsed.choices[0].message.tool_calls
        assert call.function.parsed_arguments == GetWeather(city="Köln")
        async with client.chat.completions.stream(model="tiny", messages=HELLO, tools=[tool]) as stream:
            kinds = {event.type async for event in stream}
            final = await stream.get_final_completion()
        assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
        (call,) = final.choices[0].message.tool_calls
        assert call.function.parsed_arguments == GetWeather(city="Köln")
        await client.close()


async def test_the_answer_and_the_tools_words_can_be_sent_back():
    service = ScriptedService(says(CALLS))
    client = openai_client(service, **SETTINGS)
    answer = await client.chat.completions.create(model="tiny", messages=HELLO, tools=[WEATHER, NOW])
    first, second = answer.choices[0].message.tool_calls
    service.requests.clear()
    chat = [
        *HELLO,
        answer.choices[0].message,
        {"role": "tool", "tool_call_id": first.id, "content": "rain"},
        {"role": "tool", "tool_call_id": second.id, "content": [{"type": "text", "text": "noon"}]},
    ]
    await client.chat.completions.create(model="tiny", messages=chat)
    assert prompt_of(service) == (
        f'<user>Hello<assistant>(Where?)Let me see.[get_weather {{"city": "Köln"}} {first.id}][now {{}} {second.id}]'
        f"<tool>rain{first.id}<tool>noon{second.id}<assistant>"
    )


async def test_past_arguments_as_the_template_wants_them():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    chat = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]
    as_text = ChatTemplate(
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ 'call ' + c.function.arguments }}{% endfor %}{% endfor %}"
    )
    service = ScriptedService(says("a"))
    assert (await ask(service, {"chat_template": as_text}, messages=chat)).status_code == 200
    assert prompt_of(service) == 'Hellocall {"a": 1}'
    call["function"]["arguments"] = "no JSON"
    service = ScriptedService(says("a"))
    assert (await ask(service, messages=chat)).status_code == 200
    assert '[f "no JSON" 1]' in prompt_of(service)


async def test_no_call_is_looked_for_where_none_is_wanted():
    for body in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        service = ScriptedService(says(CALLS))
        message = (await ask(service, **body)).json()["choices"][0]["message"]
        assert message["content"] == CALLS.partition("</think>\n\n")[2]
        assert ("get_weather" in prompt_of(service)) == bool(body)
    service = ScriptedService(says("a"))
    await ask(service, {"exclude_tools_when_tool_choice_none": True}, tools=[WEATHER], tool_choice="none")
    assert "get_weather" not in prompt_of(service)


async def test_calls_can_be_held_to_one():
    answer = (await ask(ScriptedService(says(CALLS)), tools=[WEATHER, NOW], parallel_tool_calls=False)).json()
    assert len(answer["choices"][0]["message"]["tool_calls"]) == 1


async def test_a_call_that_is_cut_off_ends_for_its_length():
    from afd_server.types import FinishReason

    text = '<tool_call>{"name": "now", "arguments": {"a'
    choice = (await ask(ScriptedService(says(text, FinishReason.LENGTH)), tools=[NOW])).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "now", "arguments": '{"a'}


@pytest.mark.parametrize(
    ("variables", "text", "expected"),
    [
        ({}, "<think>\nhm\n</think>\n\nHi", ("hm", "Hi")),
        ({"enable_thinking": True}, "hm\n</think>\n\nHi", ("hm", "Hi")),
        ({"enable_thinking": True}, "hm", ("hm", None)),
        ({}, "Hi", (None, "Hi")),
    ],
)
async def test_reasoning_is_split_off(variables, text, expected):
    body = {"chat_template_kwargs": variables}
    message = (await ask(ScriptedService(says(text)), **body)).json()["choices"][0]["message"]
    assert (message.get("reasoning"), message["content"]) == expected
    deltas = [
        chunk["choices"][0]["delta"]
        for chunk in events(await ask(ScriptedService(says(text)), stream=True, **body))
    ]
    streamed = [
        "".join(delta.get(name, "") for delta in deltas)
        for name in ("reasoning", "reasoning_content", "content")
    ]
    assert streamed == [expected[0] or "", expected[0] or "", expected[1] or ""]


async def test_reasoning_can_be_left_out():
    body = {"include_reasoning": False}
    message = (await ask(ScriptedService(says("<think>hm</think>Hi")), **body)).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "Hi", "refusal": None}


@pytest.mark.parametrize(("effort", "thinks"), [("none", False), ("low", True), ("high", True)])
async def test_the_effort_of_reasoning_is_the_templates_switch(effort, thinks):
    service = ScriptedService(says("a"))
    assert (await ask(service, reasoning_effort=effort)).status_code == 200
    assert prompt_of(service).endswith("<think>") == thinks


async def test_the_effort_of_reasoning_is_the_templates_own():
    service = ScriptedService(says("a"))
    template = ChatTemplate("{{ messages[0].content }} {{ reasoning_effort }}")
    await ask(service, {"chat_template": template}, reasoning_effort="medium")
    assert prompt_of(service) == "Hello medium"


BROKEN = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "text"}}}}}
NO_TOOLS = {"chat_template": ChatTemplate("{{ messages[0].content }}"), "tool_call_parser": None}


@pytest.mark.parametrize(
    ("field", "settings", "body"),
    [
        ("tools", NO_TOOLS, {"tools": [NOW]}),
        ("tools", {"tool_call_parser": None}, {"tools": [NOW]}),
        ("tools", {"enable_auto_tool_choice": False}, {"tools": [NOW]}),
        ("tools.0.type", {}, {"tools": [{"type": "custom", "function": {"name": "f"}}]}),
        ("tools.0.function.name", {}, {"tools": [{"type": "function", "function": {"name": ""}}]}),
        ("tools.1.function.extra", {}, {"tools": [NOW, {"type": "function", "function": {"name": "f", "extra": 1}}]}),
        ("tool_choice", {}, {"tool_choice": "required"}),
        ("tool_choice", {}, {"tools": [NOW], "tool_choice": "any"}),
        ("tool_choice", {}, {"tools": [NOW], "tool_choice": "required", "response_format": {"type": "json_object"}}),
        ("tools.1.function.parameters", {}, {"tools": [NOW, BROKEN], "tool_choice": "required"}),
        ("tools.1.function.parameters", {}, {"tools": [NOW, BROKEN], "tool_choice": {"type": "function", "function": {"name": "f"}}}),
        ("tool_choice", {}, {"tools": [NOW], "tool_choice": {"type": "allowed_tools"}}),
        ("tool_choice", {}, {"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "later"}}}),
        ("reasoning_effort", {}, {"reasoning_effort": "much"}),
        ("reasoning_effort", NO_TOOLS, {"reasoning_effort": "high"}),
        ("reasoning_effort", NO_TOOLS, {"reasoning_effort": "none"}),
        ("messages.0.tool_call_id", {}, {"messages": [{"role": "tool", "content": "a"}]}),
        ("messages.0.tool_call_id", {}, {"messages": [{"role": "user", "content": "a", "tool_call_id": "1"}]}),
        ("messages.0.content", {}, {"messages": [{"role": "assistant", "content": None}]}),
        ("tools", {}, {"tools": [NOW] * 1025}),
        ("messages.0.tool_calls", {}, {"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f"}}] * 1025}]}),
        ("messages.0.tool_calls", {}, {"messages": [{"role": "user", "content": "a", "tool_calls": [{"id": "1", "function": {"name": "f"}}]}]}),
    ],
)  # fmt: skip
async def test_refused_by_name(field, settings, body):
    response = await ask(ScriptedService(says("a")), settings, **body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field


@pytest.mark.parametrize("choice", ["auto", "required"])
@pytest.mark.parametrize("levels", [100, 300, 900])
async def test_a_schema_of_many_levels_is_no_failure(levels, choice):
    deep = {}
    for _ in range(levels):
        deep = {"items": deep}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": deep}}}}
    response = await ask(ScriptedService(says("a")), tools=[tool], tool_choice=choice)
    assert response.status_code in (200, 400), response.text


async def test_a_refusal_says_what_would_do():
    response = await ask(ScriptedService(says("a")), NO_TOOLS, tools=[NOW])
    message = response.json()["error"]["message"]
    assert "chat template does not show them" in message and "required" in message
