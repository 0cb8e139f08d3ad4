"""Whatever a body holds, the answer is a completion or a refusal in OpenAI's form, and the server goes on."""

import asyncio
import json
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd_server.api import admission
from afd_server.api.protocol.chat import ChatCompletionRequest, Message
from afd_server.api.protocol.generation import CompletionRequest
from tests.unit.api.scripted_service import ScriptedService, client_for, post, says

JSON_HEADERS = {"content-type": "application/json"}
ROUTES = {"/v1/completions": CompletionRequest, "/v1/chat/completions": ChatCompletionRequest}
VALID = {
    "/v1/completions": {"prompt": "hi"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
}

# --- any value of any field ------------------------------------------------------------------------------------------

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
    | st.sampled_from([10**400, -(10**30), 2**63, 1e308, "\ud800", "x" * 2000, "", float("nan"), float("inf"), "\x00"])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=12
)  # fmt: skip
IDS = st.lists(st.integers(-2, 300), max_size=70)
MESSAGES = st.lists(
    st.dictionaries(st.sampled_from(sorted(Message.model_fields)), VALUES, max_size=4), max_size=3
)
LIKELY = {
    "prompt": st.text(max_size=80) | IDS | st.lists(st.text(max_size=9) | IDS, max_size=4),
    "messages": MESSAGES | st.lists(st.just({"role": "user", "content": "hi"}), max_size=3),
    "stop": st.lists(st.text(max_size=9), max_size=9), "n": st.integers(-1, 200), "logprobs": st.integers(-1, 25) | st.booleans(),
    "top_logprobs": st.integers(-1, 25), "max_tokens": st.integers(-1, 70), "seed": st.integers(), "stream": st.booleans(),
    "logit_bias": st.dictionaries(st.integers(-1, 300).map(str), st.floats(), max_size=3), "echo": st.booleans(),
    "stream_options": st.dictionaries(st.sampled_from(["include_usage", "continuous_usage_stats"]), st.booleans()),
    "chat_template_kwargs": st.dictionaries(st.sampled_from(["messages", "x", "add_generation_prompt"]), VALUES),
}  # fmt: skip


@st.composite
def bodies(draw):
    path = draw(st.sampled_from(sorted(ROUTES)))
    fields = draw(
        st.lists(st.sampled_from(sorted(ROUTES[path].model_fields)) | st.text(max_size=9), max_size=4)
    )
    body = {name: draw(LIKELY.get(name, VALUES) | VALUES) for name in fields}
    return path, {**VALID[path], **body} if draw(st.booleans()) else body


def checked(response, may_fail=()):
    if response.status_code == 200:
        return
    assert response.status_code in (400, 404, 413, *may_fail), response.text
    error = response.json()["error"]
    assert error["message"] and set(error) == {"message", "type", "param", "code"}


@settings(max_examples=120, deadline=None)
@given(bodies())
def test_any_value_of_any_field(case):
    path, body = case

    async def run():
        service = ScriptedService(says("a", logprob=-0.5))
        async with client_for(service) as client:
            content = json.dumps(body).encode("utf-8", "surrogatepass")
            checked(await client.post(path, content=content, headers=JSON_HEADERS))
        assert len(service.closed) == len(service.requests)

    asyncio.run(run())


MUTATIONS = st.tuples(st.sampled_from(["put", "cut", "double"]), st.integers(0, 400), st.binary(max_size=6))


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(sorted(ROUTES)), st.lists(MUTATIONS, max_size=4))
def test_any_bytes(path, mutations):
    content = bytearray(
        json.dumps({**VALID[path], "stop": ["x", "é"], "logit_bias": {"3": -1.5e1}, "user": None}).encode()
    )
    for kind, place, data in mutations:
        place %= len(content) + 1
        if kind == "put":
            content[place : place + len(data)] = data
        elif kind == "cut":
            del content[place : place + 5]
        else:
            content[place:place] = content[place : place + 20]

    async def run():
        async with client_for(ScriptedService(says("a"))) as client:
            checked(await client.post(path, content=bytes(content), headers=JSON_HEADERS))

    asyncio.run(run())


