"""Constrained decoding: whatever the logits, the output follows its constraint; and nobody else is touched by it."""

import json
import queue
import re

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afd_server.attention.constraints import Constraints, forbidden, forbidden_on_device
from afd_server.attention.sampler import Sampler
from afd_server.text import constraints as made
from afd_server.text.tokenizer import Tokenizer
from afd_server.types import GenerationRequest, SamplingParams, StartedRequest
from tests.checkpoints import VOCAB_SIZE, write_tokenizer

EOS = 257
DEADLINE_S = 30.0
CPU = torch.device("cpu")
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "é", None]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
CHOICES = ["yes", "no", 'a "quoted" one', "naïve\n", "yes, but"]
PATTERN = r"[A-Z]{1,3}-[0-9]+(\.[0-9])?(é|😀)?"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return directory, Tokenizer.load(directory)


@pytest.fixture(scope="module")
def constraints(model):
    loaded = Constraints.load(model[0], VOCAB_SIZE, (EOS, 999), threads=1)
    yield loaded
    loaded.close()


def generate(constraints, params, logits, *, output=(), steps=3000):
    """The tokens of one request up to its end, and the last SampledToken."""
    sampler = Sampler(VOCAB_SIZE, [EOS], CPU, constraints)
    sampler.start(StartedRequest("r", (1,), tuple(output), params))
    tokens, sampled = [], None
    for step in range(steps):
        (sampled,) = sampler.sample(["r"], logits(step)[None])
        if sampled.error:
            break
        tokens.append(sampled.token_id)
        if sampled.token_id == EOS and not params.ignore_eos:
            break
    return tokens, sampled


def random_logits(seed, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return lambda step: torch.randn(VOCAB_SIZE, generator=generator) * scale


def follows(kind, text):
    if kind == "choice":
        return text in CHOICES
    if kind == "regex":
        return re.fullmatch(PATTERN, text) is not None
    jsonschema.validate(json.loads(text), PERSON)
    return True


CONSTRAINTS = {
    "json": made.from_json_schema(PERSON),
    "compact": made.from_json_schema(PERSON, any_whitespace=False),
    "spaced": made.from_json_schema(PERSON, whitespace_pattern=" ?"),
    "regex": made.from_regex(PATTERN),
    "choice": made.from_choices(CHOICES),
}


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(sorted(CONSTRAINTS)),
    seed=st.integers(0, 2**32),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 50.0]),
    truncation=st.sampled_from([{}, {"top_k": 1}, {"top_k": 40}, {"top_p": 0.1}, {"min_p": 0.9}]),
    others=st.sampled_from(
        [
            {},
            {"frequency_penalty": 2.0, "logit_bias": {EOS: -100.0, 65: 100.0}},
            {"allowed_token_ids": (65, 66), "bad_words": ((34,), (92, 93)), "min_tokens": 40},
        ]
    ),
)
def test_whatever_the_logits_an_output_follows_its_constraint(
    model, constraints, kind, seed, temperature, truncation, others
):
    params = SamplingParams(
        3000, seed=seed, temperature=temperature, constraint=CONSTRAINTS[kind], **truncation, **others
    )
    tokens, last = generate(constraints, params, random_logits(seed))
    assert last.error is None
    text = model[1].decode(tokens)
    if last.token_id == EOS:
        assert follows(kind, text)
        assert kind != "compact" or not re.search(r"[:,\[{]\s", text)
    else:  # JSON may go on with spaces for ever; all of it so far is the beginning of an answer
        assert kind == "json"
        assert len(tokens) == 3000


@pytest.mark.parametrize("device", ["cpu", "on device"])
def test_a_bitmask_forbids_the_tokens_whose_bit_is_0(device):
    allowed = np.random.default_rng(0).integers(0, 2, (3, 96)).astype(bool)
    bitmask_RW = np.packbits(allowed, axis=1, bitorder="little").view(np.uint32)
    for vocab_size in (96, 70, 64, 1):
        if device == "cpu":
            found = forbidden(list(bitmask_RW), vocab_size, CPU)
        else:
            found = forbidden_on_device(torch.from_numpy(bitmask_RW.view(np.int32)), vocab_size)
        assert torch.equal(found, torch.from_numpy(~allowed[:, :vocab_size]))


def test_a_request_that_comes_back_goes_on_as_it_would_have(constraints):
    params = SamplingParams(200, seed=5, constraint=CONSTRAINTS["compact"])
    logits = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(1))
    whole, _ = generate(constraints, params, lambda step: logits)
    for known in range(len(whole)):
        resumed, _ = generate(constraints, params, lambda step: logits, output=whole[:known])
        assert whole[:known] + resumed == whole


