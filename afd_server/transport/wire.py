"""How activations lie in bytes: one slot of memory per micro-batch and direction, encoded in place.

What lives here: the layout of a link's memory and the encoding (float32, bfloat16, fp8 with a scale a row). What does
not: whose memory it is: private (inproc, tcp) or shared (shm), a host's or a GPU's. Both ends of a shared link compute the
same layout from the same LinkShape.

Every field has a fixed place in its slot, sized for max_rows. A sender that overwrites a call which is still being
computed thus mixes numbers of two calls but never takes bytes of one field for another: expert ids stay expert ids.
Shapes: T rows of a micro-batch, H hidden size, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from afd_server.models.ffn_call import FFNCall
from afd_server.transport.base import NUM_SLOTS, LinkShape

_WIRE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max

_FIELD_ALIGNMENT_BYTES = 64  # a cache line
_SLOT_ALIGNMENT_BYTES = 4096  # a page: an unused micro-batch never touches memory

HOST = torch.device("cpu")

# Micro-batches and rows whose views are kept per link.
_MAX_VIEWS = 64


@dataclass(frozen=True, slots=True)
class Field:
    """One tensor of a slot: [max_rows, columns] at offset_bytes from the slot's start."""

    offset_bytes: int
    dtype: torch.dtype
    columns: int
    row_bytes: int


class SlotLayout:
    """Where a link's fields lie. Slots come in the order call 0, answer 0, call 1, answer 1, ..."""

    def __init__(self, shape: LinkShape) -> None:
        self.answer_dtype = torch.float32 if shape.wire_dtype == "float32" else torch.bfloat16
        self._max_rows = shape.max_rows
        self._end_bytes = 0
        self.x = self._place(_WIRE_DTYPES[shape.wire_dtype], shape.hidden_size)
        self.scales = self._place(torch.float32, 1) if shape.wire_dtype == "fp8" else None
        self.topk_ids = self._place(torch.int32, shape.top_k)
        self.topk_weights = self._place(torch.float32, shape.top_k)
        self._call_row_bytes = {
            routed: sum(field.row_bytes for field in self.call_fields(routed)) for routed in (False, True)
        }
        self.call_slot_bytes = _round_up(self._end_bytes, _SLOT_ALIGNMENT_BYTES)
        self._end_bytes = 0
        self.y = self._place(self.answer_dtype, shape.hidden_size)
        self.answer_slot_bytes = _round_up(self._end_bytes, _SLOT_ALIGNMENT_BYTES)
        self.total_bytes = NUM_SLOTS * (self.call_slot_bytes + self.answer_slot_bytes)

    def call_start(self, micro_batch: int) -> int:
        return micro_batch * (self.call_slot_bytes + self.answer_slot_bytes)

    def answer_start(self, micro_batch: int) -> int:
        return self.call_start(micro_batch) + self.call_slot_bytes

    def call_fields(self, routed: bool) -> list[Field]:
        """The fields of a call, in the order in which they travel."""
        fields = [self.x] + ([self.scales] if self.scales else [])
        return [*fields, self.topk_ids, self.topk_weights] if routed else fields

    def call_bytes(self, rows: int, routed: bool) -> int:
        return self._call_row_bytes[routed] * rows

    def answer_bytes(self, rows: int) -> int:
        return self.y.row_bytes * rows

    def _place(self, dtype: torch.dtype, columns: int) -> Field:
        offset = _round_up(self._end_bytes, _FIELD_ALIGNMENT_BYTES)
        row_bytes = columns * dtype.itemsize
        self._end_bytes = offset + self._max_rows * row_bytes
        return Field(offset, dtype, columns, row_bytes)


class SlotViews(NamedTuple):
    """The tensors of one micro-batch's slots for a number of rows. scales: None unless the wire carries fp8."""

    x: Tensor
    scales: Tensor | None
    topk_ids: Tensor
    topk_weights: Tensor
    y: Tensor


