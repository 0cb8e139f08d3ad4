"""The FFN worker's loop: what waits together for a layer is one batch, and every caller gets its own rows."""

import threading
import time

import pytest
import torch

from afd_server.errors import WorkerDiedError, WorkerFailedError
from afd_server.ffn.merging import next_batch
from afd_server.ffn.worker import FFNWorker, merge
from afd_server.kernels.call_account import CallAccount
from afd_server.models.ffn_call import FFNCall
from afd_server.transport.base import CallTag, LinkShape
from afd_server.transport.inproc import InprocListener, _InprocCall

HIDDEN, LAYERS = 4, 8
SHAPE = LinkShape(max_rows=8, hidden_size=HIDDEN, top_k=2, wire_dtype="float32")


class LayerTimesX:
    """layer * x, noting the rows of each batch."""

    def __init__(self):
        self.batches = []

    def routed(self, call):
        return call

    def forward(self, call, out=None):
        self.batches.append((call.layer, call.x.shape[0]))
        y = call.x * call.layer
        return y if out is None else out.copy_(y)


def routed_call(layer, rows, value):
    ids = torch.full((rows, 2), value, dtype=torch.int32)
    return FFNCall(layer, torch.full((rows, HIDDEN), float(value)), ids, torch.rand(rows, 2))


def test_calls_that_wait_together_for_a_layer_are_one_batch():
    listener, half = InprocListener("ffn-0"), LayerTimesX()
    links = [listener.connect(SHAPE, replica) for replica in range(3)]
    layers = [5, 7, 5]
    for replica, (link, layer) in enumerate(zip(links, layers, strict=True)):
        link.send(CallTag(replica, 1, layer, 0), routed_call(layer, rows=replica + 1, value=replica + 1))
    worker = FFNWorker("ffn-0", half, listener, account=CallAccount(LAYERS))  # all three wait before it starts
    thread = threading.Thread(target=worker.serve, daemon=True)
    thread.start()
    answers = [link.receive(CallTag(r, 1, layers[r], 0), 10.0) for r, link in enumerate(links)]
    worker.stop()
    thread.join(10)
    assert half.batches == [(5, 4), (7, 2)]
    assert [answer.batch_rows for answer in answers] == [4, 2, 4]
    for replica, answer in enumerate(answers):
        expected = torch.full((replica + 1, HIDDEN), float(layers[replica] * (replica + 1)))
        assert torch.equal(answer.y, expected)


@pytest.mark.usefixtures("other_numbers_of_threads")
def test_the_number_of_threads_may_change_while_it_serves():
    class Counts(LayerTimesX):
        def forward(self, call, out=None):
            threads.append(torch.get_num_threads())
            return super().forward(call, out)

    listener, threads = InprocListener("ffn-0"), []
    worker = FFNWorker("ffn-0", Counts(), listener, account=CallAccount(LAYERS))
    link = listener.connect(SHAPE, 0)
    thread = threading.Thread(target=worker.serve, daemon=True)
    worker.threads = 3
    thread.start()
    deadline = time.monotonic() + 10
    for step in range(1000):
        tag = CallTag(0, step, 5, 0)
        link.send(tag, routed_call(5, rows=1, value=1))
        link.receive(tag, 10.0)
        worker.threads = 2
        if threads[-1] == 2 or time.monotonic() > deadline:
            break
    worker.stop()
    thread.join(10)
    assert (threads[0], threads[-1]) == (3, 2)


def test_calls_are_routed_one_by_one_before_they_are_merged():
    class RoutesHere(LayerTimesX):
        def __init__(self):
            super().__init__()
            self.routed_rows = []

        def routed(self, call):
            self.routed_rows.append(call.x.shape[0])
            ids = torch.zeros(call.x.shape[0], 2, dtype=torch.int32)
            return FFNCall(call.layer, call.x, ids, torch.ones(call.x.shape[0], 2))

    listener, half = InprocListener("ffn-0"), RoutesHere()
    shape = LinkShape(max_rows=8, hidden_size=HIDDEN, top_k=0, wire_dtype="float32")
    links = [listener.connect(shape, replica) for replica in range(2)]
    tags = [CallTag(replica, 1, 5, 0) for replica in range(2)]
    for rows, (link, tag) in enumerate(zip(links, tags, strict=True), start=1):
        link.send(tag, FFNCall(5, torch.ones(rows, HIDDEN)))
    worker = FFNWorker("ffn-0", half, listener, account=CallAccount(LAYERS))
    thread = threading.Thread(target=worker.serve, daemon=True)
    thread.start()
    for link, tag in zip(links, tags, strict=True):
        assert link.receive(tag, 10.0).batch_rows == 3
    worker.stop()
    thread.join(10)
    assert (half.routed_rows, half.batches) == ([1, 2], [(5, 3)])


def test_one_bad_call_does_not_fail_those_that_were_merged_with_it():
    class Picky(LayerTimesX):
        def forward(self, call, out=None):
            if (call.x == 13).any():
                raise ValueError("13 is not to be computed")
            return super().forward(call, out)

    listener = InprocListener("ffn-0")
    links = [listener.connect(SHAPE, replica) for replica in range(2)]
    tags = [CallTag(replica, 1, 5, 0) for replica in range(2)]
    for link, tag, value in zip(links, tags, (2, 13), strict=True):
        link.send(tag, routed_call(5, rows=1, value=value))
    worker = FFNWorker("ffn-0", Picky(), listener, account=CallAccount(LAYERS))
    thread = threading.Thread(target=worker.serve, daemon=True)
    thread.start()
    assert torch.equal(links[0].receive(tags[0], 10.0).y, torch.full((1, HIDDEN), 10.0))
    with pytest.raises(WorkerFailedError, match="13 is not to be computed"):
        links[1].receive(tags[1], 10.0)
    worker.stop()
    thread.join(10)


