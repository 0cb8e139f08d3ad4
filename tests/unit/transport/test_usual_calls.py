"""Calls that a kernel serves by itself: only those that are as they should be, the rest is left for the long way."""

import pytest
import torch

from afd_server.errors import WorkerDiedError
from afd_server.kernels.call_account import CallAccount
from afd_server.kernels.experts import PackedExperts, run_experts
from afd_server.kernels.hop import KernelFFN
from afd_server.models.ffn_call import FFNCall
from afd_server.transport.base import CallTag, LinkShape
from afd_server.transport.frames import Header, Kind
from tests.unit.transport.wiring import DEADLINE_S, SHAPE, Wiring, wired

HIDDEN, WIDTH, EXPERTS = SHAPE.hidden_size, 24, 3
TAG = CallTag(replica=0, step=7, layer=1, micro_batch=2)


@pytest.fixture(scope="module")
def experts():
    generator = torch.Generator().manual_seed(1)
    return PackedExperts.pack(
        list(torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, generator=generator)),
        list(torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator)),
        "float32",
    )


@pytest.fixture
def layers(experts):
    """A dense layer, one with experts, and one that no kernel computes alone."""
    return [KernelFFN(experts, 0, 1, routed=False), KernelFFN(experts, 0, EXPERTS, routed=True), None]


@pytest.fixture
def account():
    return CallAccount(3, range(EXPERTS))


@pytest.fixture
def wiring():
    with wired("shm") as built:
        yield built


def call(layer, rows=3):
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(0, EXPERTS, (rows, SHAPE.top_k), generator=generator, dtype=torch.int32)
    weights = torch.rand(rows, SHAPE.top_k, generator=generator)
    x = torch.randn(rows, HIDDEN, generator=generator)
    return FFNCall(layer, x, ids, weights) if layer else FFNCall(layer, x, None, None)


def test_usual_calls_are_answered_without_the_listener_handing_them_on(
    wiring: Wiring, layers, experts, account
):
    link = wiring.link()
    for layer, rows, micro_batch in ((1, 3, 0), (0, 8, 3), (1, 1, 0)):
        asked, tag = call(layer, rows), CallTag(0, 1, layer, micro_batch)
        link.send(tag, asked)
        assert wiring.listener.serve_usual_calls(layers, account, 0.05)
        answer = link.receive(tag, DEADLINE_S)
        ids = asked.topk_ids if layer else torch.zeros(rows, 1, dtype=torch.int32)
        weights = asked.topk_weights if layer else torch.ones(rows, 1)
        expected = run_experts(asked.x, experts, ids, weights, first_expert=0, num_experts=EXPERTS)
        assert torch.equal(answer.y, expected)
        assert answer.batch_rows == rows
    assert wiring.listener.wait(0.0) == []


def test_a_layer_without_a_kernel_is_left_for_the_long_way(wiring: Wiring, layers, account):
    link = wiring.link()
    link.send(CallTag(0, 1, 2, 0), call(2))
    assert wiring.listener.serve_usual_calls(layers, account, 5.0)
    assert [incoming.tag.layer for incoming in wiring.listener.wait(0.0)] == [2]


def test_two_calls_at_once_are_left_for_the_long_way_which_may_compute_them_together(
    wiring: Wiring, layers, account
):
    links = [wiring.link(), wiring.link(replica=1)]
    for replica, link in enumerate(links):
        link.send(CallTag(replica, 1, 1, 0), call(1))
    assert wiring.listener.serve_usual_calls(layers, account, 5.0)
    assert {incoming.tag.replica for incoming in wiring.listener.wait(0.0)} == {0, 1}


def test_links_of_another_shape_are_left_for_the_long_way(wiring: Wiring, layers, account):
    other = LinkShape(8, HIDDEN, SHAPE.top_k, "bfloat16")
    link = wiring.link(other)
    link.send(CallTag(0, 1, 1, 0), call(1))
    assert wiring.listener.serve_usual_calls(layers, account, 5.0)
    assert len(wiring.listener.wait(0.0)) == 1


