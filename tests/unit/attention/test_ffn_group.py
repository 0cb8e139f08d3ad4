"""The FFN side as attention sees it: dividing, summing, and getting an answer although a worker dies.

The workers are real FFNWorker threads behind in-process listeners. Their arithmetic is a formula that names the experts
a shard owns, so that a row sent to the wrong shard, or to none, shows in the sum.
"""

import threading

import pytest
import torch

from afd_server.attention.dispatch import GroupLayout
from afd_server.attention.ffn_group import FFNGroup
from afd_server.attention.hop_notes import HopNotes
from afd_server.config import SPARSE_DISPATCH_FROM
from afd_server.errors import WorkerDiedError, WorkerFailedError, WorkerGivenUpError, WorkerTimeoutError
from afd_server.ffn.worker import FFNWorker
from afd_server.kernels.call_account import CallAccount
from afd_server.models.ffn_call import FFNCall
from afd_server.transport.base import LinkShape
from afd_server.transport.connect import connect
from afd_server.transport.inproc import InprocListener
from afd_server.transport.listener import SocketListener

HIDDEN, EXPERTS, TOP_K, ROWS = 8, 16, 3, 12
LAYERS = 64
SHAPE = LinkShape(max_rows=64, hidden_size=HIDDEN, top_k=TOP_K, wire_dtype="float32")


class ExpertRange:
    """Expert e multiplies by e + 1; a dense layer multiplies by 1 / shards."""

    def __init__(self, first, last, share):
        self.first, self.last, self.share = first, last, share
        self.rows_seen = []

    def routed(self, call):
        return call

    def forward(self, call, out=None):
        self.rows_seen.append(call.x.shape[0])
        if call.topk_ids is None:
            y = call.x * self.share
        else:
            mine = (call.topk_ids >= self.first) & (call.topk_ids < self.last)
            y = call.x * (mine * call.topk_weights * (call.topk_ids + 1)).sum(1, keepdim=True) * self.share
        return y if out is None else out.copy_(y)


class Workers:
    """`replicas` x `ep` x `tp` workers on threads."""

    def __init__(self, replicas=1, ep=1, tp=1):
        self.layout = GroupLayout(ep, tp, EXPERTS)
        self.halves, self.listeners, self.workers, self.threads = [], [], [], []
        for index in range(replicas * ep * tp):
            rank = index // tp % ep
            self.halves.append(ExpertRange(EXPERTS * rank // ep, EXPERTS * (rank + 1) // ep, 1 / tp))
            self.listeners.append(None), self.workers.append(None), self.threads.append(None)
            self.start(index)

    def start(self, index):
        self.listeners[index] = InprocListener(f"ffn-{index}")
        self.workers[index] = FFNWorker(
            f"ffn-{index}", self.halves[index], self.listeners[index], account=CallAccount(LAYERS)
        )
        self.threads[index] = threading.Thread(target=self.workers[index].serve, daemon=True)
        self.threads[index].start()

    def stop(self, index):
        self.workers[index].stop()
        self.threads[index].join(10)

    def connector(self, index, replica=0):
        listener = self.listeners[index]
        return lambda timeout_s: listener.connect(SHAPE, replica)

    def group(self, timeout_s=10.0):
        connectors = {index: self.connector(index) for index in range(len(self.workers))}
        group = FFNGroup(
            connectors, self.layout, replica=0, dtype=torch.float32, timeout_s=timeout_s, hops=HopNotes(LAYERS)
        )
        group.begin_step(1)
        return group


@pytest.fixture
def start_workers():
    started = []

    def start(**layout):
        started.append(Workers(**layout))
        return started[-1]

    yield start
    for workers in started:
        for index in range(len(workers.workers)):
            workers.stop(index)


def moe_call(layer=0, rows=ROWS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(rows)]).to(
        torch.int32
    )
    return FFNCall(
        layer, torch.randn(rows, HIDDEN, generator=generator), ids, torch.rand(rows, TOP_K, generator=generator)
    )


def expected(call):
    return call.x * (call.topk_weights * (call.topk_ids + 1)).sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("replicas", "ep", "tp"), [(1, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2), (1, 4, 1), (1, 4, 2), (1, 5, 1)]
)
def test_sum_of_the_shards_is_the_whole(start_workers, replicas, ep, tp):
    group = start_workers(replicas=replicas, ep=ep, tp=tp).group()
    for seed in range(3):
        call = moe_call(seed=seed)
        group.send(0, call)
        torch.testing.assert_close(group.receive(0), expected(call))
    group.close()