def test_each_row_has_its_own_constraint_or_none(model, constraints):
    sampler = Sampler(VOCAB_SIZE, [EOS], CPU, constraints)
    params = {
        "free": SamplingParams(9, temperature=0.0),
        "a": SamplingParams(9, temperature=0.0, constraint=made.from_regex("a+")),
        "b": SamplingParams(9, temperature=0.0, constraint=made.from_regex("b+"), logprobs=1),
    }
    for name, each in params.items():
        sampler.start(StartedRequest(name, (1,), (), each))
    logits_NV = torch.zeros(3, VOCAB_SIZE)
    logits_NV[:, 7] = 5.0
    before = logits_NV.clone()
    for _ in range(3):
        sampled = {each.request_id: each for each in sampler.sample(list(params), logits_NV)}
        assert sampled["free"].token_id == 7
        assert model[1].decode([sampled["a"].token_id]) == "a"
        assert model[1].decode([sampled["b"].token_id]) == "b"
    assert sampled["b"].logprobs.top[0][0] == 7, "log-probabilities are the model's own"
    assert torch.equal(logits_NV, before)


def test_a_matcher_that_fails_ends_its_request_alone(constraints):
    sampler = Sampler(VOCAB_SIZE, [EOS], CPU, constraints)
    for name, output in (("good", ()), ("bad", (65, 65))):  # no output of this constraint
        params = SamplingParams(9, constraint=made.from_regex("[0-9]+"))
        sampler.start(StartedRequest(name, (1,), output, params))
    good, bad = sampler.sample(["good", "bad"], torch.zeros(2, VOCAB_SIZE))
    assert good.error is None
    assert "structured output" in bad.error and "grammar" in bad.error


def test_an_end_is_held_back_only_while_there_is_anything_else_to_say(constraints):
    logits = torch.zeros(VOCAB_SIZE)
    logits[EOS] = 10.0
    longer = SamplingParams(9, temperature=0.0, min_tokens=3, constraint=made.from_regex("a+"))
    assert len(generate(constraints, longer, lambda step: logits)[0]) == 3 + 1
    at_its_end = SamplingParams(9, temperature=0.0, min_tokens=5, constraint=made.from_regex("aa"))
    assert len(generate(constraints, at_its_end, lambda step: logits)[0]) == 2 + 1


def test_with_ignore_eos_the_output_is_free_behind_the_end(constraints):
    logits = torch.zeros(VOCAB_SIZE)
    logits[7], logits[EOS] = 9.0, 5.0
    params = SamplingParams(9, temperature=0.0, ignore_eos=True, constraint=made.from_choices(["a"]))
    whole, _ = generate(constraints, params, lambda step: logits, steps=5)
    assert whole[1:] == [EOS, 7, 7, 7]
    for known in range(5):
        resumed, _ = generate(constraints, params, lambda step: logits, output=whole[:known], steps=5 - known)
        assert whole[:known] + resumed == whole


def prepared(constraints, constraint):
    news = queue.Queue()
    request = GenerationRequest("r", (1,), SamplingParams(1, constraint=constraint))
    constraints.prepare(request, news.put)
    return news.get(timeout=DEADLINE_S)


def test_a_grammar_is_compiled_before_its_request_runs(constraints):
    grammar = made.from_grammar('start: <|user|> "x"')
    assert prepared(constraints, grammar) == ""
    assert prepared(constraints, grammar) == ""
    assert "unclosed group" in prepared(constraints, made.from_regex("(("))
    assert "<|nobody|>" in prepared(constraints, made.from_grammar('start: <|nobody|> "x"'))


def test_grammars_beyond_the_kept_ones_are_compiled_again(constraints, monkeypatch):
    monkeypatch.setattr("afd_server.attention.constraints.MAX_COMPILED", 2)
    for number in range(4):
        assert prepared(constraints, made.from_regex(f"a{{{number + 1}}}")) == ""
    tokens, _ = generate(constraints, SamplingParams(9, constraint=made.from_regex("a{1}")), random_logits(0))
    assert len(tokens) == 2


def test_a_model_whose_outputs_cannot_be_constrained_says_so(model, tmp_path):
    for directory, eos_token_ids, reason in (
        (model[0], (), "no token that ends"),
        (tmp_path, (EOS,), "tokenizer.json"),
    ):
        constraints = Constraints.load(directory, VOCAB_SIZE, eos_token_ids, threads=1)
        assert reason in prepared(constraints, CONSTRAINTS["json"])
        constraints.close()
