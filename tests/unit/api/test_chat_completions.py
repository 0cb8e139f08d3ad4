import pytest

from tests.unit.api.scripted_service import (
    TOKENIZER,
    ScriptedService,
    client_for,
    events,
    openai_client,
    post,
    says,
)

HELLO = [{"role": "user", "content": "Hello"}]


async def ask(service, messages=HELLO, settings=None, **body):
    return await post(service, "/v1/chat/completions", settings, messages=messages, **body)


def prompt_of(service):
    return TOKENIZER.decode(service.requests[0].prompt_token_ids, skip_special_tokens=False)


async def test_a_whole_answer():
    service = ScriptedService(says("Hi, wörld"))
    answer = await openai_client(service).chat.completions.create(model="tiny", messages=HELLO)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        "assistant",
        "Hi, wörld",
        "stop",
    )
    assert prompt_of(service) == "<user>Hello<|end|><assistant>"
    assert answer.usage.prompt_tokens == len(service.requests[0].prompt_token_ids)
    assert answer.id.startswith("chatcmpl-")


async def test_a_stream():
    stream = await openai_client(ScriptedService(says("ö!"))).chat.completions.create(
        model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert [delta.role for delta in deltas] == ["assistant", None, None, None]
    assert [delta.content for delta in deltas] == ["", "ö", "!", None]
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 4


async def test_every_choice_of_a_stream_opens_with_its_role():
    response = await ask(ScriptedService(says("a"), says("b")), n=2, stream=True)
    opened = {}
    for chunk in events(response):
        choice = chunk["choices"][0]
        opened.setdefault(choice["index"], choice["delta"])
    assert opened == {i: {"role": "assistant", "content": ""} for i in (0, 1)}


async def test_logprobs():
    service = ScriptedService(says("ö", logprob=-0.25))
    answer = await openai_client(service).chat.completions.create(
        model="tiny", messages=HELLO, logprobs=True, top_logprobs=2
    )
    first, second, end = answer.choices[0].logprobs.content
    assert (first.bytes, second.bytes, end.token) == ([0xC3], [0xB6], "<|end|>")
    assert (first.logprob, len(first.top_logprobs), first.top_logprobs[0].bytes) == (-0.25, 2, [0xC3])
    assert service.requests[0].sampling.logprobs == 2


async def test_token_ids_are_returned():
    service = ScriptedService(says("a"))
    answer = (await ask(service, return_token_ids=True)).json()
    assert answer["prompt_token_ids"] == list(service.requests[0].prompt_token_ids)
    assert answer["choices"][0]["token_ids"] == [TOKENIZER.encode("a")[0], 256]
    chunks = events(await ask(service, return_token_ids=True, stream=True))
    assert chunks[0]["prompt_token_ids"] == answer["prompt_token_ids"]
    returned = [token_id for chunk in chunks for token_id in chunk["choices"][0].get("token_ids", [])]
    assert returned == answer["choices"][0]["token_ids"]


async def test_text_parts_are_lines():
    service = ScriptedService(says("a"))
    await ask(service, [{"role": "user", "content": [{"type": "text", "text": t} for t in ("one", "two")]}])
    assert prompt_of(service) == "<user>one\ntwo<|end|><assistant>"


async def test_the_final_message_is_continued():
    service = ScriptedService(says("a"))
    await ask(service, [*HELLO, {"role": "assistant", "content": "Hi "}], continue_final_message=True)
    assert prompt_of(service) == "<user>Hello<|end|><assistant>Hi "


async def test_the_answer_of_a_client_library_can_be_sent_back():
    service = ScriptedService(says("a"))
    client = openai_client(service)
    answer = await client.chat.completions.create(model="tiny", messages=HELLO)
    await client.chat.completions.create(model="tiny", messages=[*HELLO, answer.choices[0].message, *HELLO])
    assert len(service.requests) == 2


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({}, 64 - 19), ({"max_tokens": 5}, 5), ({"max_completion_tokens": 6, "max_tokens": 5}, 6)],
)
async def test_a_chat_may_use_the_rest_of_the_context(fields, expected):
    service = ScriptedService(says("a"))
    await ask(service, [{"role": "user", "content": "H"}], **fields)
    assert len(service.requests[0].prompt_token_ids) == 19
    assert service.requests[0].sampling.max_tokens == expected


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("messages", {"messages": []}),
        ("messages.0.role", {"messages": [{"role": "robot", "content": ""}]}),
        ("messages.0.content", {"messages": [{"role": "user"}]}),
        ("messages.0.content", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        (
            "messages.0.tool_calls.0.function",
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
        ),
        ("top_logprobs", {"top_logprobs": 3}),
        ("max_completion_tokens", {"max_completion_tokens": 60}),
        ("max_completion_tokens", {"max_completion_tokens": 0}),
        ("top_logprobs", {"top_logprobs": 21, "logprobs": True}),
        ("tools", {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        ("tool_choice", {"tool_choice": "required"}),
        ("guided_json", {"guided_json": {"type": "object"}}),
        ("chat_template", {"chat_template": "x"}),
        ("add_generation_prompt", {"add_generation_prompt": True, "continue_final_message": True}),
    ],
)
async def test_refused_by_name(field, body):
    response = (
        await ask(ScriptedService(says("a")), **body)
        if "messages" not in body
        else await post(ScriptedService(says("a")), "/v1/chat/completions", **body)
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field


async def test_a_model_without_a_template():
    async with client_for(ScriptedService(says("a")), chat_template=None) as client:
        response = await client.post("/v1/chat/completions", json={"messages": HELLO})
    assert response.status_code == 400
    assert "chat template" in response.json()["error"]["message"]
