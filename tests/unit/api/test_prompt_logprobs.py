"""What is reported of a prompt: vLLM's prompt_logprobs, and the legacy form that echo with logprobs has."""

import pytest

from afd_server.types import FinishReason, RequestOutput, TokenLogprobs
from tests.unit.api.scripted_service import EOS, TOKENIZER, ScriptedService, events, post, says

h, i, x = TOKENIZER.encode("hix")


def read(*logprobs, top=((x, -0.5),), finish=None):
    """An output that reports so many tokens of a prompt."""
    entries = tuple(TokenLogprobs(logprob, top, rank=7) for logprob in logprobs)
    return RequestOutput("", finish_reason=finish, prompt_logprobs=entries)


async def test_prompt_logprobs_of_a_completion():
    service = ScriptedService([read(-1.5), read(-2.0), *says("ok")])
    answer = (await post(service, prompt="hix", prompt_logprobs=1)).json()
    assert service.requests[0].sampling.prompt_logprobs == 1
    (choice,) = answer["choices"]
    assert choice["text"] == "ok"
    assert choice["prompt_logprobs"] == [
        None,
        {str(i): {"logprob": -1.5, "rank": 7, "decoded_token": "i"},
         str(x): {"logprob": -0.5, "rank": 1, "decoded_token": "x"}},
        {str(x): {"logprob": -0.5, "rank": 1, "decoded_token": "x"}},
    ]  # fmt: skip
    assert choice["logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 3


async def test_prompt_logprobs_of_a_chat():
    messages = [{"role": "user", "content": "a"}]
    num_tokens = len(TOKENIZER.encode("<user>a<|end|><assistant>"))
    service = ScriptedService([read(*[-1.0] * (num_tokens - 1), top=()), *says("ok")])
    answer = (await post(service, "/v1/chat/completions", messages=messages, prompt_logprobs=0)).json()
    assert len(answer["prompt_logprobs"]) == num_tokens
    assert answer["prompt_logprobs"][0] is None
    assert [len(entry) for entry in answer["prompt_logprobs"][1:]] == [1] * (num_tokens - 1)


@pytest.mark.parametrize("fields", [{}, {"prompt_logprobs": None}, {"prompt_logprobs": False}])
async def test_nothing_is_reported_unasked(fields):
    service = ScriptedService(says("ok"))
    assert (await post(service, prompt="hi", **fields)).json()["choices"][0]["prompt_logprobs"] is None
    chat = {"messages": [{"role": "user", "content": "a"}], **fields}
    assert (await post(service, "/v1/chat/completions", **chat)).json()["prompt_logprobs"] is None
    assert [request.sampling.prompt_logprobs for request in service.requests] == [None, None]


async def test_echo_with_logprobs_begins_with_the_prompt():
    service = ScriptedService([read(-1.5), *says("o", logprob=-0.25)])
    answer = (await post(service, prompt="hi", echo=True, logprobs=1, max_tokens=2)).json()
    (choice,) = answer["choices"]
    assert (choice["text"], choice["prompt_logprobs"]) == ("hio", None)
    assert choice["logprobs"]["tokens"] == ["h", "i", "o", "<|end|>"]
    assert choice["logprobs"]["token_logprobs"] == [None, -1.5, -0.25, -0.25]
    assert choice["logprobs"]["top_logprobs"][:2] == [None, {"x": -0.5, "i": -1.5}]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]


async def test_a_stream_echoes_the_prompt_with_its_first_token():
    service = ScriptedService([read(-1.5), *says("ok", logprob=-0.25)])
    chunks = [
        chunk["choices"][0]
        for chunk in events(await post(service, prompt="hi", echo=True, logprobs=0, stream=True))
    ]
    assert [chunk["logprobs"]["tokens"] for chunk in chunks] == [["h", "i", "o"], ["k"], ["<|end|>"]]
    assert [chunk["logprobs"]["token_logprobs"] for chunk in chunks] == [[None, -1.5, -0.25], [-0.25], [-0.25]]
    assert [chunk["logprobs"]["text_offset"] for chunk in chunks] == [[0, 1, 2], [3], [4]]
    assert "".join(chunk["text"] for chunk in chunks) == "hiok"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompts", [["hi", "hix"], [[h, i], [h, i, x]]])
async def test_scoring_a_batch_generates_nothing(prompts, stream):
    """As evaluation harnesses ask: prompts of ids, echo, no output."""
    service = ScriptedService(
        [read(-1.0, finish=FinishReason.LENGTH)], [read(-2.0), read(-3.0, finish=FinishReason.LENGTH)]
    )
    response = await post(service, prompt=prompts, echo=True, logprobs=1, max_tokens=0, stream=stream)
    answers = events(response) if stream else [response.json()]
    choices = sorted(
        (choice for answer in answers for choice in answer["choices"]), key=lambda each: each["index"]
    )
    assert [choice["text"] for choice in choices] == ["hi", "hix"]
    assert [choice["logprobs"]["token_logprobs"] for choice in choices] == [[None, -1.0], [None, -2.0, -3.0]]
    assert [choice["finish_reason"] for choice in choices] == ["length", "length"]
    if not stream:
        usage = answers[0]["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (5, 0, 5)
    assert [(each.sampling.max_tokens, each.sampling.prompt_logprobs) for each in service.requests] == [
        (0, 1)
    ] * 2


async def test_a_prompt_may_fill_the_context_where_it_is_only_read():
    service = ScriptedService([read(*[-1.0] * 63, finish=FinishReason.LENGTH)])
    answer = (await post(service, prompt=[h] * 64, echo=True, logprobs=0, max_tokens=0)).json()
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == 64


async def test_each_field_gets_as_many_as_it_asked_for():
    top = ((x, -0.5), (EOS, -0.75))
    service = ScriptedService([read(-1.5, top=top), *says("o", logprob=-0.25)])
    body = {"prompt": "hi", "echo": True}
    (choice,) = (await post(service, **body, logprobs=1, prompt_logprobs=2)).json()["choices"]
    assert service.requests[-1].sampling.prompt_logprobs == 2
    assert (len(choice["logprobs"]["top_logprobs"][1]), len(choice["prompt_logprobs"][1])) == (2, 3)
    (choice,) = (await post(service, **body, logprobs=2, prompt_logprobs=0)).json()["choices"]
    assert (len(choice["logprobs"]["top_logprobs"][1]), len(choice["prompt_logprobs"][1])) == (3, 1)


async def test_a_large_report_is_written_elsewhere_and_is_the_same(monkeypatch):
    script = [read(-1.5), *says("ok")]
    small = (await post(ScriptedService(script), prompt="hi", prompt_logprobs=1)).json()
    monkeypatch.setattr("afd_server.api.streaming.MANY_LOGPROBS", 0)
    large = (await post(ScriptedService(script), prompt="hi", prompt_logprobs=1)).json()
    assert small["choices"] == large["choices"]
