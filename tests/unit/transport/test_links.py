"""What every kind of link does, whatever carries it: the same tests over threads, shared memory of a host and of a GPU, and TCP."""

import threading
from collections.abc import Iterator

import pytest
import torch

from afd_server.errors import WorkerDiedError, WorkerError, WorkerTimeoutError
from afd_server.transport.base import LinkShape

from .wiring import DEADLINE_S, SHAPE, Wiring, random_call, serve, tag, wired


@pytest.fixture(params=["inproc", "shm", "device", "tcp"])
def wiring(request: pytest.FixtureRequest) -> Iterator[Wiring]:
    with wired(request.param) as wiring:
        yield wiring


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize(
    ("wire_dtype", "decoded", "tolerance"),
    [("float32", torch.float32, 0.0), ("bfloat16", torch.bfloat16, 0.01), ("fp8", torch.bfloat16, 0.07)],
)
def test_a_call_arrives_as_sent_and_its_answer_comes_back(
    wiring: Wiring, wire_dtype: str, decoded: torch.dtype, tolerance: float, routed: bool
) -> None:
    shape = LinkShape(8, 16, 2, wire_dtype)
    link = wiring.link(shape, replica=3)
    sent, name = (
        random_call(shape, rows=5, layer=9, routed=routed),
        tag(step=4, layer=9, micro_batch=2, replica=3),
    )
    link.send(name, sent)
    (call,) = wiring.calls(1)
    assert call.tag == name
    assert call.call.layer == 9
    assert call.call.x.dtype == decoded
    torch.testing.assert_close(call.call.x.float(), sent.x, rtol=tolerance, atol=1e-6)
    if routed:
        assert torch.equal(call.call.topk_ids, sent.topk_ids)
        assert torch.equal(call.call.topk_weights, sent.topk_weights)
    else:
        assert call.call.topk_ids is call.call.topk_weights is None
    call.answer_buffer().copy_(torch.arange(80).view(5, 16))
    call.answer(ffn_us=11, batch_rows=13)
    answer = link.receive(name, DEADLINE_S)
    assert answer.y.dtype == decoded
    assert torch.equal(answer.y.float(), torch.arange(80.0).view(5, 16))
    assert (answer.ffn_us, answer.batch_rows) == (11, 13)
    assert answer.queue_us >= 0


def test_the_senders_tensors_are_its_own_again_after_send(wiring: Wiring) -> None:
    link = wiring.link()
    call = random_call(SHAPE, rows=3, routed=True)
    expected = call.x.clone()
    link.send(tag(), call)
    call.x.zero_()
    serve(wiring.calls(1)[0])
    assert torch.equal(link.receive(tag(), DEADLINE_S).y, expected * 2)


def test_slots_are_reused_by_calls_of_other_sizes(wiring: Wiring) -> None:
    link = wiring.link()
    for step, rows in enumerate([8, 1, 5, 8, 2]):
        call = random_call(SHAPE, rows, routed=bool(step % 2), seed=step)
        link.send(tag(step), call)
        serve(wiring.calls(1)[0])
        assert torch.equal(link.receive(tag(step), DEADLINE_S).y, call.x * 2)


def test_micro_batches_are_answered_and_received_in_any_order(wiring: Wiring) -> None:
    link = wiring.link()
    sent = {micro_batch: random_call(SHAPE, rows=micro_batch + 1, seed=micro_batch) for micro_batch in range(4)}
    for micro_batch, call in sent.items():
        link.send(tag(micro_batch=micro_batch), call)
    calls = {call.tag.micro_batch: call for call in wiring.calls(4)}
    for micro_batch in (2, 0, 3, 1):
        serve(calls[micro_batch])
    answers = {m: link.receive(tag(micro_batch=m), DEADLINE_S).y for m in (1, 2, 0, 3)}
    for micro_batch, y in answers.items():
        assert torch.equal(y, sent[micro_batch].x * 2)


def test_megabytes_both_ways_at_once_do_not_block_each_other(wiring: Wiring) -> None:
    shape = LinkShape(1024, 1024, 0, "float32")  # 4 MB a call: far more than the sockets hold
    link = wiring.link(shape)
    stopping = threading.Event()

    def answer_everything() -> None:
        while not stopping.is_set():
            for call in wiring.listener.wait(0.01):
                serve(call)

    server = threading.Thread(target=answer_everything)
    server.start()
    try:
        call = random_call(shape, rows=1024)
        for step in range(2):
            for micro_batch in range(4):  # all under way before the first answer is read
                link.send(tag(step, micro_batch=micro_batch), call)
            for micro_batch in range(4):
                y = link.receive(tag(step, micro_batch=micro_batch), DEADLINE_S).y
                assert torch.equal(y, call.x * 2)
    finally:
        stopping.set()
        server.join()


def test_links_of_two_replicas_are_served_together(wiring: Wiring) -> None:
    links = [wiring.link(replica=replica) for replica in range(2)]
    calls = [random_call(SHAPE, rows=2, seed=replica) for replica in range(2)]
    for replica, link in enumerate(links):
        link.send(tag(replica=replica), calls[replica])
    for incoming in wiring.calls(2):
        serve(incoming)
    for replica, link in enumerate(links):
        assert torch.equal(link.receive(tag(replica=replica), DEADLINE_S).y, calls[replica].x * 2)


