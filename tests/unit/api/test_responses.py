"""/v1/responses, through OpenAI's own client where it says more than the JSON does."""

import json

import openai
import pytest

from afd_server.text.chat_template import ChatTemplate
from afd_server.types import FinishReason
from tests.unit.api.scripted_service import TOKENIZER, ScriptedService, client_for, openai_client, post, says

WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "name": "get_weather", "parameters": WEATHER}
CALL = '[{"name": "get_weather", "parameters": {"city": "Rome"}}]'


def named_events(response):
    """(name, data) of each event."""
    found = []
    for block in response.text.split("\n\n"):
        if block:
            name, data = block.split("\n")
            found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


async def test_a_text_is_answered():
    service = ScriptedService(says("Hello"))
    client = openai_client(service)
    answer = await client.responses.create(
        model="tiny", input="hi", instructions="be kind", max_output_tokens=9
    )
    assert answer.status == "completed"
    assert answer.output_text == "Hello"
    assert answer.usage.output_tokens == 6
    assert answer.usage.total_tokens == answer.usage.input_tokens + 6
    request = service.requests[0]
    assert request.sampling.max_tokens == 9


async def test_what_max_output_tokens_cuts_off_is_incomplete():
    answer = await post(
        ScriptedService(says("He", FinishReason.LENGTH)), "/v1/responses", input="hi", max_output_tokens=2
    )
    body = answer.json()
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


async def test_the_stream_ends_in_the_whole_answer():
    script = says("Hello", cached_tokens=2)
    whole = (await post(ScriptedService(script), "/v1/responses", input="hi")).json()
    streamed = named_events(await post(ScriptedService(script), "/v1/responses", input="hi", stream=True))
    names = [name for name, _ in streamed]
    assert names[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert names[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert [data["sequence_number"] for _, data in streamed] == list(range(len(streamed)))
    assert all(data["type"] == name for name, data in streamed)
    deltas = [data["delta"] for name, data in streamed if name == "response.output_text.delta"]
    assert "".join(deltas) == "Hello"
    (begun,) = [data["part"] for name, data in streamed if name == "response.content_part.added"]
    assert begun["text"] == ""
    last = streamed[-1][1]["response"]
    assert last["output"][0]["content"] == whole["output"][0]["content"]
    assert last["usage"] == whole["usage"]


async def test_the_clients_own_reader_follows_the_stream():
    client = openai_client(ScriptedService(says(CALL)), max_model_len=1024)
    async with client.responses.stream(
        model="tiny", input="hi", tools=[TOOL], tool_choice="required"
    ) as stream:
        kinds = {event.type async for event in stream}
        final = await stream.get_final_response()
    assert {"response.function_call_arguments.delta", "response.function_call_arguments.done"} <= kinds
    (call,) = [item for item in final.output if item.type == "function_call"]
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Rome"})


async def test_a_conversation_is_given_back_with_its_calls():
    service = ScriptedService(says("21"))
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Rome?"}]},
        {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
    ]
    answer = await post(service, "/v1/responses", {"max_model_len": 1024}, input=items)
    assert answer.status_code == 200
    prompt = TOKENIZER.decode(service.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert prompt == "<user>Rome?<|end|><assistant><|end|><tool>sunny<|end|><assistant>"


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("store", True, "store"),
        ("previous_response_id", "resp_1", "previous_response_id"),
        ("background", True, "background"),
        ("input", [{"type": "item_reference", "id": "x"}], "input.0"),
        ("max_output_tokens", 10**6, "max_output_tokens"),
        ("truncation", "auto", "truncation"),
        ("nonsense", 1, "nonsense"),
    ],
)
async def test_what_cannot_be_had_is_refused_by_name(field, value, param):
    answer = await post(ScriptedService(says("x")), "/v1/responses", **{"input": "hi", field: value})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert param.split(".")[0] in error["message"]


async def test_a_failure_in_the_stream_is_its_last_event():
    script = [*says("He", None), RuntimeError("broken")]
    streamed = named_events(await post(ScriptedService(script), "/v1/responses", input="hi", stream=True))
    name, data = streamed[-1]
    assert name == "response.failed"
    assert data["response"]["status"] == "failed"


async def test_errors_reach_the_client_as_their_types():
    client = openai_client(ScriptedService(says("x")))
    with pytest.raises(openai.NotFoundError):
        await client.responses.create(model="another", input="hi")


def logprobs_told(response):
    """Of the deltas of a stream, and of the whole answer that it ends in."""
    streamed = named_events(response)
    deltas = [
        each for name, data in streamed if name == "response.output_text.delta" for each in data["logprobs"]
    ]
    (part,) = streamed[-1][1]["response"]["output"][0]["content"]
    return deltas, part["logprobs"]


async def test_the_log_probabilities_of_a_part_of_a_character_come_with_it():
    service = ScriptedService(says("aé!", FinishReason.LENGTH, logprob=-1.0))
    deltas, whole = logprobs_told(await post(service, "/v1/responses", input="hi", top_logprobs=1, stream=True))
    assert deltas == whole
    assert [byte for each in whole for byte in each["bytes"]] == list("aé!".encode())


async def test_log_probabilities_are_told_once_where_text_is_held_back_to_the_end():
    service = ScriptedService(says("a <", FinishReason.LENGTH, step=3, logprob=-1.0))
    settings = {"tool_call_parser": "hermes"}
    response = await post(
        service, "/v1/responses", settings, input="hi", top_logprobs=1, stream=True, tools=[TOOL]
    )
    deltas, whole = logprobs_told(response)
    assert deltas == whole
    assert [byte for each in whole for byte in each["bytes"]] == list(b"a <")


async def test_the_id_is_the_whole_id_of_the_request():
    async with client_for(ScriptedService(says("a"))) as client:
        answer = await client.post("/v1/responses", json={"input": "hi"}, headers={"X-Request-Id": "one-1"})
    assert answer.json()["id"] == "resp_one-1"
    assert answer.json()["output"][0]["id"] == "msg_one-1_0"


async def test_a_refusal_keeps_its_sentence_and_names_the_clients_field():
    settings = {"chat_template": ChatTemplate("{{ raise_exception('no') }}")}
    answer = await post(ScriptedService(says("a")), "/v1/responses", settings, input="hi")
    error = answer.json()["error"]
    assert (error["message"], error["param"]) == (
        "the model's chat template refuses these messages: no", "input"
    )  # fmt: skip