def test_a_dense_layer_goes_to_every_shard(start_workers):
    group = start_workers(tp=3).group()
    call = FFNCall(2, torch.randn(5, HIDDEN))
    group.send(1, call)
    torch.testing.assert_close(group.receive(1), call.x)
    group.close()


def test_micro_batches_are_kept_apart(start_workers):
    group = start_workers(ep=2).group()
    calls = [moe_call(seed=index, rows=index + 1) for index in range(4)]
    for index, call in enumerate(calls):
        group.send(index, call)
    for index in (2, 0, 3, 1):
        torch.testing.assert_close(group.receive(index), expected(calls[index]))
    group.close()


def test_many_shards_are_sent_only_the_rows_they_own_an_expert_of(start_workers):
    workers = start_workers(ep=SPARSE_DISPATCH_FROM)
    group = workers.group()
    call = moe_call()
    call.topk_ids[:] = torch.tensor([0, 1, 2], dtype=torch.int32)  # all in the first shard's range
    call.topk_ids[3, 2] = EXPERTS - 1
    group.send(0, call)
    torch.testing.assert_close(group.receive(0), expected(call))
    assert [half.rows_seen for half in workers.halves] == [[ROWS], [], [], [1]]
    group.close()


@pytest.mark.parametrize("moment", ["before the call", "under way"])
def test_a_dead_workers_call_goes_to_another_replica_of_the_shard(start_workers, moment):
    workers = start_workers(replicas=2, ep=2)
    group = workers.group()
    group.connect()
    call = moe_call()
    if moment == "before the call":
        workers.stop(0)
        group.send(0, call)
    else:
        workers.stop(0)  # nobody serves its queue; then it is gone for good
        workers.listeners[0] = InprocListener("ffn-0")
        group.replace(0, workers.connector(0))
        group._drop(0)
        group.send(0, call)
        workers.listeners[0].close()
    torch.testing.assert_close(group.receive(0), expected(call))
    assert workers.halves[2].rows_seen == [ROWS]
    group.close()


def test_without_a_replica_the_call_waits_for_the_restarted_worker(start_workers):
    workers = start_workers()
    group = workers.group()
    group.connect()
    workers.stop(0)
    call = moe_call()

    def restart():
        workers.start(0)
        group.replace(0, workers.connector(0))

    restarting = threading.Timer(0.1, restart)
    restarting.start()
    group.send(0, call)
    torch.testing.assert_close(group.receive(0), expected(call))
    group.close()


def test_a_worker_that_stays_away_ends_in_an_error_with_worker_layer_and_step(start_workers):
    workers = start_workers()
    group = workers.group(timeout_s=0.2)
    group.connect()
    workers.stop(0)
    with pytest.raises(WorkerTimeoutError, match=r"ffn-0, layer 3, step 1: .*0\.2 s"):
        group.send(0, moe_call(layer=3))


def test_a_worker_that_hangs_ends_in_an_error_and_the_next_step_starts_afresh(start_workers):
    workers = start_workers()
    group = workers.group(timeout_s=0.2)
    release = threading.Event()
    half, healthy = workers.halves[0], workers.halves[0].forward
    half.forward = lambda call, out=None: release.wait(10) and healthy(call, out)
    group.send(0, moe_call())
    with pytest.raises(WorkerTimeoutError, match="ffn-0"):
        group.receive(0)
    half.forward = healthy
    release.set()
    group.begin_step(2)
    call = moe_call(seed=4)
    group.send(0, call)
    torch.testing.assert_close(group.receive(0), expected(call))
    group.close()


def test_a_hanging_workers_calls_go_to_another_replica_and_it_is_asked_last_from_then_on(start_workers):
    workers = start_workers(replicas=2)
    group = workers.group(timeout_s=2.0)
    release = threading.Event()
    half, healthy = workers.halves[0], workers.halves[0].forward
    half.forward = lambda call, out=None: release.wait(20) and healthy(call, out)
    try:
        for seed in range(3):
            call = moe_call(seed=seed)
            group.send(0, call)
            torch.testing.assert_close(group.receive(0), expected(call))
        assert workers.halves[1].rows_seen == [ROWS] * 3
        assert half.rows_seen == []
    finally:
        release.set()
        group.close()