# --- findings, and what was feared -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt": "hi", "temperature": NaN}', b'{"prompt": "hi", "temperature": 1e999}', b'{"prompt": "hi", "top_p": -Infinity}',
        b'{"prompt": "hi", "seed": ' + b"9" * 5000 + b"}", b'{"prompt": [' + b"9" * 4000 + b"]}", b'{"prompt": "hi", "n": 1e9}',
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"x": ' * 50_000 + b"1" + b"}" * 50_000, b'\xef\xbb\xbf{"prompt": "hi"', b'{"prompt": "\xff"}', b'{"prompt": "\xed\xa0\x80"}',
        '{"prompt": "hi"'.encode("utf-16"), b'{"prompt": "hi", "logit_bias": {"1": NaN}}', b'{"prompt": "hi"} x', b"\x00" * 1000,
    ],
)  # fmt: skip
async def test_what_is_no_json_or_no_number(content):
    async with client_for(ScriptedService(says("a"))) as client:
        response = await client.post("/v1/completions", content=content, headers=JSON_HEADERS)
    assert response.status_code == 400
    checked(response)


async def test_of_a_key_given_twice_the_last_counts():
    """As every JSON reader of Python's does, so that a proxy in front which checks bodies sees what is served."""
    service = ScriptedService(says("a"))
    async with client_for(service) as client:
        content = b'{"prompt": "hi", "max_tokens": 3, "max_tokens": 4}'
        assert (await client.post("/v1/completions", content=content, headers=JSON_HEADERS)).status_code == 200
    assert service.requests[0].sampling.max_tokens == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop", ["x"] * 10_000),
        ("stop", ["x" * 2000]),
        ("stop_token_ids", list(range(200)) * 10),
        ("logit_bias", {str(i): 1 for i in range(2000)}),
        ("n", 129),
        ("logprobs", 21),
        ("prompt", ["hi"] * 2049),
        ("prompt", [[1] * 60] * 2048),
    ],
)
async def test_more_than_is_taken(field, value, monkeypatch):
    monkeypatch.setattr(admission, "MAX_PROMPT_TOKENS_IN_ALL", 100_000)
    service = ScriptedService(says("a"))
    response = await post(service, **{"prompt": "hi", field: value})
    assert (response.status_code, response.json()["error"]["param"].split(".")[0]) == (400, field)
    assert service.requests == []


async def test_choices_of_a_long_prompt_are_counted_together(monkeypatch):
    """Each of them carries the prompt to the worker over a channel that all requests share."""
    monkeypatch.setattr(admission, "MAX_PROMPT_TOKENS_IN_ALL", 1000)
    service = ScriptedService(says("a"))
    response = await post(service, prompt="x" * 40, n=26)
    assert "1040 tokens in all prompts of all choices; at most 1000" in response.json()["error"]["message"]
    assert (await post(service, prompt="x" * 40, n=25)).status_code == 200


async def longest_turn(work):
    """How long the event loop let nobody else run while it did this."""
    longest, stop = 0.0, asyncio.Event()

    async def watch():
        nonlocal longest
        while not stop.is_set():
            began = time.perf_counter()
            await asyncio.sleep(0)
            longest = max(longest, time.perf_counter() - began)

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0)
    result = await work
    stop.set()
    await watching
    return longest, result


def large_bodies():
    size = 4_100_000
    rng = random.Random(0)
    ids = [rng.randrange(257) for _ in range(size // 5)]
    message = {"role": "user", "content": ""}
    return {
        "token ids": ("/v1/completions", {"prompt": ids}),
        "prompts of token ids": ("/v1/completions", {"prompt": [ids[:400]] * 2000}),
        "short prompts": ("/v1/completions", {"prompt": ["a"] * (size // 5)}),
        "messages": ("/v1/chat/completions", {"messages": [message] * (size // 35)}),
        "parts": ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * (size // 29)}]}),
        "metadata": ("/v1/completions", {"prompt": "hi", "metadata": [{}] * (size // 4)}),
        "variables": ("/v1/chat/completions", {"messages": [message], "chat_template_kwargs": {"x": ["a"] * (size // 5)}}),
        "biases": ("/v1/completions", {"prompt": "hi", "logit_bias": {str(i): 1 for i in range(size // 12)}}),
        "unknown fields": ("/v1/completions", {f"f{i}": 1 for i in range(size // 12)}),
    }  # fmt: skip


@pytest.mark.parametrize("name", large_bodies())
async def test_a_large_body_is_no_long_pause_for_the_others(name):
    """Some tenths of a second on an idle machine; the bound is far above, and far below what it was without its limits."""
    path, body = large_bodies()[name]
    content = json.dumps(body, separators=(",", ":")).encode()
    async with client_for(ScriptedService(says("a"))) as client:
        pause, response = await longest_turn(client.post(path, content=content, headers=JSON_HEADERS))
    assert response.status_code in (200, 400)
    assert pause < 10
