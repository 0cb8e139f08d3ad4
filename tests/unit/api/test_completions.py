import asyncio
import json

import pytest

from afd_server.types import FinishReason, RequestOutput
from tests.unit.api.scripted_service import EOS, TOKENIZER, ScriptedService, events, openai_client, post, says


async def test_a_whole_answer():
    service = ScriptedService(says("Hello wörld", cached_tokens=1))
    answer = await openai_client(service).completions.create(model="tiny", prompt="hi", max_tokens=20)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.index, choice.logprobs) == (
        "Hello wörld",
        "stop",
        0,
        None,
    )
    assert (answer.object, answer.model) == ("text_completion", "tiny")
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 2, "completion_tokens": 13, "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 1},
    }  # fmt: skip


async def test_a_stream_holds_the_same_text_and_whole_characters():
    service = ScriptedService(says("🌍 wörld"))
    stream = await openai_client(service).completions.create(model="tiny", prompt="hi", stream=True)
    chunks = [chunk async for chunk in stream]
    assert [chunk.choices[0].text for chunk in chunks] == ["🌍", " ", "w", "ö", "r", "l", "d", ""]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 7 + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1


async def test_an_event_is_one_line_for_every_reader_of_lines():
    text = "a\x85b\u2028c\u2029d\x0be"
    response = await post(ScriptedService(says(text)), prompt="hi", stream=True)
    data = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert "".join(json.loads(line)["choices"][0]["text"] for line in data[:-1]) == text


@pytest.mark.parametrize("continuous", [False, True])
async def test_usage_in_a_stream(continuous):
    options = {"include_usage": True, "continuous_usage_stats": continuous}
    response = await post(ScriptedService(says("abc")), prompt="hi", stream=True, stream_options=options)
    *chunks, last = events(response)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 4
    seen = [chunk["usage"] and chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert seen == ([1, 2, 3, 4] if continuous else [None] * 4)


async def test_without_include_usage_no_chunk_mentions_it():
    response = await post(ScriptedService(says("abc")), prompt="hi", stream=True)
    assert all("usage" not in chunk for chunk in events(response))
    assert response.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [b"ab"]),
        (["ab", "c"], [b"ab", b"c"]),
        (TOKENIZER.encode("ab"), [b"ab"]),
        ([TOKENIZER.encode("ab"), TOKENIZER.encode("c")], [b"ab", b"c"]),
        (["ab", TOKENIZER.encode("c")], [b"ab", b"c"]),
    ],
)
async def test_prompts_as_text_ids_and_lists_of_either(prompt, expected):
    service = ScriptedService(says("x"))
    response = await post(service, prompt=prompt)
    assert response.status_code == 200
    prompts = [b"".join(map(TOKENIZER.token_bytes, request.prompt_token_ids)) for request in service.requests]
    assert sorted(prompts) == sorted(expected)
    assert response.json()["usage"]["prompt_tokens"] == sum(map(len, expected))


@pytest.mark.parametrize("stream", [False, True])
async def test_n_choices_of_each_prompt_in_order(stream):
    service = ScriptedService(*(says(f"answer {number}") for number in range(4)))
    response = await post(service, prompt=["a", "b"], n=2, seed=7, stream=stream)
    by_request = {r.request_id.split("-")[2]: (r.prompt_token_ids, r.sampling.seed) for r in service.requests}
    a, b = (tuple(TOKENIZER.encode(text)) for text in "ab")
    assert by_request == {"0": (a, 7), "1": (a, 8), "2": (b, 7), "3": (b, 8)}
    if stream:
        texts = {}
        for chunk in events(response):
            choice = chunk["choices"][0]
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        assert sorted(texts.items()) == [(i, f"answer {i}") for i in range(4)]
    else:
        assert [(c["index"], c["text"]) for c in response.json()["choices"]] == [
            (i, f"answer {i}") for i in range(4)
        ]
        assert response.json()["usage"]["prompt_tokens"] == 2


async def test_seeds_are_drawn_from_the_servers_seed():
    async def drawn(seed):
        service = ScriptedService(says("x"))
        await post(service, prompt="a", n=3, settings={"seed": seed})
        return [request.sampling.seed for request in service.requests]

    assert await drawn(1) == await drawn(1)
    assert len({*await drawn(1), *await drawn(2)}) == 6


@pytest.mark.parametrize("step", [1, 2, 5, 50])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_request_at_the_machine(step, stream):
    service = ScriptedService([*says("one END two", step=step), AssertionError("was not closed")])
    response = await post(service, prompt="hi", stop=["END", "x"], stream=stream)
    choices = [chunk["choices"][0] for chunk in (events(response) if stream else [response.json()])]
    assert "".join(choice["text"] for choice in choices) == "one "
    assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", "END")
    assert len(service.closed) == 1


async def test_the_stop_string_may_be_kept():
    response = await post(
        ScriptedService(says("one END")), prompt="hi", stop="ND", include_stop_str_in_output=True
    )
    assert response.json()["choices"][0]["text"] == "one END"


async def test_a_stop_string_counts_only_after_min_tokens():
    response = await post(ScriptedService(says("ab ab ab")), prompt="hi", stop="b", min_tokens=4, max_tokens=9)
    assert response.json()["choices"][0]["text"] == "ab a"


