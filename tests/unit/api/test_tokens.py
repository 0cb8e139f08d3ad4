"""/tokenize and /detokenize, which tell what a prompt is before it is sent; /load and /ping."""

import asyncio

import pytest

from afd_server.types import FinishReason
from tests.unit.api.scripted_service import EOS, TOKENIZER, ScriptedService, client_for, post, says

CHAT = [{"role": "user", "content": "hö"}]
RENDERED = "<user>hö<|end|><assistant>"


async def test_a_text():
    answer = await post(ScriptedService(), "/tokenize", prompt="hö<|end|>", model="tiny")
    ids = [*TOKENIZER.encode("hö"), EOS]
    assert answer.json() == {"count": 4, "max_model_len": 64, "tokens": ids, "token_strs": None}


async def test_a_chat_is_what_the_chat_route_would_run():
    service = ScriptedService(says("x"))
    answer = (await post(service, "/tokenize", messages=CHAT, return_token_strs=True)).json()
    assert answer["tokens"] == TOKENIZER.encode(RENDERED)
    assert answer["token_strs"] == [TOKENIZER.id_to_token(token_id) for token_id in answer["tokens"]]
    await post(service, "/v1/chat/completions", messages=CHAT)
    assert service.requests[0].prompt_token_ids == tuple(answer["tokens"])
    fields = {"add_generation_prompt": False, "chat_template_kwargs": {"x": 1}}
    answer = (await post(service, "/tokenize", messages=CHAT, **fields)).json()
    assert TOKENIZER.decode(answer["tokens"], skip_special_tokens=False) == "<user>hö<|end|>"
    answer = (await post(service, "/tokenize", messages=CHAT, continue_final_message=True)).json()
    assert TOKENIZER.decode(answer["tokens"]) == "<user>hö"


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("prompt", {}),
        ("prompt", {"prompt": "a", "messages": CHAT}),
        ("prompt", {"prompt": 3}),
        ("messages.0.role", {"messages": [{"content": "a"}]}),
        ("add_generation_prompt", {"prompt": "a", "add_generation_prompt": True}),
        ("chat_template", {"messages": CHAT, "chat_template": "x"}),
        ("nonsense", {"prompt": "a", "nonsense": 1}),
    ],
)
async def test_what_cannot_be_tokenized(field, body):
    response = await post(ScriptedService(), "/tokenize", **body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)
    assert (await post(ScriptedService(), "/tokenize", prompt="a", model="other")).status_code == 404


@pytest.mark.parametrize("text", ["", "hö", "hö<|end|>\n"])
async def test_there_and_back(text):
    tokens = (await post(ScriptedService(), "/tokenize", prompt=text)).json()["tokens"]
    assert (await post(ScriptedService(), "/detokenize", tokens=tokens)).json() == {"prompt": text}


@pytest.mark.parametrize("tokens", [[257], [-1], [1.5], [True], ["a"], "a", None, [2**70]])
async def test_what_is_no_token(tokens):
    response = await post(ScriptedService(), "/detokenize", tokens=tokens)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tokens")


async def test_long_texts_are_the_same_elsewhere():
    text = "long " * 5000
    tokens = (await post(ScriptedService(), "/tokenize", prompt=text)).json()["tokens"]
    assert tokens == TOKENIZER.encode(text)
    assert (await post(ScriptedService(), "/detokenize", tokens=tokens)).json() == {"prompt": text}


async def test_the_tokenizers_configuration_is_told_where_the_operator_wants_it():
    async with client_for(ScriptedService()) as client:
        assert (await client.get("/tokenizer_info")).status_code == 404
    async with client_for(ScriptedService(), tokenizer_info={"tokenizer_class": "Fast"}) as client:
        assert (await client.get("/tokenizer_info")).json() == {"tokenizer_class": "Fast"}


async def test_load_counts_requests_until_they_are_answered():
    release = asyncio.Event()
    service = ScriptedService([*says("ab", FinishReason.LENGTH)[:1], release, *says("b")])
    async with client_for(service) as client:
        asked = [
            asyncio.create_task(client.post("/v1/completions", json={"prompt": "hi", "stream": stream}))
            for stream in (False, True)
        ]
        async with asyncio.timeout(10):
            while len(service.requests) < 2:
                await asyncio.sleep(0)
        assert (await client.get("/load")).json() == {"server_load": 2}
        release.set()
        await asyncio.gather(*asked)
        assert (await client.get("/load")).json() == {"server_load": 0}
        assert (await client.post("/v1/completions", json={})).status_code == 400
        assert (await client.get("/load")).json() == {"server_load": 0}


async def test_what_may_be_done_with_ping_is_told_whole():
    async with client_for(ScriptedService()) as client:
        response = await client.delete("/ping")
    assert (response.status_code, set(response.headers["allow"].split(", "))) == (405, {"GET", "POST"})


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_ping_is_health_by_another_name(method):
    service = ScriptedService()
    async with client_for(service) as client:
        assert (await client.request(method, "/ping")).status_code == 200
        service.serving, service.problems = False, ["gone"]
        response = await client.request(method, "/ping")
        assert (response.status_code, response.json()["error"]["message"]) == (503, "gone")
