"""Device memory shared by two real processes on one GPU: what test_device_memory.py leaves to the CUDA driver."""

import multiprocessing
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import pytest
import torch

from afd_server.errors import WorkerDiedError
from afd_server.models.ffn_call import FFNCall
from afd_server.transport import device_memory
from afd_server.transport.base import CallTag, Endpoint, LinkShape
from afd_server.transport.connect import connect
from afd_server.transport.device_memory import DeviceMemoryError, map_device_memory, share_device_memory
from afd_server.transport.link import SocketLink
from afd_server.transport.wire import quantize_rows

from .gpu_worker import DEADLINE_S, SECRET, UNANSWERED_LAYER, call_and_be_killed, serve_doubled

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
SHAPE = LinkShape(max_rows=64, hidden_size=1024, top_k=2, wire_dtype="bfloat16")


def start(target, *args) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, CUDA, *args), daemon=True)
    process.start()
    assert ours.poll(DEADLINE_S)
    return process, ours


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    process, pipe = start(serve_doubled)
    yield pipe.recv()
    pipe.send("stop")
    process.join(DEADLINE_S)
    assert process.exitcode == 0


def open_link(endpoint: Endpoint, shape: LinkShape = SHAPE) -> SocketLink:
    link = connect(endpoint, shape, 0, SECRET, "shm", DEADLINE_S, CUDA)
    assert not link._slots.on_host
    return link


def wait_until_dropped() -> None:
    deadline = time.monotonic() + DEADLINE_S
    while device_memory._kept and time.monotonic() < deadline:
        device_memory.free_dropped()
        time.sleep(0.001)
    assert not device_memory._kept


@pytest.mark.parametrize("wire_dtype", ["float32", "bfloat16", "fp8"])
def test_calls_and_answers_cross_in_every_encoding(endpoint: Endpoint, wire_dtype: str) -> None:
    link = open_link(endpoint, LinkShape(64, 1024, 2, wire_dtype))
    generator = torch.Generator(device=CUDA).manual_seed(1)
    for step in range(50):
        expected = {}
        for micro_batch in range(4):
            rows = 1 + (step * 7 + micro_batch * 13) % 64
            x_TH = torch.randn(rows, 1024, generator=generator, device=CUDA)
            ids_TK = torch.randint(0, 48, (rows, 2), generator=generator, device=CUDA, dtype=torch.int32)
            weights_TK = torch.rand(rows, 2, generator=generator, device=CUDA)
            routed = micro_batch % 2 == 1
            call = FFNCall(0, x_TH, ids_TK, weights_TK) if routed else FFNCall(0, x_TH, None, None)
            decoded_TH = x_TH if wire_dtype == "float32" else x_TH.bfloat16()
            if wire_dtype == "fp8":
                quantized_TH, scales_T1 = quantize_rows(x_TH)
                decoded_TH = (quantized_TH.float() * scales_T1).bfloat16()
            y_TH = decoded_TH.float() * 2
            if routed:
                y_TH += (ids_TK * weights_TK).sum(dim=1, keepdim=True)
            expected[micro_batch] = y_TH if wire_dtype == "float32" else y_TH.bfloat16()
            link.send(CallTag(0, step, 0, micro_batch), call)
            x_TH.zero_()  # it is the sender's own again
        for micro_batch, y_TH in reversed(expected.items()):
            assert torch.equal(link.receive(CallTag(0, step, 0, micro_batch), DEADLINE_S).y, y_TH)
    link.close()


def test_closed_links_give_their_memory_back(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    let_go, freed = device_memory._let_go, []
    monkeypatch.setattr(device_memory, "_let_go", lambda *args: freed.append(let_go(*args)))
    for count in range(1, 4):
        open_link(endpoint, LinkShape(4096, 4096, 0, "bfloat16")).close()
        wait_until_dropped()
        assert len(freed) == count
    assert caplog.text == ""


def test_a_view_keeps_the_memory_of_a_closed_link(endpoint: Endpoint) -> None:
    link = open_link(endpoint)
    tag = CallTag(0, 1, 0, 0)
    link.send(tag, FFNCall(0, torch.ones(64, 1024, device=CUDA), None, None))
    y_TH = link.receive(tag, DEADLINE_S).y
    link.close()
    del link
    wait_until_dropped()
    torch.cuda.synchronize()
    assert (y_TH == 2).all()


def test_the_worker_outlives_a_caller_that_is_killed(endpoint: Endpoint) -> None:
    caller, pipe = start(call_and_be_killed, endpoint, SHAPE)
    assert pipe.recv() == (False, 2.0)
    caller.join(DEADLINE_S)
    assert caller.exitcode == -signal.SIGKILL
    test_calls_and_answers_cross_in_every_encoding(endpoint, "bfloat16")


def test_a_caller_outlives_a_worker_that_is_killed() -> None:
    worker, pipe = start(serve_doubled)
    link = open_link(pipe.recv())
    tag = CallTag(0, 1, UNANSWERED_LAYER, 0)
    link.send(tag, FFNCall(UNANSWERED_LAYER, torch.ones(64, 1024, device=CUDA), None, None))
    worker.kill()
    with pytest.raises(WorkerDiedError):
        link.receive(tag, DEADLINE_S)
    del link
    worker.join(DEADLINE_S)
    wait_until_dropped()
    assert float(torch.ones(1000, device=CUDA).sum()) == 1000.0


def test_a_handle_that_nobody_made_maps_nothing() -> None:
    with pytest.raises(DeviceMemoryError, match="mapping the caller's device memory"):
        map_device_memory(bytes(64), 4096, CUDA)
    assert float(torch.ones(1000, device=CUDA).sum()) == 1000.0


def test_what_does_not_fit_the_device_is_refused() -> None:
    with pytest.raises(DeviceMemoryError, match="out of memory"):
        share_device_memory(1 << 42, CUDA)
