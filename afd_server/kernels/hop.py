"""Both ends' loops over hops in C++, without Python between two of them.

What lives here: the loops as Python calls them. What does not: what they may be used for and what happens when they stop in the
middle (attention/shortcut.py, transport/server_side.py), nor links and slots (transport/), whose places are handed in.

Shapes: T rows, H hidden, K experts per token.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from ctypes import c_double as DOUBLE
from ctypes import c_long as LONG
from ctypes import c_void_p as POINTER
from typing import NamedTuple

import torch
from torch import Tensor

from afd_server.kernels.attention import cache_layout
from afd_server.kernels.call_account import MAX_NOTES, CallAccount
from afd_server.kernels.experts import PackedExperts
from afd_server.kernels.layer import AttentionKernel
from afd_server.kernels.library import library
from afd_server.kernels.matmul import FORMAT_CODES
from afd_server.telemetry.layer_totals import LayerTotals

FRAME_BYTES = 60
_Frame = ctypes.c_char * FRAME_BYTES


class CallPlace(NamedTuple):
    """An attention worker's end of a link, for one micro-batch: where calls are written and answers are found.

    frame: the first call's. call_bytes, routed_bytes: of a row's payload, without and with experts. x and answer: [T, H]
    float32; topk_ids [T, K] int32, topk_weights [T, K] float32: the slot's.
    """

    socket: int
    frame: bytes
    call_bytes: int
    routed_bytes: int
    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    answer: Tensor


class _Run(ctypes.Structure):
    """native/hop.h has the same fields, here and below."""

    _fields_ = (
        ("socket", LONG), *((name, POINTER) for name in ("frame", "layers", "caches")),
        *((name, LONG) for name in ("num_layers", "call_bytes", "routed_bytes")), ("patience_s", DOUBLE),
        *((name, LONG) for name in ("answered", "sent", "torn", "late")),
        *((name, DOUBLE) for name in ("computing_s", "waiting_s", "ffn_s", "wire_s", "answered_at")), ("ffn_rows", LONG),
        ("times", POINTER), ("totals", POINTER),
    )  # fmt: skip


class HopTimes(ctypes.Structure):
    """Of a layer in a run, monotonic seconds."""

    _fields_ = (("began", DOUBLE), ("computed", DOUBLE), ("received", DOUBLE))


class _FFNLayer(ctypes.Structure):
    _fields_ = (
        *((name, POINTER) for name in ("gate_up", "down")),
        *((name, LONG) for name in ("format", "width", "first_expert", "num_experts", "routed")),
    )


class _ServedLink(ctypes.Structure):
    _fields_ = (
        *((name, LONG) for name in ("socket", "replica", "max_rows", "top_k")), ("memory", POINTER),
        *((name, LONG) for name in ("slot_bytes", "ids_at", "weights_at", "answer_at")), ("latest", POINTER),
    )  # fmt: skip


class _Service(ctypes.Structure):
    _fields_ = (
        ("layers", POINTER), ("links", POINTER),
        *((name, LONG) for name in ("num_layers", "num_links", "hidden", "num_slots", "threads", "epoll")),
        ("wire", POINTER), ("unsent", LONG), ("to", LONG), ("answer", _Frame),
        ("notes", POINTER), ("max_notes", LONG), ("num_notes", LONG), ("totals", POINTER), ("expert_tokens", POINTER),
        ("num_experts", LONG),
    )  # fmt: skip


class LayerRun(NamedTuple):
    """How far a run came: layers answered, calls that left (one more where the last was not answered), whether the last of
    them left in part, whether nothing came within its time, and the seconds and rows that all took; see types.StepTiming.
    answered_at: monotonic seconds. times: of the layers answered, until the next run."""

    answered: int
    sent: int
    torn: bool
    late: bool
    computing_s: float
    waiting_s: float
    ffn_s: float
    wire_s: float
    answered_at: float
    ffn_rows: int
    times: ctypes.Array[HopTimes]


class LayerLoop:
    """All layers of an attention worker, which must be kernels of grouped-query attention. Adds to their totals."""

    def __init__(
        self, kernels: Sequence[AttentionKernel], totals: LayerTotals, instruction_set: str | None = None
    ) -> None:
        self._kernels = kernels
        self._totals = totals
        self._times = (HopTimes * len(kernels))()
        self._layers = (POINTER * len(kernels))(*(kernel.address for kernel in kernels))
        self._run = library(instruction_set).afd_run_layers

    def __call__(
        self, x_TH: Tensor, place: CallPlace, patience_s: float, *, cos: Tensor, sin: Tensor, interleaved: bool,
        slots: Tensor, row_starts: Tensor, lengths: Tensor, block_tables: Tensor, caches: Sequence[Tensor],
    ) -> LayerRun:  # fmt: skip
        """Runs x through the layers in place, as AttentionKernel does each, with the calls over the link.

        Stops at the first call that is not answered as it should be within patience_s: its x and choice lie in the place, and
        x_TH has the layers so far added. The last answer lies in the place, and is not in x_TH yet.
        """
        assert x_TH.is_contiguous() and len(caches) == len(self._kernels) and len(place.frame) == FRAME_BYTES
        frame = _Frame.from_buffer_copy(place.frame)
        entries = (POINTER * len(caches))(*(cache.data_ptr() for cache in caches))
        run = _Run(
            place.socket, ctypes.addressof(frame), ctypes.addressof(self._layers), ctypes.addressof(entries),
            len(caches), place.call_bytes, place.routed_bytes, patience_s,
            times=ctypes.addressof(self._times), totals=self._totals.address,
        )  # fmt: skip
        cache = caches[0]
        self._run(
            ctypes.addressof(run), x_TH.shape[0], x_TH.data_ptr(), place.answer.data_ptr(), place.x.data_ptr(),
            place.topk_ids.data_ptr(), place.topk_weights.data_ptr(), cos.data_ptr(), sin.data_ptr(), interleaved,
            slots.data_ptr(), len(lengths), row_starts.data_ptr(), lengths.data_ptr(), block_tables.data_ptr(),
            block_tables.shape[1], cache.dtype is torch.bfloat16, cache_layout(tuple(cache.shape), cache.stride()),
            torch.get_num_threads(),
        )  # fmt: skip
        return LayerRun(
            run.answered, run.sent, bool(run.torn), bool(run.late), run.computing_s, run.waiting_s, run.ffn_s, run.wire_s,
            run.answered_at, run.ffn_rows, self._times,
        )  # fmt: skip


class KernelFFN(NamedTuple):
    """A layer that one kernel computes. routed: whether its calls name experts; else every row takes the only one."""

    experts: PackedExperts
    first_expert: int
    num_experts: int
    routed: bool


class LinkPlace(NamedTuple):
    """An FFN worker's end of a link in float32 whose slots both ends see. memory: of its first slot; the other places are
    bytes from a slot's start. latest: uint64, a sequence number for each slot, which the loop reads and sets."""

    socket: int
    replica: int
    max_rows: int
    top_k: int
    memory: int
    slot_bytes: int
    ids_at: int
    weights_at: int
    answer_at: int
    latest: ctypes.Array[ctypes.c_uint64]


