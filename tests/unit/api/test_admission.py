import pytest
from pydantic import ValidationError

from afd_server.api import admission
from afd_server.api.protocol.chat import ChatCompletionRequest
from afd_server.api.protocol.generation import CompletionRequest
from afd_server.text.chat_template import ChatTemplate
from afd_server.types import SamplingParams
from tests.unit.api.scripted_service import TOKENIZER, ScriptedService, client_for, post, says

NOT_SERVED = {
    "suffix": "x", "best_of": 3, "use_beam_search": True, "guided_json": {"type": "object"},
    "guided_regex": "a+", "guided_choice": ["a"], "guided_grammar": "x", "lora_request": "x",
    "priority": 1, "length_penalty": 2.0, "logits_processors": ["x"], "prompt_embeds": "x", "service_tier": "flex",
}  # fmt: skip
OUT_OF_RANGE = {
    "temperature": -0.1, "top_p": 0, "top_k": -2, "min_p": 1.1, "n": 0, "max_tokens": 0, "seed": 2**63,
    "presence_penalty": 2.1, "frequency_penalty": -2.1, "repetition_penalty": 0, "logprobs": 21, "min_tokens": 17,
    "truncate_prompt_tokens": 65, "stop_token_ids": [257], "stop": ["x", ""], "stop.0": [""],
}  # fmt: skip
WRONG_TYPE = {
    "temperature": "hot", "top_k": 1.5, "n": True, "stream": "yes", "prompt": [["a"]], "max_tokens": "5",
    "ignore_eos": 1, "seed": 1.5, "model": 3, "stop": 5, "echo": "no", "request_id": "a b", "metadatas": {},
}  # fmt: skip


def cases(table):
    return [pytest.param(field.split(".")[0], value, id=field) for field, value in table.items()]


@pytest.mark.parametrize(("field", "value"), cases(NOT_SERVED) + cases(OUT_OF_RANGE) + cases(WRONG_TYPE))
async def test_refused_by_name_before_anything_is_computed(field, value):
    service = ScriptedService(says("a"))
    response = await post(service, **{"prompt": "hi", field: value})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"].split(".")[0] == field and field in error["message"]
    assert error["type"] == "invalid_request_error"
    assert service.requests == []


async def test_values_that_ask_for_nothing_are_welcome():
    nothing = {
        "suffix": None, "best_of": 1, "use_beam_search": False, "prompt_logprobs": None, "guided_json": None, "stop": None,
        "response_format": {"type": "text"}, "length_penalty": 1.0, "user": "me", "stream": None, "logit_bias": None,
    }  # fmt: skip
    assert (await post(ScriptedService(says("a")), prompt="hi", **nothing)).status_code == 200


async def test_null_means_the_default():
    service = ScriptedService(says("a"))
    optional = [name for name, field in CompletionRequest.model_fields.items() if not field.is_required()]
    assert (await post(service, prompt="hi", **dict.fromkeys(optional))).status_code == 200
    assert service.requests[0].sampling == SamplingParams(16, seed=service.requests[0].sampling.seed)
    assert (await post(service, prompt=None)).status_code == 400


async def test_every_sampling_field_arrives():
    service = ScriptedService(says("a"))
    fields = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.2,
        "frequency_penalty": 0.3, "min_tokens": 2, "max_tokens": 9, "ignore_eos": True, "seed": -5,
    }  # fmt: skip
    await post(service, prompt="hi", **fields, logit_bias={"3": -100}, stop_token_ids=[4, 5, 4], logprobs=1)
    expected = SamplingParams(**fields, logit_bias={3: -100}, stop_token_ids=(4, 5), logprobs=1)
    assert service.requests[0].sampling == expected


@pytest.mark.parametrize("top_k", [-1, 0])
async def test_top_k_may_be_off(top_k):
    service = ScriptedService(says("a"))
    await post(service, prompt="hi", top_k=top_k, settings={"default_sampling": {"top_k": 20}})
    assert service.requests[0].sampling.top_k == 0


