"""Sampling: each stage against a plain computation, and independence of the batch."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from afd_server.attention.random_numbers import uniform
from afd_server.attention.sampler import Sampler
from afd_server.types import SamplingParams, StartedRequest

VOCAB = 50
EOS = 7


def sample(logits_V, params, *, prompt=(1, 2), output=(), repeat=1):
    """`repeat` tokens of one request from the same logits."""
    sampler = Sampler(VOCAB, [EOS], torch.device("cpu"))
    sampler.start(StartedRequest("r", tuple(prompt), tuple(output), params))
    return [sampler.sample(["r"], logits_V[None])[0] for _ in range(repeat)]


@pytest.fixture
def logits_V():
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(5)) * 2


def test_greedy_takes_the_likeliest(logits_V):
    (token,) = sample(logits_V, SamplingParams(max_tokens=1, temperature=0.0))
    assert token.token_id == int(logits_V.argmax())


def test_draws_follow_the_distribution(logits_V):
    params = SamplingParams(max_tokens=1, temperature=0.7, seed=3)
    draws = 20_000
    counts = Counter(token.token_id for token in sample(logits_V, params, repeat=draws))
    expected_V = (logits_V / 0.7).softmax(-1)
    for token_id in range(VOCAB):
        p = float(expected_V[token_id])
        assert abs(counts[token_id] / draws - p) < 5 * math.sqrt(p * (1 - p) / draws) + 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_truncations_keep_exactly_the_allowed_set(logits_V, temperature):
    probabilities_V = (logits_V / temperature).softmax(-1)
    order = probabilities_V.argsort(descending=True).tolist()
    nucleus, mass = set(), 0.0
    for token_id in order:
        if mass >= 0.6:
            break
        nucleus.add(token_id)
        mass += float(probabilities_V[token_id])
    likely = {i for i in range(VOCAB) if probabilities_V[i] >= 0.2 * probabilities_V.max()}
    for params, allowed in [
        (SamplingParams(1, top_k=3), set(order[:3])),
        (SamplingParams(1, top_p=0.6), nucleus),
        (SamplingParams(1, min_p=0.2), likely),
        (SamplingParams(1, top_k=1), set(order[:1])),
        (SamplingParams(1, top_p=1e-9), set(order[:1])),
    ]:
        drawn = {t.token_id for t in sample(logits_V, replace(params, temperature=temperature), repeat=3000)}
        assert drawn == allowed


def test_a_row_does_not_depend_on_its_batch(logits_V):
    params = {
        f"r{seed}": SamplingParams(
            9, seed=seed, temperature=0.3 + seed / 4, top_p=0.9, top_k=seed, min_p=seed / 100
        )
        for seed in range(6)
    }
    logits = {name: logits_V.roll(index) for index, name in enumerate(params)}
    alone = {name: [t.token_id for t in sample(logits[name], params[name], repeat=5)] for name in params}
    sampler = Sampler(VOCAB, [EOS], torch.device("cpu"))
    for name in params:
        sampler.start(StartedRequest(name, (1,), (), params[name]))
    together = {name: [] for name in params}
    for _ in range(5):
        for token in sampler.sample(list(params), torch.stack([logits[name] for name in params])):
            together[token.request_id].append(token.token_id)
    assert together == alone


def test_a_request_that_comes_back_goes_on_as_it_would_have(logits_V):
    params = SamplingParams(9, seed=11, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.2)
    whole = [t.token_id for t in sample(logits_V, params, repeat=6)]
    resumed = [t.token_id for t in sample(logits_V, params, output=whole[:3], repeat=3)]
    assert whole[:3] + resumed == whole


def test_penalties_equal_their_formulas(logits_V):
    params = SamplingParams(
        1, temperature=0.0, repetition_penalty=1.5, presence_penalty=0.4, frequency_penalty=0.25
    )
    prompt, output = [3, 4], [4, 9, 9]
    expected_V = logits_V.clone()
    for token_id in {3, 4, 9}:
        value = expected_V[token_id]
        expected_V[token_id] = value / 1.5 if value > 0 else value * 1.5
    for token_id, count in Counter(output).items():
        expected_V[token_id] -= 0.25 * count + 0.4
    sampler = Sampler(VOCAB, [EOS], torch.device("cpu"))
    sampler.start(StartedRequest("r", tuple(prompt), tuple(output), params))
    shaped_NV = sampler._shape([sampler._states["r"]], logits_V[None])
    torch.testing.assert_close(shaped_NV[0], expected_V)


def test_bias_and_minimum_length(logits_V):
    biased = SamplingParams(4, temperature=0.0, logit_bias={13: 100.0, EOS: 200.0}, min_tokens=2)
    assert [t.token_id for t in sample(logits_V, biased, repeat=3)] == [13, 13, EOS]
    stops = SamplingParams(4, temperature=0.0, logit_bias={13: 100.0}, min_tokens=1, stop_token_ids=(13,))
    first, second = sample(logits_V, stops, repeat=2)
    assert first.token_id != 13
    assert second.token_id == 13


def test_logprobs_are_the_models_own(logits_V):
    params = SamplingParams(1, temperature=0.0, logit_bias={13: 100.0}, logprobs=4)
    (token,) = sample(logits_V, params)
    expected_V = logits_V.log_softmax(-1)
    assert token.token_id == 13
    assert token.logprobs.logprob == pytest.approx(float(expected_V[13]), abs=1e-5)
    assert [i for i, _ in token.logprobs.top] == expected_V.topk(4).indices.tolist()
    assert sample(logits_V, SamplingParams(1, logprobs=0))[0].logprobs.top == ()
    assert sample(logits_V, SamplingParams(1))[0].logprobs is None


def test_the_callers_logits_stay_as_they_are(logits_V):
    before = logits_V.clone()
    sample(logits_V, SamplingParams(3, logit_bias={1: 5.0}, repetition_penalty=1.3, top_k=2), repeat=3)
    assert torch.equal(logits_V, before)


def test_the_number_of_threads_stays_as_it_is(logits_V):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        sample(logits_V, SamplingParams(1))
        assert torch.get_num_threads() == 3
        with pytest.raises(KeyError):
            Sampler(VOCAB, [EOS], torch.device("cpu")).sample(["unknown"], logits_V[None])
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_random_numbers_are_uniform_and_know_only_seed_and_position():
    values = [uniform(seed, position) for seed in range(-50, 50) for position in range(100)]
    assert uniform(3, 4) == uniform(3, 4) != uniform(4, 3)
    assert all(0 <= value < 1 for value in values)
    assert len(set(values)) == len(values)
    histogram = Counter(int(value * 10) for value in values)
    assert all(abs(histogram[tenth] - 1000) < 5 * math.sqrt(900) for tenth in range(10))


def test_only_allowed_tokens_come(logits_V):
    allowed = (3, 40, 41)
    drawn = {t.token_id for t in sample(logits_V, SamplingParams(1, allowed_token_ids=allowed), repeat=2000)}
    assert drawn == set(allowed)
    (greedy,) = sample(logits_V, SamplingParams(1, temperature=0.0, allowed_token_ids=allowed))
    assert greedy.token_id == max(allowed, key=lambda token_id: logits_V[token_id])


@pytest.mark.parametrize(
    "rules", [{"min_tokens": 5}, {"bad_words": ((EOS,),)}, {"bad_words": ((4, EOS),)}, {"temperature": 0.0}]
)
def test_what_is_allowed_comes_even_if_another_rule_forbids_it(logits_V, rules):
    params = SamplingParams(**{"max_tokens": 9, "allowed_token_ids": (EOS,), **rules})
    assert [t.token_id for t in sample(logits_V, params, output=(4,), repeat=3)] == [EOS] * 3


def test_no_bad_word_is_completed():
    logits_V = torch.zeros(VOCAB)
    logits_V[[1, 2, 3]] = 20.0
    params = SamplingParams(500, bad_words=((2,), (3, 3), (1, 1, 1)), seed=4)
    tokens = [t.token_id for t in sample(logits_V, params, prompt=(3, 1), output=(3,), repeat=400)]
    text = ",".join(map(str, [3, *tokens]))
    assert set(tokens) >= {1, 3}
    assert "2" not in text and "3,3" not in text and "1,1,1" not in text and "1,1,3" in text
    # What the prompt ends with is no beginning of a word.
    (first,) = sample(logits_V, SamplingParams(1, temperature=0.0, bad_words=((1, 1),)), prompt=(1,))
    assert first.token_id == 1


def test_a_request_with_bad_words_comes_back_as_it_was(logits_V):
    params = SamplingParams(9, seed=1, bad_words=tuple((a, b) for a in range(VOCAB) for b in range(a)))
    whole = [t.token_id for t in sample(logits_V, params, repeat=6)]
    assert whole == sorted(whole)
    assert [t.token_id for t in sample(logits_V, params, output=whole[:3], repeat=3)] == whole[3:]
