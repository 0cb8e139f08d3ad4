"""A request's tokens are its own: they do not depend on its company, on the workers, or on how a step is cut."""

import pytest
import torch

from afd_server.config import ServeConfig
from afd_server.llm import LLM
from afd_server.text.constraints import from_json_schema, from_regex
from afd_server.types import SamplingParams

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def requests():
    generator = torch.Generator().manual_seed(9)
    prompts = [
        torch.randint(0, 250, (length,), generator=generator).tolist() for length in (3, 17, 30, 8, 5, 21)
    ]
    sampling = [
        SamplingParams(max_tokens=12, seed=11, temperature=0.8, ignore_eos=True),
        SamplingParams(
            max_tokens=12, seed=12, temperature=1.3, top_p=0.8, frequency_penalty=0.7, ignore_eos=True
        ),
        SamplingParams(max_tokens=12, temperature=0.0, repetition_penalty=1.4, ignore_eos=True),
        SamplingParams(max_tokens=12, seed=13, top_k=20, min_p=0.01, presence_penalty=0.5, ignore_eos=True),
        SamplingParams(max_tokens=12, seed=14, constraint=from_regex("[a-z]{9}(-[0-9]+)?")),
        SamplingParams(max_tokens=12, temperature=0.0, constraint=from_json_schema({"type": "array"})),
    ]
    return prompts, sampling


def run(mixtral, prompts, sampling, **settings):
    config = ServeConfig(model=str(mixtral), executor="local", device="cpu", max_model_len=64, **settings)
    with LLM(config) as llm:
        return llm.generate_token_ids(prompts, sampling)


@pytest.fixture(scope="module")
def alone(mixtral, requests):
    return [run(mixtral, [prompt], [params])[0] for prompt, params in zip(*requests, strict=True)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"attention_workers": 2, "ffn_workers": 2},
        {"micro_batches": "3", "ffn_workers": 4},
        {"max_num_batched_tokens": 7, "max_num_seqs": 7, "block_size": 4},
        {"enable_prefix_caching": False},
        {"transport": "tcp"},
        {"max_num_seqs": 2},
    ],
    ids=str,
)
def test_tokens_do_not_depend_on_company_or_layout(mixtral, requests, alone, settings):
    assert run(mixtral, *requests, **settings) == alone


def test_the_same_prompt_again_finds_its_blocks_and_gives_the_same(mixtral, requests):
    prompts, sampling = requests
    config = ServeConfig(model=str(mixtral), executor="local", device="cpu", max_model_len=64, block_size=4)
    with LLM(config) as llm:
        first = llm.run([prompts[2]], [sampling[2]])[0]
        second = llm.run([prompts[2]], [sampling[2]])[0]
    assert first[0].cached_tokens == 0
    assert second[0].cached_tokens == 28  # 7 of the 8 blocks: at least one prompt token is computed
    first, second = ([token for output in outputs for token in output.token_ids] for outputs in (first, second))
    assert first == second


def test_different_seeds_differ(mixtral, requests):
    prompt = requests[0][0]
    sampling = [SamplingParams(max_tokens=12, seed=seed, temperature=1.0, ignore_eos=True) for seed in range(4)]
    outputs = run(mixtral, [prompt] * 4, sampling)
    assert len({tuple(tokens) for tokens in outputs}) == 4
