"""Split = whole = transformers: whatever the family, the layout of the workers, the transport and the micro-batches.

Requests run together through the whole machine (router, scheduler, pipeline, transport, FFN workers) on threads, and
every log-probability it reports is compared with transformers' own forward pass over the same tokens.
"""

import asyncio

import pytest
import torch
from transformers import AutoModelForCausalLM

from afd_server.cluster import workers
from afd_server.config import ServeConfig
from afd_server.llm import LLM
from afd_server.models.checkpoint import load_attention_half, load_ffn_half
from afd_server.models.families import read_model_spec
from afd_server.models.halves import FFNShard, WholeModel
from afd_server.router.router import Router
from afd_server.types import GenerationRequest, SamplingParams
from tests.checkpoints import write_checkpoint, write_tokenizer
from tests.unit.models.capturable import CapturableOperations
from tests.unit.models.tape import Tape

pytestmark = pytest.mark.integration

FAMILIES = ("llama", "qwen2", "qwen3", "mixtral", "qwen3_moe", "deepseek_v3")
LENGTHS = (1, 5, 19, 40)
NUM_TOKENS = 8
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, logprobs=3, prompt_logprobs=1, ignore_eos=True)

LAYOUTS = {
    "1A1F": {},
    "1A2F ep": {"ffn_workers": 2},
    "1A4F ep": {"ffn_workers": 4},
    "1A2F tp": {"ffn_workers": 2, "ffn_parallel": "tp"},
    "1A4F 2x2": {"ffn_workers": 4, "ffn_parallel": "2x2"},
    "2A1F": {"attention_workers": 2},
    "2A2F ep": {"attention_workers": 2, "ffn_workers": 2},
    "1A4F 2 replicas": {"ffn_workers": 4, "ffn_replicas": 2},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Family -> directory, written on first use."""
    written = {}

    def get(family):
        if family not in written:
            written[family] = write_checkpoint(family, tmp_path_factory.mktemp(family) / "model")
            write_tokenizer(written[family])
        return written[family]

    return get


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 250, (length,), generator=generator).tolist() for length in LENGTHS]


def run(directory, prompts, **layout):
    """Runs the prompts at once in small steps, so that they are cut, mixed, and preempted if blocks run out."""
    settings = {"max_num_seqs": 8, "max_num_batched_tokens": 24, "block_size": 4, "max_model_len": 64, **layout}
    config = ServeConfig(model=str(directory), executor="local", device="cpu", **settings)
    with LLM(config) as llm:
        return llm.run(prompts, GREEDY)


def assert_same_as_transformers(directory, prompts, results, tolerance=2e-4):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for prompt, outputs in zip(prompts, results, strict=True):
        tokens = [token_id for output in outputs for token_id in output.token_ids]
        reported = [entry for output in outputs for entry in output.logprobs]
        assert len(tokens) == len(reported) == NUM_TOKENS
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0]
        of_prompt, expected = logits.log_softmax(-1).tensor_split([len(prompt) - 1])
        read = [entry.logprob for output in outputs for entry in output.prompt_logprobs]
        assert read == pytest.approx(
            of_prompt.gather(1, torch.tensor(prompt)[1:, None])[:, 0].tolist(), abs=tolerance
        )
        for position, (token_id, entry) in enumerate(zip(tokens, reported, strict=True)):
            assert entry.logprob == pytest.approx(float(expected[position, token_id]), abs=tolerance)
            assert entry.logprob == pytest.approx(float(expected[position].max()), abs=tolerance)
            for other_id, logprob in entry.top:
                assert logprob == pytest.approx(float(expected[position, other_id]), abs=tolerance)


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_as_it_is_served(checkpoints, prompts, family, kernels):
    directory = checkpoints(family)
    assert_same_as_transformers(directory, prompts, run(directory, prompts, kernels=kernels))


@pytest.mark.parametrize(
    ("settings", "tolerance"), [({"quantization": "int8"}, 0.3), ({"dtype": "bfloat16"}, 0.1)]
)
def test_smaller_weights_are_close_and_not_equal(checkpoints, prompts, settings, tolerance):
    directory = checkpoints("llama")
    results = run(directory, prompts, **settings)
    assert_same_as_transformers(directory, prompts, results, tolerance)
    assert results[0][0].logprobs != run(directory, prompts)[0][0].logprobs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_step3_in_every_layout(checkpoints, prompts, layout):
    """transformers has no Step-3: the whole model stands for it, which a float64 oracle holds in tests/unit/models."""
    directory = checkpoints("step3")
    spec = read_model_spec(directory)
    settings = {"device": torch.device("cpu"), "dtype": torch.float32, "gate_on": "attention"}
    whole = WholeModel(
        load_attention_half(directory, spec, **settings),
        [load_ffn_half(directory, spec, FFNShard(), **settings)],
    )
    results = run(directory, prompts, transport="shm", micro_batches="2", **LAYOUTS[layout])
    for prompt, outputs in zip(prompts, results, strict=True):
        tokens = [token_id for output in outputs for token_id in output.token_ids]
        logits = whole.logits(prompt + tokens[:-1])
        of_prompt, expected = logits.log_softmax(-1).tensor_split([len(prompt) - 1])
        read = [entry.logprob for output in outputs for entry in output.prompt_logprobs]
        own = of_prompt.gather(1, torch.tensor(prompt)[1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(read), own, atol=2e-4, rtol=0)
        reported = [entry.logprob for output in outputs for entry in output.logprobs]
        torch.testing.assert_close(torch.tensor(reported), expected.amax(-1), atol=2e-4, rtol=0)
        assert len(tokens) == NUM_TOKENS


@pytest.mark.parametrize("micro_batches", ["1", "2", "3", "auto"])
@pytest.mark.parametrize("transport", ["inproc", "shm", "tcp"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mixture_of_experts_in_every_layout(checkpoints, prompts, layout, transport, micro_batches):
    directory = checkpoints("mixtral")
    results = run(directory, prompts, transport=transport, micro_batches=micro_batches, **LAYOUTS[layout])
    assert_same_as_transformers(directory, prompts, results)


@pytest.mark.parametrize("micro_batches", ["1", "2"])
@pytest.mark.parametrize("layout", ["1A1F", "2A2F ep", "1A4F ep"])
def test_the_undivided_engine(checkpoints, prompts, layout, micro_batches):
    directory = checkpoints("mixtral")
    results = run(directory, prompts, transport="direct", micro_batches=micro_batches, **LAYOUTS[layout])
    assert_same_as_transformers(directory, prompts, results)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_dense_and_shared_parts_in_every_layout(checkpoints, prompts, family, layout):
    directory = checkpoints(family)
    results = run(directory, prompts, transport="shm", micro_batches="2", **LAYOUTS[layout])
    assert_same_as_transformers(directory, prompts, results)


@pytest.mark.parametrize("layout", ["1A1F", "1A4F ep", "1A4F 2x2"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_with_the_router_on_the_ffn_side(checkpoints, prompts, family, layout):
    directory = checkpoints(family)
    results = run(directory, prompts, gate_on="ffn", **LAYOUTS[layout])
    assert_same_as_transformers(directory, prompts, results)


@pytest.mark.parametrize("settings", [{"micro_batches": "2"}, {"gate_on": "ffn", **LAYOUTS["2A2F ep"]}])
def test_as_graphs(monkeypatch, checkpoints, prompts, settings):
    """As workers on a GPU record them, with tapes for graphs."""
    tapes = []

    def capture(config, device, operations, name):
        tapes.append(Tape())
        return tapes[-1]

    monkeypatch.setattr(workers, "graph_capture", capture)
    monkeypatch.setattr(workers, "operations", lambda config, device: CapturableOperations(torch.float32))
    directory = checkpoints("deepseek_v3")
    assert_same_as_transformers(directory, prompts, run(directory, prompts, **settings))
    assert tapes and all(tape.num_replayed > NUM_TOKENS for tape in tapes)


@pytest.mark.parametrize(("wire_dtype", "tolerance"), [("bfloat16", 0.1), ("fp8", 0.5)])
def test_a_narrower_wire_is_close_and_not_equal(checkpoints, prompts, wire_dtype, tolerance):
    """On a dense model: where experts are chosen, a rounding may choose another one, and nothing is close then."""
    directory = checkpoints("llama")
    results = run(directory, prompts, transport="shm", wire_dtype=wire_dtype)
    assert_same_as_transformers(directory, prompts, results, tolerance)
    exact = run(directory, prompts, transport="shm")
    assert results[0][0].logprobs != exact[0][0].logprobs


def test_requests_that_do_not_fit_together_are_preempted_and_come_out_the_same(checkpoints, prompts):
    directory = checkpoints("llama")
    # 17 blocks of 4 tokens: five prompts of 12 tokens fit, their five outputs of 8 more do not.
    prompts = [prompts[-1][start : start + 12] for start in range(5)]
    config = ServeConfig(
        model=str(directory), executor="local", device="cpu", max_num_seqs=8, max_num_batched_tokens=24, block_size=4,
        max_model_len=64, kv_cache_memory_bytes=68 * _bytes_per_token(directory),
    )  # fmt: skip
    preemptions = []
    requests = [GenerationRequest(str(number), tuple(prompt), GREEDY) for number, prompt in enumerate(prompts)]
    with LLM(config) as llm:

        async def generate_all():
            def note(_, stats):
                preemptions.append(stats.num_preemptions)

            async with Router(llm.workers.clients, note) as router:
                return await asyncio.gather(*(_collect(router, request) for request in requests))

        results = asyncio.run(generate_all())
    assert preemptions[-1] > 0
    assert_same_as_transformers(directory, prompts, results)


async def _collect(router, request):
    return [output async for output in router.generate(request)]


def _bytes_per_token(directory):
    spec = read_model_spec(directory)
    return 4 * spec.num_layers * int(torch.tensor(spec.attention.cache_entry_shape).prod())