def test_a_worker_that_is_to_be_restarted_tells_the_reason_and_ends():
    class Broken(LayerTimesX):
        def forward(self, call, out=None):
            raise ValueError("the device is gone")

    listener, tag = InprocListener("ffn-0"), CallTag(0, 1, 5, 0)
    link = listener.connect(SHAPE, 0)
    link.send(tag, routed_call(5, rows=1, value=1))
    worker = FFNWorker("ffn-0", Broken(), listener, account=CallAccount(LAYERS), end_at_failure=True)
    thread = threading.Thread(target=worker.serve, daemon=True)
    thread.start()
    with pytest.raises(WorkerFailedError, match="ValueError: the device is gone"):
        link.receive(tag, 10.0)
    thread.join(10)
    assert not thread.is_alive()
    assert worker.failure == "ValueError: the device is gone"
    with pytest.raises(WorkerDiedError):
        listener.connect(SHAPE, 0)


def test_how_long_it_has_been_at_one_batch():
    class Slow(LayerTimesX):
        def forward(self, call, out=None):
            working.set()
            assert release.wait(10)
            return super().forward(call, out)

    working, release = threading.Event(), threading.Event()
    listener, tag = InprocListener("ffn-0"), CallTag(0, 1, 5, 0)
    link = listener.connect(SHAPE, 0)
    worker = FFNWorker("ffn-0", Slow(), listener, account=CallAccount(LAYERS))
    with torch.inference_mode():
        assert not worker.serve_once(0.0)
    idle_at = worker.progressed_at
    link.send(tag, routed_call(5, rows=1, value=1))
    thread = threading.Thread(target=worker.serve, daemon=True)
    thread.start()
    assert working.wait(10)
    busy_at = worker.progressed_at
    assert busy_at >= idle_at
    assert worker.progressed_at == busy_at  # it stays while the batch is computed
    release.set()
    link.receive(tag, 10.0)
    worker.stop()
    thread.join(10)
    assert worker.progressed_at >= busy_at


def test_next_batch_takes_the_oldest_layer_and_leaves_the_rest_in_order():
    class Waiting:
        def __init__(self, layer):
            self.call = FFNCall(layer, torch.zeros(1, HIDDEN))

    waiting = [Waiting(layer) for layer in (2, 1, 2, 3)]
    batch, rest = next_batch(waiting)
    assert batch == [waiting[0], waiting[2]]
    assert rest == [waiting[1], waiting[3]]


def test_merge_keeps_rows_in_order_and_dense_calls_dense():
    merged = merge([routed_call(1, 2, 1), routed_call(1, 1, 2)])
    assert merged.x[:, 0].tolist() == [1, 1, 2]
    assert merged.topk_ids[:, 0].tolist() == [1, 1, 2]
    assert merged.topk_weights.shape == (3, 2)
    dense = merge([FFNCall(0, torch.zeros(1, 4)), FFNCall(0, torch.zeros(2, 4))])
    assert dense.topk_ids is None
    assert dense.topk_weights is None


def test_a_device_that_fails_while_its_work_is_waited_for_is_a_failure_to_compute(monkeypatch):
    def fail(call):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    listener = InprocListener("ffn-0")
    link, tag = listener.connect(SHAPE, 0), CallTag(0, 1, 5, 0)
    worker = FFNWorker("ffn-0", LayerTimesX(), listener, account=CallAccount(LAYERS), end_at_failure=True)
    link.send(tag, routed_call(5, rows=1, value=1))
    monkeypatch.setattr(_InprocCall, "finish", fail)
    worker.serve()
    with pytest.raises(WorkerFailedError, match="RuntimeError: CUDA error"):
        link.receive(tag, 10.0)


def test_calls_are_noted_only_while_somebody_records_and_always_summed():
    listener = InprocListener("ffn-0")
    link = listener.connect(SHAPE, 3)
    worker = FFNWorker("ffn-0", LayerTimesX(), listener, account=CallAccount(LAYERS, range(2, 4)))
    number = None
    for step in (1, 2):
        tag = CallTag(3, step, 5, 1)
        link.send(tag, routed_call(5, rows=2, value=3))
        with torch.inference_mode():
            assert worker.serve_once(0.0)
        link.receive(tag, 10.0)
        number = number if number is not None else worker.recorder.begin(60.0)
    spans, missing = worker.recorder.end(number)
    assert missing == 0
    assert [(s.name, s.step, s.layer, s.micro_batch, s.peer, s.rows) for s in spans] == [
        ("queue", 2, 5, 1, "attention-3", 2),
        ("ffn", 2, 5, 1, "attention-3", 2),
    ]
    assert spans[0].began_s <= spans[0].ended_s == spans[1].began_s <= spans[1].ended_s
    total = worker.account.totals.read()[5]
    assert (total.batches, total.rows) == (2, 4)
    assert worker.account.tokens()[5].tolist() == [0, 8]