class Slots:
    """A link's memory, seen as tensors (for the model) and as bytes (for a socket).

    memory: uint8 [SlotLayout.total_bytes]; None allocates private memory on `device`, whose pages cost nothing until a
    call of that size comes.
    """

    def __init__(
        self, shape: LinkShape, memory: Tensor | None = None, device: torch.device | str = HOST
    ) -> None:
        self.shape = shape
        self.layout = SlotLayout(shape)
        # A link may be opened in the middle of a step, which runs in inference mode; its memory outlives the step.
        with torch.inference_mode(False):
            if memory is None:
                memory = torch.empty(self.layout.total_bytes, dtype=torch.uint8, device=device)
            assert len(memory) == self.layout.total_bytes
            self._memory = memory
        self._views: dict[tuple[int, int], SlotViews] = {}  # by micro-batch and rows
        self._bytes: memoryview | None = memory.numpy().data if memory.device.type == "cpu" else None

    @property
    def on_host(self) -> bool:
        """Whether the slots' bytes can be reached without a device."""
        return self._bytes is not None

    def settle(self) -> None:
        """Returns when all that this thread has had written into the slots so far is there for another process.

        For slots on a GPU. The wait keeps the rest as it is on a host: a header that arrives says that its data has. Events shared by
        both processes could take its place: the sender would ring at once, and the receiver's stream, not its thread, would wait.
        """
        if self._memory.is_cuda:
            torch.cuda.current_stream(self._memory.device).synchronize()

    def write_call(self, micro_batch: int, call: FFNCall) -> None:
        """Encodes the call into its slot. The call must fit the link's shape. From a GPU into host memory this waits for the
        copy; within a GPU it does not, see `settle`."""
        (rows, hidden_size), shape = call.x.shape, self.shape
        assert 1 <= rows <= shape.max_rows, f"{rows} rows over a link for {shape.max_rows}"
        assert hidden_size == shape.hidden_size, f"hidden size {hidden_size}, not {shape.hidden_size}"
        views = self.views(micro_batch, rows)
        if views.scales is None:
            views.x.copy_(call.x)
        else:
            quantized_TH, scales_T1 = quantize_rows(call.x)
            views.x.copy_(quantized_TH)
            views.scales.copy_(scales_T1)
        if call.topk_ids is not None:
            assert call.topk_weights is not None
            assert call.topk_ids.shape == call.topk_weights.shape == views.topk_ids.shape
            views.topk_ids.copy_(call.topk_ids)
            views.topk_weights.copy_(call.topk_weights)

    def read_call(self, micro_batch: int, layer: int, rows: int, routed: bool) -> FFNCall:
        """The call in the slot, as views where the encoding allows; fp8 is decoded to bfloat16."""
        views = self.views(micro_batch, rows)
        x_TH = views.x
        if views.scales is not None:
            x_TH = (x_TH.to(torch.float32) * views.scales).to(self.layout.answer_dtype)
        if not routed:
            return FFNCall(layer, x_TH, None, None)
        return FFNCall(layer, x_TH, views.topk_ids, views.topk_weights)

    def answer(self, micro_batch: int, rows: int) -> Tensor:
        """The answer's place: [rows, H] in the answer's dtype."""
        return self.views(micro_batch, rows).y

    def call_buffers(self, micro_batch: int, rows: int, routed: bool) -> list[memoryview]:
        """The call's bytes as they travel on a socket, to send from or to receive into."""
        start = self.layout.call_start(micro_batch)
        return [self._buffer(start, field, rows) for field in self.layout.call_fields(routed)]

    def answer_buffers(self, micro_batch: int, rows: int) -> list[memoryview]:
        return [self._buffer(self.layout.answer_start(micro_batch), self.layout.y, rows)]

    def views(self, micro_batch: int, rows: int) -> SlotViews:
        """The places of a call of so many rows and of its answer."""
        return self._views.get((micro_batch, rows)) or self._view(micro_batch, rows)

    def _view(self, micro_batch: int, rows: int) -> SlotViews:
        # Kept, because making a view costs as much as a system call and all layers of a step ask for the same ones.
        if len(self._views) >= _MAX_VIEWS:
            self._views.clear()
        layout, start = self.layout, self.layout.call_start(micro_batch)
        with torch.inference_mode(False):
            views = self._views[micro_batch, rows] = SlotViews(
                self._tensor(start, layout.x, rows),
                None if layout.scales is None else self._tensor(start, layout.scales, rows),
                self._tensor(start, layout.topk_ids, rows),
                self._tensor(start, layout.topk_weights, rows),
                self._tensor(layout.answer_start(micro_batch), layout.y, rows),
            )
        return views

    def _tensor(self, start: int, field: Field, rows: int) -> Tensor:
        first = start + field.offset_bytes
        return self._memory[first : first + rows * field.row_bytes].view(field.dtype).view(rows, field.columns)

    def _buffer(self, start: int, field: Field, rows: int) -> memoryview:
        assert self._bytes is not None
        first = start + field.offset_bytes
        return self._bytes[first : first + rows * field.row_bytes]


def quantize_rows(x_TH: Tensor) -> tuple[Tensor, Tensor]:
    """(x as float8_e4m3fn [T, H], scales float32 [T, 1]) with x about equal to quantized * scale.

    Each row is scaled so that its largest magnitude becomes the largest fp8 number: about 2 decimal digits survive.
    """
    wide_TH = x_TH.to(torch.float32)
    scales_T1 = (
        wide_TH.abs().amax(dim=1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny * FP8_MAX) / FP8_MAX
    )
    return (wide_TH / scales_T1).to(torch.float8_e4m3fn), scales_T1


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