def frame(**changes):
    usual = Header(Kind.CALL, TAG, 1, 3, True, "float32", 3 * (HIDDEN * 4 + SHAPE.top_k * 8))
    return bytearray(usual._replace(**changes).pack())


WRONG = {
    "magic": lambda: b"XFDc" + frame()[4:],
    "version": lambda: frame()[:4] + b"\x09" + frame()[5:],
    "kind": lambda: frame(kind=Kind.ANSWER),
    "micro-batch": lambda: frame(tag=TAG._replace(micro_batch=200)),
    "flag": lambda: frame()[:7] + b"\x02" + frame()[8:],
    "dtype": lambda: frame(wire_dtype="bfloat16"),
    "unknown dtype": lambda: frame()[:8] + b"\x63" + frame()[9:],
    "replica": lambda: frame(tag=TAG._replace(replica=1)),
    "many layers": lambda: frame(tag=TAG._replace(layer=1 << 31)),
    "rows": lambda: frame(rows=SHAPE.max_rows + 1, payload_bytes=(SHAPE.max_rows + 1) * (HIDDEN * 4 + 16)),
    "no rows": lambda: frame(rows=0, payload_bytes=0),
    "payload": lambda: frame(payload_bytes=12),
    "sequence": lambda: frame(sequence=0),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_nonsense_is_not_served_and_ends_its_link_alone(wiring: Wiring, layers, wrong, account):
    link, other = wiring.link(), wiring.link(replica=1)
    link._socket.send(WRONG[wrong]())
    assert wiring.listener.serve_usual_calls(layers, account, 5.0)
    assert wiring.listener.wait(0.0) == []
    link._sent[0] = Header.unpack(frame(tag=TAG._replace(micro_batch=0)))
    with pytest.raises(WorkerDiedError):
        link.receive(TAG._replace(micro_batch=0), DEADLINE_S)
    other.send(CallTag(1, 1, 1, 0), call(1))
    assert wiring.listener.serve_usual_calls(layers, account, 0.05)
    assert other.receive(CallTag(1, 1, 1, 0), DEADLINE_S).batch_rows == 3


def test_half_a_frame_is_waited_for_the_long_way(wiring: Wiring, layers, account):
    link = wiring.link()
    link._socket.send(frame()[:20])
    assert wiring.listener.serve_usual_calls(layers, account, 5.0)
    assert wiring.listener.wait(0.0) == []
    link._socket.send(frame()[20:])
    assert not wiring.listener.serve_usual_calls(layers, account, 5.0)
    assert len(wiring.listener.wait(1.0)) == 1


def test_without_links_there_is_nothing_to_do(wiring: Wiring, layers, account):
    assert not wiring.listener.serve_usual_calls(layers, account, 5.0)


def test_calls_are_noted_one_by_one_and_summed_by_layer_and_expert(wiring: Wiring, layers, account):
    link = wiring.link()
    asked = call(1, rows=4)
    for step in (1, 2):
        link.send(CallTag(0, step, 1, 3), asked)
        assert wiring.listener.serve_usual_calls(layers, account, 0.05)
        link.receive(CallTag(0, step, 1, 3), DEADLINE_S)
        (note,) = account.notes[: account.num_notes]
        assert (note.replica, note.step, note.layer, note.micro_batch, note.rows) == (0, step, 1, 3, 4)
        assert note.began < note.ended
    total = account.totals.read()[1]
    assert (total.batches, total.rows) == (2, 8)
    assert total.seconds > 0
    chosen = torch.bincount(asked.topk_ids.flatten(), minlength=EXPERTS)
    assert account.tokens()[1].tolist() == (2 * chosen).tolist()
    assert account.tokens()[0].tolist() == [0] * EXPERTS