async def test_what_was_held_back_comes_at_the_end():
    response = await post(
        ScriptedService(says("one EN", FinishReason.LENGTH)), prompt="hi", stop="END", stream=True
    )
    choices = [chunk["choices"][0] for chunk in events(response)]
    assert (choices[-1]["text"], choices[-1]["finish_reason"]) == ("EN", "length")


async def test_a_stop_token_is_named_and_hidden():
    h = TOKENIZER.encode("h")[0]
    outputs = says("oh", FinishReason.LENGTH, step=2)
    ended = [type(outputs[0])("", outputs[0].token_ids, (), FinishReason.STOP, h)]
    body = {"prompt": "hi", "stop_token_ids": [h], "return_token_ids": True}
    choice = (await post(ScriptedService(ended), **body)).json()["choices"][0]
    assert (choice["text"], choice["stop_reason"], choice["token_ids"][-1]) == ("o", h, h)
    choice = (await post(ScriptedService(ended), **body, include_stop_str_in_output=True)).json()["choices"][0]
    assert choice["text"] == "oh"


async def test_token_ids_are_returned():
    service = ScriptedService(says("ö!"))
    ids = [*TOKENIZER.encode("ö!"), EOS]
    choice = (await post(service, prompt="hi", return_token_ids=True)).json()["choices"][0]
    assert (choice["token_ids"], choice["prompt_token_ids"]) == (ids, TOKENIZER.encode("hi"))
    chunks = events(await post(service, prompt="hi", return_token_ids=True, stream=True))
    assert [token_id for chunk in chunks for token_id in chunk["choices"][0]["token_ids"]] == ids
    assert [bool(chunk["choices"][0]["prompt_token_ids"]) for chunk in chunks] == [True, False, False, False]


async def test_legacy_logprobs():
    service = ScriptedService(says("aö", logprob=-0.5))
    answer = await openai_client(service).completions.create(model="tiny", prompt="hi", logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert service.requests[0].sampling.logprobs == 2
    assert logprobs.tokens == ["a", "\ufffd", "\ufffd", "<|end|>"]
    assert logprobs.token_logprobs == [-0.5] * 4
    assert logprobs.top_logprobs[0] == {"a": -0.5, TOKENIZER.token_text(3): -9.0}
    assert logprobs.text_offset == [0, 1, 2, 3]
    stream = events(await post(service, prompt="hi", logprobs=2, stream=True))
    assert [offset for chunk in stream for offset in chunk["choices"][0]["logprobs"]["text_offset"]] == [
        0,
        1,
        2,
        3,
    ]


async def test_tokens_as_token_ids():
    response = await post(
        ScriptedService(says("a", logprob=-0.5)), prompt="hi", logprobs=0, return_tokens_as_token_ids=True
    )
    assert response.json()["choices"][0]["logprobs"]["tokens"] == [
        f"token_id:{TOKENIZER.encode('a')[0]}",
        "token_id:256",
    ]


async def test_an_impossible_token_has_a_finite_logprob():
    response = await post(ScriptedService(says("a", logprob=float("-inf"))), prompt="hi", logprobs=0)
    assert response.json()["choices"][0]["logprobs"]["token_logprobs"][0] == -9999.0


@pytest.mark.parametrize("prompt", ["hi", TOKENIZER.encode("hi")])
async def test_echo(prompt):
    service = ScriptedService(says(" there"))
    assert (await post(service, prompt=prompt, echo=True)).json()["choices"][0]["text"] == "hi there"
    chunks = events(await post(service, prompt=prompt, echo=True, stream=True))
    assert chunks[0]["choices"][0]["text"] == "hi "


async def test_echo_alone_asks_nothing_of_the_machine():
    service = ScriptedService(says("x"))
    answer = (await post(service, prompt="hi", echo=True, max_tokens=0)).json()
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("hi", "length")
    assert answer["usage"]["completion_tokens"] == 0 and service.requests == []


async def test_choices_stand_in_order_whichever_ends_first():
    release = asyncio.Event()
    service = ScriptedService([release, *says("slow")], says("fast"))
    answer = asyncio.create_task(post(service, prompt="hi", n=2))
    async with asyncio.timeout(10):
        while not service.closed:
            await asyncio.sleep(0)
    release.set()
    assert [choice["text"] for choice in (await answer).json()["choices"]] == ["slow", "fast"]


async def test_cached_tokens_count_once_for_all_choices_of_a_prompt():
    service = ScriptedService(says("x", cached_tokens=1), says("x", cached_tokens=2))
    usage = (await post(service, prompt=["hi", "ho"], n=2)).json()["usage"]
    assert (usage["prompt_tokens"], usage["prompt_tokens_details"]) == (4, {"cached_tokens": 2})


@pytest.mark.parametrize(("ignore_eos", "stop_reason"), [(False, None), (True, EOS)])
async def test_the_end_token_is_a_stop_reason_only_as_one_of_the_clients(ignore_eos, stop_reason):
    response = await post(ScriptedService(says("x")), prompt="hi", stop_token_ids=[EOS], ignore_eos=ignore_eos)
    assert response.json()["choices"][0]["stop_reason"] == stop_reason


async def test_a_character_that_was_cut_off_shows_at_the_end():
    half = RequestOutput("", (TOKENIZER.encode("ö")[0],), (), FinishReason.LENGTH)
    assert (await post(ScriptedService([half]), prompt="hi")).json()["choices"][0]["text"] == "\ufffd"