class CallLoop:
    """The layers of an FFN worker. layers: None for those whose calls are left to the long way; not all are."""

    def __init__(
        self,
        layers: Sequence[KernelFFN | None],
        num_slots: int,
        wire: bytes,
        account: CallAccount,
        instruction_set: str | None = None,
    ) -> None:
        """wire: any frame of a link in float32. account: which it adds to."""
        assert len(account.totals) >= len(layers)
        self._held = layers
        self._account = account
        self.hidden_size = next(layer.experts.down.n for layer in layers if layer is not None)
        self._layers = (_FFNLayer * len(layers))(*(_ffn_layer(layer) for layer in layers))
        self._links: Sequence[LinkPlace] = ()
        self._places = (_ServedLink * 0)()
        self._wire = _Frame.from_buffer_copy(wire)
        self._service = _Service(
            ctypes.addressof(self._layers), None, len(layers), 0, self.hidden_size, num_slots, 0, -1, ctypes.addressof(self._wire),
            notes=ctypes.addressof(account.notes), max_notes=MAX_NOTES, totals=account.totals.address,
            expert_tokens=account.expert_tokens.ctypes.data, num_experts=len(account.held),
        )  # fmt: skip
        self._serve = library(instruction_set).afd_serve_calls

    def use(self, epoll: int, links: Sequence[LinkPlace]) -> None:
        """The links that calls may come from, and the epoll descriptor that they are registered at by their sockets."""
        self._links = links
        self._places = (_ServedLink * len(links))(
            *(_ServedLink(*place[:-1], ctypes.addressof(place.latest)) for place in links)
        )
        self._service.links, self._service.num_links = ctypes.addressof(self._places), len(links)
        self._service.epoll = epoll

    def serve(self, timeout_s: float) -> tuple[int, bytes] | None:
        """Serves calls for a time, or until something comes that is not a usual call; it is left where it is.

        Gives the socket and the rest of an answer that did not leave whole, else None.
        """
        service = self._service
        service.threads, service.unsent, service.num_notes = torch.get_num_threads(), 0, 0
        self._serve(ctypes.addressof(service), time.monotonic() + timeout_s)
        self._account.num_notes = service.num_notes
        if not service.unsent:
            return None
        frame = ctypes.string_at(ctypes.addressof(service) + _Service.answer.offset, FRAME_BYTES)
        return self._links[service.to].socket, frame[-service.unsent :]


def _ffn_layer(layer: KernelFFN | None) -> _FFNLayer:
    if layer is None:
        return _FFNLayer()
    gate_up, down = layer.experts.gate_up, layer.experts.down
    return _FFNLayer(
        gate_up.memory.data_ptr(), down.memory.data_ptr(), FORMAT_CODES[down.format], down.k, layer.first_expert,
        layer.num_experts, layer.routed,
    )  # fmt: skip