def broken(call, out=None):
    raise ValueError("expert 3 is broken")


def test_an_exception_in_the_expert_code_sends_the_call_to_another_replica(start_workers):
    workers = start_workers(replicas=2)
    group = workers.group()
    workers.halves[0].forward = broken
    call = moe_call()
    group.send(0, call)
    torch.testing.assert_close(group.receive(0), expected(call))
    assert group.timing.num_resent == 1
    group.send(0, call)  # the other one is asked first from now on
    torch.testing.assert_close(group.receive(0), expected(call))
    assert group.timing.num_resent == 1
    group.close()


def test_an_exception_in_the_only_worker_sends_the_call_to_it_again_after_its_restart():
    """As between processes: over a unix socket, to a worker that ends at its first failure and is started again."""
    secret, half, listeners = b"s" * 32, ExpertRange(0, EXPERTS, 1.0), []
    healthy, half.forward = half.forward, broken

    def run_worker():
        for _ in range(2):
            listeners.append(SocketListener("ffn-0", "node", secret, host="127.0.0.1"))
            worker = FFNWorker("ffn-0", half, listeners[-1], account=CallAccount(LAYERS), end_at_failure=True)
            group.replace(
                0, lambda timeout_s: connect(listeners[-1].endpoint, SHAPE, 0, secret, "shm", timeout_s)
            )
            workers.append(worker)
            started.set()
            worker.serve()
            half.forward = healthy  # whatever broke, a restart has mended it

    def not_yet(timeout_s):
        raise WorkerDiedError("ffn-0", "not yet")

    workers, started = [], threading.Event()
    group = FFNGroup(
        {0: not_yet},
        GroupLayout(1, 1, EXPERTS),
        replica=0,
        dtype=torch.float32,
        timeout_s=20.0,
        hops=HopNotes(LAYERS),
    )
    group.begin_step(1)
    thread = threading.Thread(target=run_worker, daemon=True)
    thread.start()
    assert started.wait(10)
    call = moe_call()
    group.send(0, call)
    torch.testing.assert_close(group.receive(0), expected(call))
    assert [worker.failure for worker in workers] == ["ValueError: expert 3 is broken", ""]
    group.close()
    workers[1].stop()
    thread.join(10)


def test_a_call_that_no_worker_can_compute_ends_with_the_first_cause_after_a_few_failures(start_workers):
    workers = start_workers(replicas=2)
    group = workers.group()
    failures = []

    def breaks(index):
        def forward(call, out=None):
            failures.append(index)
            raise ValueError(f"failure {len(failures)} of this call")

        return forward

    healthy = [half.forward for half in workers.halves]
    for index, half in enumerate(workers.halves):
        half.forward = breaks(index)
    group.send(0, moe_call(layer=2))
    with pytest.raises(WorkerFailedError, match=r"ffn-0, layer 2, step 1: ValueError: failure 1 of this call"):
        group.receive(0)
    assert failures == [0, 1, 0]
    for half, forward in zip(workers.halves, healthy, strict=True):
        half.forward = forward
    group.begin_step(2)  # these workers live on
    call = moe_call()
    group.send(0, call)
    torch.testing.assert_close(group.receive(0), expected(call))
    group.close()


def test_a_worker_given_up_fails_its_calls_at_once_with_the_reason(start_workers):
    workers = start_workers()
    group = workers.group(timeout_s=60.0)
    group.connect()
    call = moe_call(layer=3)
    working, release = threading.Event(), threading.Event()

    def dies(call, out=None):
        working.set()
        assert release.wait(10)
        workers.workers[0].stop()
        raise ValueError("and so it ends")

    workers.halves[0].forward = dies
    group.send(0, call)
    assert working.wait(10)
    group.give_up(0, "it died 10 times")  # the call is still with it
    release.set()
    with pytest.raises(WorkerGivenUpError, match="ffn-0, step 1: it died 10 times"):
        group.receive(0)
    group.begin_step(2)
    with pytest.raises(WorkerGivenUpError):
        group.send(0, call)
    group.connect()  # an attention worker may still start
    group.close()


