"""What every test starts from: one thread for torch (two cores are shared with real server processes)."""

import pytest
import torch

NUM_THREADS = 1
torch.set_num_threads(NUM_THREADS)


def pytest_collection_modifyitems(items):
    """Where tests run side by side (`make test`), real servers run one after the other, beside the unit tests."""
    for item in items:
        if item.get_closest_marker("integration"):
            item.add_marker(pytest.mark.xdist_group("servers"))


@pytest.fixture
def other_numbers_of_threads():
    """For a test that changes it: threads that begin later take the last number that any thread has set."""
    yield
    torch.set_num_threads(NUM_THREADS)