async def test_openais_defaults_and_the_models_own():
    service = ScriptedService(says("a"))
    await post(service, prompt="hi", seed=1)
    assert service.requests[-1].sampling == SamplingParams(max_tokens=16, seed=1)
    recommended = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    await post(service, prompt="hi", seed=1, top_p=0.5, settings={"default_sampling": recommended})
    assert service.requests[-1].sampling == SamplingParams(16, seed=1, temperature=0.6, top_k=20, top_p=0.5)


@pytest.mark.parametrize(("recommended", "limit"), [(8, 8), (500, 16)])
async def test_the_models_own_length_only_lowers_the_default(recommended, limit):
    service = ScriptedService(says("a"))
    await post(service, prompt="hi", settings={"default_sampling": {"max_tokens": recommended}})
    assert service.requests[0].sampling.max_tokens == limit


@pytest.mark.parametrize("length", [64, 65])
async def test_a_prompt_that_leaves_no_room(length):
    response = await post(ScriptedService(says("a")), prompt="x" * length)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert str(length) in error["message"] and "64" in error["message"]


async def test_output_that_does_not_fit():
    service = ScriptedService(says("a"))
    response = await post(service, prompt="x" * 60, max_tokens=5)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "max_tokens")
    assert (await post(service, prompt="x" * 60, max_tokens=4)).status_code == 200
    await post(service, prompt="x" * 60)  # the default of 16 is not asked for: what is left will do
    assert service.requests[-1].sampling.max_tokens == 4


@pytest.mark.parametrize(("keep", "length"), [(10, 10), (-1, 59), (64, None)])
async def test_a_prompt_is_cut_from_the_left_on_request(keep, length):
    service = ScriptedService(says("a"))
    response = await post(service, prompt="x" * 90 + "y" * 10, max_tokens=5, truncate_prompt_tokens=keep)
    if length is None:
        assert response.status_code == 400
    else:
        assert len(service.requests[0].prompt_token_ids) == length
        assert response.json()["usage"]["prompt_tokens"] == length


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], [[257]], [[-1]]])
async def test_prompts_without_a_token_or_with_unknown_ones(prompt):
    response = await post(ScriptedService(says("a")), prompt=prompt)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")


@pytest.mark.parametrize("bias", [{"257": 1}, {"x": 1}, {"-1": 1}, {"3": 101}, {"9" * 5000: 1}, {"3": True}])
async def test_logit_bias_is_for_tokens_that_exist(bias):
    response = await post(ScriptedService(says("a")), prompt="hi", logit_bias=bias)
    assert (response.status_code, response.json()["error"]["param"].split(".")[0]) == (400, "logit_bias")


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("prompt_logprobs", {"prompt_logprobs": 21}),
        ("prompt_logprobs", {"prompt_logprobs": -2}),
        ("prompt_logprobs", {"prompt_logprobs": -1}),
        ("prompt_logprobs", {"prompt_logprobs": 0, "stream": True}),
        ("prompt_logprobs", {"prompt_logprobs": True}),
        ("logprobs", {"logprobs": -1}),
        ("logprobs", {"logprobs": -2}),
        ("allowed_token_ids", {"allowed_token_ids": []}),
        ("allowed_token_ids", {"allowed_token_ids": [257]}),
        ("allowed_token_ids", {"allowed_token_ids": [-1]}),
        ("bad_words", {"bad_words": [" "]}),
        ("bad_words", {"bad_words": "one"}),
        ("bad_words.0", {"bad_words": [""]}),
    ],
)
async def test_reports_and_rules_that_are_refused_by_name(field, body):
    service = ScriptedService(says("a"))
    response = await post(service, prompt="hi", **body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)
    assert service.requests == []


async def test_allowed_tokens_and_bad_words():
    service = ScriptedService(says("a"))
    assert (
        await post(service, prompt="hi", allowed_token_ids=[5, 4, 5], bad_words=["ab", " ab", "c"])
    ).status_code == 200
    sampling, (a, b, c) = service.requests[0].sampling, TOKENIZER.encode("abc")
    assert (sampling.allowed_token_ids, sampling.bad_words) == ((5, 4), ((a, b), (c,)))


