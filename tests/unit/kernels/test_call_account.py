"""How often experts are chosen: counted for those that a worker holds, whatever it is sent."""

import torch

from afd_server.kernels.call_account import COUNTED_ON_GPU, CallAccount

IDS = torch.tensor([[2, 5], [3, 2], [-1, 1 << 30]], dtype=torch.int32)


def test_experts_of_others_and_of_nobody_are_passed_over():
    account = CallAccount(2, range(2, 5))
    ids = IDS.clone()
    account.note(1, ids)
    account.note(1, IDS[:1])
    ids.fill_(4)  # the slot is the caller's again
    account.count()
    account.count()
    assert account.tokens().tolist() == [[0, 0, 0], [3, 1, 0]]


def test_a_worker_without_experts_counts_none():
    account = CallAccount(2)
    account.note(1, IDS)
    account.count()
    assert account.tokens().shape == (2, 0)


def test_on_a_device_some_calls_stand_for_all():
    """The device's way, on the memory of this host."""
    account = CallAccount(1, range(2, 5))
    account._count_on_device(0, IDS)
    assert account.tokens().tolist() == [[2 * COUNTED_ON_GPU, COUNTED_ON_GPU, 0]]
