"""Every CPU kernel is tested with every instruction set that this machine can run, the portable one always among them."""

import pytest
import torch

from afd_server.kernels.library import usable_instruction_sets


@pytest.fixture(params=usable_instruction_sets())
def instruction_set(request):
    """With three threads: no size divides evenly among them."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield request.param
    torch.set_num_threads(before)