async def test_the_whole_vocabulary_where_the_server_gives_it():
    service = ScriptedService(says("a", logprob=-1.0))
    wide = {"max_logprobs": 257}
    assert (await post(service, prompt="hi", settings=wide, logprobs=-1)).status_code == 200
    chat = {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": -1}
    assert (await post(service, "/v1/chat/completions", wide, **chat)).status_code == 200
    assert [request.sampling.logprobs for request in service.requests] == [257, 257]


@pytest.mark.parametrize(
    ("field", "body"),
    [("prompt_logprobs", {"prompt_logprobs": 300}), ("logprobs", {"logprobs": 300, "max_tokens": 30})],
)
async def test_reports_are_bounded(monkeypatch, field, body):
    monkeypatch.setattr(admission, "MAX_PROMPT_LOGPROBS_IN_ALL", 301 * 8)
    monkeypatch.setattr(admission, "MAX_LOGPROBS_OF_CHOICE", 300 * 29)
    wide = {"max_logprobs": 300}
    service = ScriptedService(says("a", logprob=-1.0))
    response = await post(service, prompt=["hi!"], n=3, settings=wide, **body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)
    assert (
        await post(service, prompt="hi", n=3, max_tokens=20, settings=wide, logprobs=300)
    ).status_code == 200


async def test_stream_options_need_a_stream():
    response = await post(ScriptedService(says("a")), prompt="hi", stream_options={"include_usage": True})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "stream_options")


async def test_too_many_choices():
    response = await post(ScriptedService(says("a")), prompt=["a"] * 17, n=128)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")


async def test_a_request_id_is_used_and_may_come_twice():
    service = ScriptedService(says("a"))
    for _ in range(2):
        assert (await post(service, prompt="hi", request_id="mine")).json()["id"] == "cmpl-mine"
    assert len({request.request_id for request in service.requests}) == 2


async def test_a_long_text_is_encoded_too():
    async with client_for(ScriptedService(says("a"))) as client:
        response = await client.post("/v1/completions", json={"prompt": "x" * 50_000})
    assert "50000 tokens" in response.json()["error"]["message"]


@pytest.mark.parametrize("model", [CompletionRequest, ChatCompletionRequest])
def test_every_field_has_a_schema(model):
    assert set(model.model_json_schema()["properties"]) == set(model.model_fields)


@pytest.mark.parametrize(
    "body",
    [
        '{"prompt": "\\ud800"}',
        '{"prompt": ["a", "\\ud800"]}',
        '{"prompt": "hi", "stop": "\\ud800"}',
        '{"prompt": "hi", "model": "\\ud800"}',
        '{"prompt": "hi", "\\ud800": 1}',
        '{"messages": [{"role": "user", "content": "\\ud800"}]}',
        '{"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"name": "\\ud800"}}',
        "[" * 100_000,
    ],
)
async def test_what_is_no_text_is_refused(body):
    """Half a surrogate pair is valid JSON and no Unicode."""
    template = ChatTemplate("{{ messages[0].content }}{{ name }}")
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    async with client_for(ScriptedService(says("a")), chat_template=template) as client:
        response = await client.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code in (400, 404)
    assert response.json()["error"]["message"]


MANY = range(100_000)


@pytest.mark.parametrize(
    ("body", "model"),
    [
        ({"prompt": "x", "stop_token_ids": ["x" for _ in MANY]}, CompletionRequest),
        ({"prompt": "x", "stop": [1 for _ in MANY]}, CompletionRequest),
        ({"prompt": "x", "logit_bias": {str(i): "x" for i in MANY}}, CompletionRequest),
        ({"prompt": [1.5 for _ in MANY]}, CompletionRequest),
        ({"prompt": "x", **{f"f{i}": 1 for i in MANY}}, CompletionRequest),
        ({"messages": [1 for _ in MANY]}, ChatCompletionRequest),
        ({"messages": [{f"f{i}": 1 for i in MANY}]}, ChatCompletionRequest),
    ],
)
def test_a_body_of_many_mistakes_is_not_explained_one_by_one(body, model):
    """A body within the size limit can hold millions; each explanation would hold up every stream of the server."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    assert caught.value.error_count() <= 3
