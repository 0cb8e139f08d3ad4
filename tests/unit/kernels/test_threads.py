"""Helper threads change neither results nor one another's work."""

import threading

import pytest
import torch

from afd_server.kernels.experts import PackedExperts, run_experts
from afd_server.kernels.matmul import PackedMatrix, linear


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_any_number_of_threads_gives_the_same_bits(threads, instruction_set):
    packed = PackedMatrix.pack([random(3000, 200)], "float32", instruction_set)
    x = random(30, 200, seed=1)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(linear(x, packed, None, instruction_set))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_kernels_of_two_threads_at_once(threads):
    """As with `--executor local`, where both sides of the model are threads of one process."""
    threads(3)
    matrix = PackedMatrix.pack([random(2000, 100)], "float32")
    experts = PackedExperts.pack(list(random(4, 64, 100) / 8), list(random(4, 100, 32, seed=1) / 8), "float32")
    x, ids = random(40, 100, seed=2), torch.arange(80, dtype=torch.int32).view(40, 2) % 4
    weights = torch.ones(40, 2)

    def attention_side():
        return linear(x, matrix)

    def ffn_side():
        return run_experts(x, experts, ids, weights, first_expert=0, num_experts=4)

    expected = {side: side() for side in (attention_side, ffn_side)}
    wrong = []

    def repeat(side):
        torch.set_num_threads(3)
        wrong.extend(turn for turn in range(300) if not torch.equal(side(), expected[side]))

    running = [threading.Thread(target=repeat, args=(side,)) for side in expected for _ in range(2)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert wrong == []