def test_a_failure_reaches_the_caller_with_its_reason(wiring: Wiring) -> None:
    link = wiring.link()
    link.send(tag(step=5, layer=3), random_call(SHAPE, 1, layer=3))
    wiring.calls(1)[0].fail("IndexError: no expert 61 — only 60")
    with pytest.raises(WorkerError, match="worker ffn-0, layer 3, step 5: IndexError: no expert 61 — only 60"):
        link.receive(tag(step=5, layer=3), DEADLINE_S)
    link.send(tag(step=6), random_call(SHAPE, 1))  # the link goes on
    serve(wiring.calls(1)[0])
    link.receive(tag(step=6), DEADLINE_S)


def test_a_reason_of_any_length_is_cut_not_refused(wiring: Wiring) -> None:
    link = wiring.link()
    link.send(tag(), random_call(SHAPE, 1))
    wiring.calls(1)[0].fail("ä" * 100_000)
    with pytest.raises(WorkerError, match="äää"):
        link.receive(tag(), DEADLINE_S)


def test_no_answer_in_time_is_an_error_that_says_where(wiring: Wiring) -> None:
    link = wiring.link()
    link.send(tag(step=8, layer=4), random_call(SHAPE, 1, layer=4))
    with pytest.raises(WorkerTimeoutError, match=r"worker ffn-0, layer 4, step 8: no answer within 0\.01 s"):
        link.receive(tag(step=8, layer=4), 0.01)
    serve(wiring.calls(1)[0])
    link.receive(tag(step=8, layer=4), DEADLINE_S)  # it was late, not lost


def test_wait_returns_empty_handed_when_nothing_comes(wiring: Wiring) -> None:
    wiring.link()
    assert wiring.listener.wait(0.0) == []
    assert wiring.listener.wait(0.01) == []


def test_the_late_answer_to_a_call_that_was_sent_again_is_discarded(wiring: Wiring) -> None:
    link = wiring.link()
    call = random_call(SHAPE, 2)
    link.send(tag(), call)
    serve(wiring.calls(1)[0], factor=3)  # on its way, not read
    link.send(tag(), call)
    with pytest.raises(WorkerTimeoutError):
        link.receive(tag(), 0.01)
    serve(wiring.calls(1)[0], factor=2)
    assert torch.equal(link.receive(tag(), DEADLINE_S).y, call.x * 2)


def test_a_superseded_call_leaves_its_successors_answer_alone(wiring: Wiring) -> None:
    link = wiring.link()
    link.send(tag(step=1), random_call(SHAPE, 4))
    (old,) = wiring.calls(1)
    call = random_call(SHAPE, 4, seed=1)
    link.send(tag(step=2), call)
    (new,) = wiring.calls(1)
    serve(new)
    y = link.receive(tag(step=2), DEADLINE_S).y
    serve(old, factor=100)
    assert torch.equal(y, call.x * 2)
    link.send(tag(step=3), call)
    serve(wiring.calls(1)[0], factor=5)
    assert torch.equal(link.receive(tag(step=3), DEADLINE_S).y, call.x * 5)


def test_a_call_sent_again_before_it_was_looked_at_comes_once(wiring: Wiring) -> None:
    link = wiring.link()
    for _ in range(2):
        link.send(tag(), random_call(SHAPE, 1))
    wiring.calls(1)
    assert wiring.listener.wait(0.0) == []


def test_the_end_of_the_listener_is_noticed_by_a_waiting_link(wiring: Wiring) -> None:
    link = wiring.link()
    link.send(tag(step=2, layer=7), random_call(SHAPE, 1, layer=7))
    closing = threading.Timer(0.05, wiring.listener.close)
    closing.start()
    with pytest.raises(WorkerDiedError, match="worker ffn-0, layer 7, step 2"):
        link.receive(tag(step=2, layer=7), DEADLINE_S)
    closing.join()
    with pytest.raises(WorkerDiedError):
        link.send(tag(step=3), random_call(SHAPE, 1))


def test_an_answer_given_before_the_listener_closed_still_counts(wiring: Wiring) -> None:
    link = wiring.link()
    call = random_call(SHAPE, 1)
    link.send(tag(), call)
    serve(wiring.calls(1)[0])
    wiring.listener.close()
    assert torch.equal(link.receive(tag(), DEADLINE_S).y, call.x * 2)


def test_a_link_that_closes_takes_nobody_with_it(wiring: Wiring) -> None:
    leaving, staying = wiring.link(replica=0), wiring.link(replica=1)
    leaving.send(tag(replica=0), random_call(SHAPE, 1))
    (orphan,) = wiring.calls(1)
    leaving.close()
    leaving.close()
    assert wiring.listener.wait(0.0) == []
    orphan.answer_buffer().zero_()
    with pytest.raises(WorkerDiedError, match="attention-0"):
        orphan.answer(1, 1)
    call = random_call(SHAPE, 2)
    staying.send(tag(replica=1), call)
    serve(wiring.calls(1)[0])
    assert torch.equal(staying.receive(tag(replica=1), DEADLINE_S).y, call.x * 2)


def test_links_opened_in_inference_mode_outlive_it(wiring: Wiring) -> None:
    with torch.inference_mode():
        link = wiring.link()
    link.send(tag(), random_call(SHAPE, 1))
    serve(wiring.calls(1)[0])
    link.receive(tag(), DEADLINE_S)
