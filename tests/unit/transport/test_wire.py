"""Encoding of activations, and the layout of slots."""

import pytest
import torch

from afd_server.errors import ConfigError
from afd_server.models.ffn_call import FFNCall
from afd_server.transport.base import LinkShape
from afd_server.transport.wire import SlotLayout, Slots, quantize_rows


def test_each_row_has_its_own_fp8_scale() -> None:
    x_TH = torch.randn(6, 32) * torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e6, 0.0])[:, None]
    quantized_TH, scales_T1 = quantize_rows(x_TH)
    assert quantized_TH.dtype == torch.float8_e4m3fn
    restored_TH = quantized_TH.float() * scales_T1
    # 3 bits of mantissa: half a step is 1/16 of the value; near zero, a subnormal step of the row's scale.
    error_TH = (restored_TH - x_TH).abs()
    assert (error_TH <= x_TH.abs() / 16 + scales_T1 * 2**-9).all()
    largest_T = x_TH.abs().amax(dim=1)
    torch.testing.assert_close(restored_TH.abs().amax(dim=1), largest_T, rtol=1e-6, atol=0)


def test_fp8_does_not_hide_what_is_not_a_number() -> None:
    x_TH = torch.ones(2, 8)
    x_TH[0, 3] = float("nan")
    quantized_TH, scales_T1 = quantize_rows(x_TH)
    restored_TH = quantized_TH.float() * scales_T1
    assert restored_TH[0].isnan().any()
    assert not restored_TH[1].isnan().any()


@pytest.mark.parametrize("wire_dtype", ["float32", "bfloat16", "fp8"])
def test_full_slots_do_not_overlap(wire_dtype: str) -> None:
    shape = LinkShape(7, 33, 3, wire_dtype)
    slots = Slots(shape)
    calls = []
    for micro_batch in range(4):
        value = float(micro_batch + 1)
        ids = torch.full((7, 3), micro_batch, dtype=torch.int32)
        calls.append(FFNCall(0, torch.full((7, 33), value), ids, torch.full((7, 3), value)))
    for micro_batch, call in enumerate(calls):
        slots.write_call(micro_batch, call)
        slots.answer(micro_batch, 7).fill_(10.0 + micro_batch)
    for micro_batch, call in enumerate(calls):
        read = slots.read_call(micro_batch, 0, 7, routed=True)
        assert torch.equal(read.x.float(), call.x)
        assert torch.equal(read.topk_ids, call.topk_ids)
        assert torch.equal(read.topk_weights, call.topk_weights)
        assert (slots.answer(micro_batch, 7) == 10 + micro_batch).all()


def test_the_bytes_of_a_call_are_its_numbers_and_nothing_else() -> None:
    layout = SlotLayout(LinkShape(100, 8, 2, "fp8"))
    assert layout.call_bytes(rows=3, routed=False) == 3 * (8 + 4)
    assert layout.call_bytes(rows=3, routed=True) == 3 * (8 + 4 + 2 * 4 + 2 * 4)
    assert layout.answer_bytes(rows=3) == 3 * 8 * 2
    slots = Slots(LinkShape(100, 8, 2, "fp8"))
    assert sum(map(len, slots.call_buffers(1, 3, routed=True))) == layout.call_bytes(3, routed=True)


def test_a_bfloat16_model_over_a_float32_wire_and_back() -> None:
    slots = Slots(LinkShape(4, 8, 0, "float32"))
    x_TH = torch.randn(4, 8).bfloat16()
    slots.write_call(0, FFNCall(0, x_TH, None, None))
    assert torch.equal(slots.read_call(0, 0, 4, routed=False).x, x_TH.float())


@pytest.mark.parametrize(
    "shape",
    [
        (0, 8, 0, "float32"),
        (8, 0, 0, "float32"),
        (8, 8, -1, "float32"),
        (8, 8, 0, "int8"),
        (1 << 40, 8, 0, "fp8"),
    ],
)
def test_a_link_of_impossible_shape_is_refused(shape: tuple[int, int, int, str]) -> None:
    with pytest.raises(ConfigError):
        LinkShape(*shape)
