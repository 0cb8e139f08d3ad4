"""Some hundred requests, many of them left in mid-stream: what the server's processes hold is what they held before.

benchmarks/leaks.py asks by the thousand and fits slopes; this is its short form, which finds what is lost with every request.
"""

import asyncio
import sys
from pathlib import Path

import psutil
import pytest

from tests.checkpoints import write_checkpoint, write_tokenizer
from tests.server_process import Server

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from leaks import churn, looks_at

pytestmark = pytest.mark.integration

WARM_UP, REQUESTS, CONCURRENCY, LEAVE_SHARE = 150, 300, 8, 0.4
# A lost request holds a task, a stream and its tokens: several kilobytes in each process.
MOST_BYTES = 12 * 2**20
# Connections that end and pools that grow to their size.
MOST_MORE = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = write_checkpoint(
        "llama", tmp_path_factory.mktemp("models") / "llama", max_position_embeddings=1024
    )
    return write_tokenizer(directory)


def test_nothing_is_left_of_requests_that_ended(model):
    with Server(model, "--attention-workers", "2", "--kv-cache-memory-bytes", "4000000") as server:
        process = psutil.Process(server.process.pid)
        asyncio.run(churn(server.url, WARM_UP, CONCURRENCY, LEAVE_SHARE, seed=0))
        before, shared_before = looks_at(process, 0), len(list(Path("/dev/shm").iterdir()))
        kinds = asyncio.run(churn(server.url, REQUESTS, CONCURRENCY, LEAVE_SHARE, seed=1))
        after = looks_at(process, REQUESTS)
        assert kinds["left"] > REQUESTS / 5
        assert len(list(Path("/dev/shm").iterdir())) <= shared_before + 1  # others on this machine have theirs
        for key, look in after.items():
            if key in before:
                assert look.descriptors <= before[key].descriptors + MOST_MORE, key
                assert look.threads <= before[key].threads + MOST_MORE, key
                assert look.own_bytes <= before[key].own_bytes + MOST_BYTES, key
        assert server.metric("afd:num_requests_running") == 0
        assert server.metric("afd:request_success_total", finished_reason="error") == 0
