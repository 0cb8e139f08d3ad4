"""Several Ray actors, several layouts: the same tokens as one process gives, over shared memory and over TCP."""

import pytest
import torch

from afd_server.config import ServeConfig
from afd_server.llm import LLM
from afd_server.types import SamplingParams
from tests.server_process import Server

pytestmark = pytest.mark.integration

LAYOUTS = {
    "1A1F": ["--transport", "shm"],
    "2A2F ep, tcp, 2 micro-batches": [
        "--attention-workers", 2, "--ffn-workers", 2, "--transport", "tcp", "--micro-batches", 2],
    "1A4F 2x2, 3 micro-batches": ["--ffn-workers", 4, "--ffn-parallel", "2x2", "--micro-batches", 3],
    "1A4F ep": ["--ffn-workers", 4],
    "1A2F tp, tcp": ["--ffn-workers", 2, "--ffn-parallel", "tp", "--transport", "tcp"],
    "2A1F, router on the FFN side": ["--attention-workers", 2, "--gate-on", "ffn", "--micro-batches", 1],
}  # fmt: skip


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(21)
    return [torch.randint(0, 250, (length,), generator=generator).tolist() for length in (4, 33, 12, 25)]


@pytest.fixture(scope="module")
def expected(mixtral, prompts):
    config = ServeConfig(model=str(mixtral), executor="local", device="cpu", max_model_len=64)
    with LLM(config) as llm:
        return llm.generate_token_ids(prompts, SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_actors_give_the_tokens_of_one_process(mixtral, prompts, expected, layout):
    with Server(mixtral, "--max-model-len", 64, "--device", "cpu", *LAYOUTS[layout]) as server:
        response = server.post(
            "/v1/completions",
            prompt=prompts,
            max_tokens=10,
            temperature=0,
            ignore_eos=True,
            return_token_ids=True,
        )
        assert response.status_code == 200, response.text
        assert [choice["token_ids"] for choice in response.json()["choices"]] == expected
        assert server.stop() == 0
        assert "Traceback" not in server.log()


def test_sigterm_ends_a_server_that_is_still_starting(mixtral):
    server = Server(mixtral)
    server.wait_for_log("starting 1 attention")
    assert server.stop() == 0
    assert "Traceback" not in server.log()
    assert "is ready" not in server.log()
