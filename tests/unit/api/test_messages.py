"""Anthropic's /v1/messages, through Anthropic's own client."""

import anthropic
import httpx2
import pytest

from afd_server.types import FinishReason
from tests.unit.api.scripted_service import ScriptedService, app_for, client_for, says
from tests.unit.api.scripted_service import post as post_to

WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"name": "get_weather", "input_schema": WEATHER}
CALL = '[{"name": "get_weather", "parameters": {"city": "Rome"}}]'
MESSAGES = [{"role": "user", "content": "hi"}]


def anthropic_client(service, **settings):
    """The client brings an HTTP library of its own."""
    app = app_for(service, **{"max_model_len": 1024, **settings})
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    http = httpx2.AsyncClient(transport=transport, base_url="http://test")
    return anthropic.AsyncAnthropic(base_url="http://test", api_key="k", max_retries=0, http_client=http)


async def post(service, path, **body):
    return await post_to(service, path, {"max_model_len": 1024}, **body)


async def test_a_message_is_answered():
    client = anthropic_client(ScriptedService(says("Hello", cached_tokens=3)))
    answer = await client.messages.create(model="tiny", max_tokens=9, messages=MESSAGES, system="be kind")
    assert [block.text for block in answer.content] == ["Hello"]
    assert (answer.stop_reason, answer.usage.output_tokens) == ("end_turn", 6)
    assert answer.usage.cache_read_input_tokens == 3
    assert answer.id.startswith("msg_")


async def test_a_text_is_streamed_from_its_first_letter_on():
    client = anthropic_client(ScriptedService(says("Hello")))
    async with client.messages.stream(model="tiny", max_tokens=9, messages=MESSAGES) as stream:
        streamed = [text async for text in stream.text_stream]
        final = await stream.get_final_message()
    assert streamed == list("Hello")
    assert final.content[0].text == "Hello"


@pytest.mark.parametrize(
    ("script", "asked", "reason", "sequence"),
    [
        (says("He", FinishReason.LENGTH), {}, "max_tokens", None),
        (says("Hello. More"), {"stop_sequences": ["."]}, "stop_sequence", "."),
        (says(CALL), {"tools": [TOOL], "tool_choice": {"type": "any"}}, "tool_use", None),
    ],
)
async def test_the_reason_to_stop(script, asked, reason, sequence):
    client = anthropic_client(ScriptedService(script))
    answer = await client.messages.create(model="tiny", max_tokens=60, messages=MESSAGES, **asked)
    assert (answer.stop_reason, answer.stop_sequence) == (reason, sequence)


async def test_the_stream_says_what_the_whole_answer_says():
    asked = {"tools": [TOOL], "tool_choice": {"type": "any"}}
    whole = await anthropic_client(ScriptedService(says(CALL))).messages.create(
        model="tiny", max_tokens=60, messages=MESSAGES, **asked
    )
    client = anthropic_client(ScriptedService(says(CALL)))
    async with client.messages.stream(model="tiny", max_tokens=60, messages=MESSAGES, **asked) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_message()
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert [(block.name, block.input) for block in final.content] == [("get_weather", {"city": "Rome"})]
    assert [(block.name, block.input) for block in whole.content] == [("get_weather", {"city": "Rome"})]
    assert final.usage.output_tokens == whole.usage.output_tokens


async def test_results_of_tools_go_back():
    service = ScriptedService(says("sunny"))
    use = {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Rome"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "21"}]}
    conversation = [*MESSAGES, {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    answer = await anthropic_client(service).messages.create(model="tiny", max_tokens=9, messages=conversation)
    assert answer.content[0].text == "sunny"


async def test_tokens_are_counted_without_generating():
    service = ScriptedService(says("x"))
    client = anthropic_client(service)
    counted = await client.messages.count_tokens(model="tiny", messages=MESSAGES)
    assert not service.requests
    answer = await client.messages.create(model="tiny", max_tokens=9, messages=MESSAGES)
    assert counted.input_tokens == answer.usage.input_tokens


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]}, "messages.0"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
async def test_what_cannot_be_had_is_refused_in_anthropics_form(change, word):
    body = {"model": "tiny", "max_tokens": 9, "messages": MESSAGES, **change}
    answer = await post(ScriptedService(says("x")), "/v1/messages", **body)
    assert answer.status_code == 400
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert word in answer.json()["error"]["message"]


async def test_errors_reach_the_client_as_their_types():
    with pytest.raises(anthropic.NotFoundError) as caught:
        await anthropic_client(ScriptedService(says("x"))).messages.create(
            model="another", max_tokens=1, messages=MESSAGES
        )
    assert caught.value.body["error"]["type"] == "not_found_error"


async def test_a_failure_in_the_stream_is_an_error_event():
    client = anthropic_client(ScriptedService([*says("He", None), RuntimeError("broken")]))
    stream = await client.messages.create(model="tiny", max_tokens=9, messages=MESSAGES, stream=True)
    with pytest.raises(anthropic.APIStatusError, match="log"):
        [event async for event in stream]


async def test_anthropics_header_carries_the_key():
    settings = {"api_key": "k"}
    answer = await anthropic_client(ScriptedService(says("x")), **settings).messages.create(
        model="tiny", max_tokens=9, messages=MESSAGES
    )
    assert answer.content[0].text == "x"
    async with client_for(ScriptedService(says("x")), **settings) as client:
        refused = await client.post("/v1/messages", json={}, headers={"x-api-key": "wrong"})
    assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
