"""What every test starts from: one thread for torch (two cores are shared with real server processes)."""

import pytest
import torch

NUM_THREADS = 1
torch.set_num_threads(NUM_THREADS)


@pytest.fixture
def other_numbers_of_threads():
    """For a test that changes it: threads that begin later take the last number that any thread has set."""
    yield
    torch.set_num_threads(NUM_THREADS)