def test_what_is_missing_for_a_worker_to_be_placed_is_in_the_error_at_the_deadline(start_workers):
    workers = start_workers()
    group = workers.group(timeout_s=0.2)
    workers.stop(0)

    def ask():
        group.begin_step(1)
        group.send(0, moe_call())
        group.receive(0)

    with pytest.raises(WorkerTimeoutError, match="ffn-0, layer"):
        ask()
    group.unplaced = {0: "it needs 1 ffn"}
    with pytest.raises(WorkerTimeoutError, match=r"ffn-0, layer .*: cannot be placed: it needs 1 ffn"):
        ask()
    group.close()


def test_a_replica_given_up_is_passed_over_and_one_that_comes_back_is_asked_again(start_workers):
    workers = start_workers(replicas=2)
    group = workers.group()
    group.give_up(0, "it died 10 times")
    call = moe_call()
    group.send(0, call)
    torch.testing.assert_close(group.receive(0), expected(call))
    assert workers.halves[0].rows_seen == []
    group.replace(0, workers.connector(0))
    group.send(0, call)
    torch.testing.assert_close(group.receive(0), expected(call))
    assert workers.halves[0].rows_seen == [ROWS]
    group.close()


def test_the_start_waits_for_a_worker_that_restarts(start_workers):
    workers = start_workers()
    workers.stop(0)
    group = workers.group()
    refused = threading.Event()

    def dial(timeout_s):  # the workers' present listener, as a worker's present endpoint
        try:
            return workers.connector(0)(timeout_s)
        except WorkerDiedError:
            refused.set()
            raise

    group.replace(0, dial)
    restarting = threading.Thread(target=lambda: refused.wait(10) and workers.start(0))
    restarting.start()
    group.connect()
    assert refused.is_set()
    call = moe_call()
    group.send(0, call)
    torch.testing.assert_close(group.receive(0), expected(call))
    group.close()
    restarting.join()


def test_nobody_there_at_start_is_an_error():
    def refuse(timeout_s):
        raise WorkerDiedError("ffn-0", "cannot be reached: connection refused")

    group = FFNGroup(
        {0: refuse}, GroupLayout(1, 1, 0), replica=0, dtype=torch.float32, timeout_s=0.1, hops=HopNotes(LAYERS)
    )
    with pytest.raises(WorkerDiedError, match="refused"):
        group.connect()


def test_a_new_replica_takes_part_and_an_old_one_leaves_between_two_calls(start_workers):
    workers = start_workers(replicas=2, ep=2)
    group = FFNGroup({0: workers.connector(0, 1), 1: workers.connector(1, 1)}, workers.layout, replica=1,
                     dtype=torch.float32, timeout_s=10.0, hops=HopNotes(LAYERS))  # fmt: skip
    group.connect()

    def one_step(step):
        group.begin_step(step)
        call = moe_call(seed=step)
        group.send(0, call)
        torch.testing.assert_close(group.receive(0), expected(call))
        return [len(half.rows_seen) for half in workers.halves]

    assert one_step(1) == [1, 1, 0, 0]
    for index in (2, 3):
        group.replace(index, workers.connector(index, 1))
    assert one_step(2) == [1, 1, 1, 1]  # attention replica 1 prefers FFN replica 1, now that there is one
    for index in (0, 1):
        assert group.retire(index, 1.0)
        workers.stop(index)
    assert one_step(3) == [1, 1, 2, 2]
    workers.stop(2)
    workers.start(2)
    group.replace(2, workers.connector(2, 1))  # nobody else has its shard any more
    assert one_step(4) == [1, 1, 3, 3]
    group.close()


def test_a_call_under_way_ends_at_the_replica_that_leaves(start_workers):
    workers = start_workers(replicas=2)
    group = workers.group()
    working, release = threading.Event(), threading.Event()
    half, healthy = workers.halves[0], workers.halves[0].forward

    def slow(call, out=None):
        working.set()
        assert release.wait(10)
        return healthy(call, out)

    half.forward = slow
    call, left = moe_call(), []
    group.send(0, call)
    assert working.wait(10)
    leaving = threading.Thread(target=lambda: left.append(group.retire(0, 10.0)))
    leaving.start()
    assert not group.retire(0, 0.02)  # it is still at it
    release.set()
    torch.testing.assert_close(group.receive(0), expected(call))
    leaving.join(10)
    assert left == [True]
    assert [len(half.rows_seen) for half in workers.halves] == [1, 0]
    group.send(0, call)
    torch.testing.assert_close(group.receive(0), expected(call))
    assert [len(half.rows_seen) for half in workers.halves] == [1, 1]
    group.close()
