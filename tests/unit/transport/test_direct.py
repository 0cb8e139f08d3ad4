"""The link that is none: what the others do by waking a worker, it does by a function call."""

import pytest
import torch

from afd_server.errors import WorkerError
from afd_server.models.ffn_call import FFNCall
from afd_server.transport.direct import DirectLink

from .wiring import SHAPE, random_call, tag


def test_each_micro_batch_gets_its_own_answer_in_any_order() -> None:
    link = DirectLink("ffn-0", lambda call: call.x * (call.layer + 1))
    calls = [random_call(SHAPE, rows=count + 1, layer=count, seed=count) for count in range(3)]
    for micro_batch, call in enumerate(calls):
        link.send(tag(layer=micro_batch, micro_batch=micro_batch), call)
    for micro_batch in (2, 0, 1):
        answer = link.receive(tag(layer=micro_batch, micro_batch=micro_batch), 0.0)
        assert torch.equal(answer.y, calls[micro_batch].x * (micro_batch + 1))
        assert answer.batch_rows == micro_batch + 1
        assert answer.queue_us == 0


def test_the_senders_tensors_are_its_own_again_after_send() -> None:
    link = DirectLink("ffn-0", lambda call: call.x * 2)
    call = random_call(SHAPE, rows=3)
    expected = call.x * 2
    link.send(tag(), call)
    call.x.zero_()
    assert torch.equal(link.receive(tag(), 0.0).y, expected)


def test_a_failure_reaches_the_caller_with_its_reason_and_the_link_goes_on() -> None:
    def only_layer_0(call: FFNCall) -> torch.Tensor:
        if call.layer:
            raise ValueError(f"no layer {call.layer}")
        return call.x

    link = DirectLink("ffn-0", only_layer_0)
    link.send(tag(layer=7), random_call(SHAPE, 1, layer=7))
    with pytest.raises(WorkerError, match=r"ffn-0, layer 7, step 1: ValueError: no layer 7"):
        link.receive(tag(layer=7), 0.0)
    call = random_call(SHAPE, 2)
    link.send(tag(), call)
    assert torch.equal(link.receive(tag(), 0.0).y, call.x)
