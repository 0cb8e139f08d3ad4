"""The CPU kernels one by one, at the shapes of a checkpoint: against torch's own operations, and against the machine's limits.

    .venv/bin/python benchmarks/kernels.py /tmp/small

A product's weights are read from memory that no cache holds: each call takes the next of many matrices. The share is of the
time that the machine needs at least: max(bytes / (bytes/s), operations / (FLOP/s)), by machine.py, measured in the same run.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from machine import fastest_s, flop_per_s, read_bytes_per_s
from torch.nn import functional as F

from afd_server.kernels.attention import paged_attention
from afd_server.kernels.experts import PackedExperts, run_experts
from afd_server.kernels.matmul import Format, PackedMatrix, linear
from afd_server.kernels.rows import add_rms_norm
from afd_server.models.batch import AttentionBatch
from afd_server.models.families import read_model_spec
from afd_server.models.norm import rms_norm
from afd_server.models.operations import TorchExperts
from afd_server.models.paged_attention import paged_attention as torch_attention
from afd_server.models.spec import GQASpec, ModelSpec, MoESpec
from afd_server.types import ScheduledRequest

SET_BYTES = 1 << 29  # of weights, or of cache, that a sweep goes through
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
BLOCK_SIZE = 16


class Report:
    """Rows of one table, printed as they come."""

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()
        self.bytes_per_s, self.flop_per_s = read_bytes_per_s(self.threads), flop_per_s(self.threads)
        self.rows: list[dict[str, object]] = []
        print(f"{self.threads} threads: {self.bytes_per_s / 1e9:.1f} GB/s, {self.flop_per_s / 1e9:.0f} GFLOP/s")
        print(f"{'kernel':<34} {'us':>9} {'GB/s':>7} {'GFLOP/s':>8} {'share':>6} {'torch us':>9} {'faster':>7}")

    def add(
        self, name: str, num_bytes: float, operations: float, seconds: float, torch_s: float | None
    ) -> None:
        share = max(num_bytes / self.bytes_per_s, operations / self.flop_per_s) / seconds
        self.rows.append({
            "kernel": name, "us": round(seconds * 1e6, 1), "gb_per_s": round(num_bytes / seconds / 1e9, 1),
            "gflop_per_s": round(operations / seconds / 1e9, 1), "share": round(share, 3),
            "torch_us": None if torch_s is None else round(torch_s * 1e6, 1),
        })  # fmt: skip
        theirs = f"{torch_s * 1e6:>9.1f} {torch_s / seconds:>7.2f}" if torch_s else ""
        print(f"{name:<34} {seconds * 1e6:>9.1f} {num_bytes / seconds / 1e9:>7.1f} {operations / seconds / 1e9:>8.1f} "
              f"{share:>6.2f} {theirs}", flush=True)  # fmt: skip


def per_call_s(call: Callable[[Any], object], over: Sequence[Any]) -> float:
    """Seconds of one call, in the fastest sweep over the arguments."""

    def sweep() -> None:
        for argument in over:
            call(argument)

    return fastest_s(sweep, repeats=3) / len(over)


def products(report: Report, name: str, n: int, k: int, formats: Sequence[Format]) -> None:
    for stored, rows in itertools.product(formats, (1, 8, 32, 128, 1024)):
        size = n * k * ELEMENT_BYTES[stored]
        count = max(2, min(SET_BYTES // size, int(2e10 / (2 * rows * n * k))))
        matrices = [torch.randn(n, k) for _ in range(2)]
        packed = [PackedMatrix.pack([matrices[i % 2]], stored) for i in range(count)]
        x = torch.randn(rows, k)
        seconds = per_call_s(partial(linear, x), packed)
        torch_s = None
        if stored == "float32":
            torch_s = per_call_s(partial(F.linear, x), [matrices[i % 2].clone() for i in range(count)])
        report.add(f"{name} {n}x{k} {stored} T={rows}", size, 2 * rows * n * k, seconds, torch_s)


def mixtures(report: Report, spec: ModelSpec, ffn: MoESpec, formats: Sequence[Format]) -> None:
    hidden, width, experts, top_k = spec.hidden_size, ffn.intermediate_size, ffn.num_experts, ffn.top_k
    expert_values = 3 * hidden * width
    gate_up, down = torch.randn(experts, 2 * width, hidden) / 30, torch.randn(experts, hidden, width) / 20
    for stored in formats:
        layers = max(2, SET_BYTES // (experts * expert_values * ELEMENT_BYTES[stored]))
        packed = [PackedExperts.pack(list(gate_up), list(down), stored) for _ in range(layers)]
        reference = [TorchExperts(gate_up.clone(), down.clone(), 0) for _ in range(2)]
        for rows in (1, 8, 32, 128, 512):
            x, weights = torch.randn(rows, hidden), torch.rand(rows, top_k)
            ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(rows)]).to(torch.int32)
            call = partial(call_kernel, x, ids, weights, experts)
            torch_s = (
                per_call_s(partial(call_torch, x, ids, weights), reference) if stored == "float32" else None
            )
            active = len(ids.unique())
            num_bytes = active * expert_values * ELEMENT_BYTES[stored]
            report.add(f"experts {active}/{experts} {stored} T={rows}", num_bytes, 2 * rows * top_k * expert_values,
                       per_call_s(call, packed), torch_s)  # fmt: skip


def call_kernel(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, num_experts: int, packed: PackedExperts
) -> None:
    run_experts(x, packed, ids, weights, first_expert=0, num_experts=num_experts)


def call_torch(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: TorchExperts) -> None:
    experts.forward(x, ids, weights)


def attention(report: Report, spec: ModelSpec) -> None:
    gqa = spec.attention
    assert isinstance(gqa, GQASpec)
    for requests, rows, length in (
        (1, 1, 128), (1, 1, 1024), (1, 1, 8192), (8, 1, 256), (32, 1, 256), (32, 1, 2048), (1, 128, 128), (1, 512, 2048),
    ):  # fmt: skip
        blocks = -(-length // BLOCK_SIZE)
        size = requests * length * 2 * gqa.num_kv_heads * gqa.head_dim * 4
        count = max(1, SET_BYTES // 2 // size)
        cache = torch.randn(count * requests * blocks, BLOCK_SIZE, 2, gqa.num_kv_heads, gqa.head_dim)
        batches = [
            AttentionBatch.build(
                [ScheduledRequest(str(i), length - rows, (0,) * rows, tuple(table), samples=True)
                 for i, table in enumerate(tables)], BLOCK_SIZE, torch.device("cpu"),
            )
            for tables in torch.randperm(len(cache)).view(count, requests, blocks).tolist()
        ]  # fmt: skip
        query = torch.randn(requests * rows, gqa.num_heads, gqa.head_dim)
        seconds = per_call_s(partial(attend, query, cache), batches)
        torch_s = per_call_s(partial(torch_attention, query, cache, scale=0.1), batches[:16])
        seen = rows * (length - (rows - 1) / 2)
        operations = 4 * requests * seen * gqa.num_heads * gqa.head_dim
        report.add(f"attention {requests} x {rows} of {length}", size, operations, seconds, torch_s)


def attend(query: torch.Tensor, cache: torch.Tensor, batch: AttentionBatch) -> None:
    paged_attention(
        query, cache, row_starts=batch.row_starts, lengths=batch.lengths, block_tables=batch.block_tables,
        scale=0.1, value_dim=query.shape[2],
    )  # fmt: skip


def norms(report: Report, hidden: int) -> None:
    weight = torch.ones(hidden)
    for rows in (1, 32, 2048):
        x, delta = torch.randn(rows, hidden), torch.zeros(rows, hidden)
        seconds = per_call_s(lambda d: add_rms_norm(x, d, weight, 1e-6), [delta] * 50)  # noqa: B023
        torch_s = per_call_s(lambda d: rms_norm(x.add_(d), weight, 1e-6), [delta] * 50)  # noqa: B023
        report.add(f"add and norm T={rows}", 0, 5 * rows * hidden, seconds, torch_s)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of a checkpoint with grouped-query attention and experts")
    parser.add_argument("--formats", nargs="+", default=list(ELEMENT_BYTES), choices=ELEMENT_BYTES)
    arguments = parser.parse_args()
    spec = read_model_spec(arguments.model)
    ffn = next((ffn for ffn in spec.ffn if isinstance(ffn, MoESpec)), None)
    if not isinstance(spec.attention, GQASpec) or ffn is None:
        parser.error(f"{arguments.model} is not a mixture of experts with grouped-query attention")
    report = Report()
    heads = spec.attention.num_heads + 2 * spec.attention.num_kv_heads
    products(report, "qkv", heads * spec.attention.head_dim, spec.hidden_size, arguments.formats)
    products(report, "LM head", spec.vocab_size, spec.hidden_size, arguments.formats[:1])
    mixtures(report, spec, ffn, arguments.formats)
    attention(report, spec)
    norms(report, spec.hidden_size)
    print(json.dumps({
        "model": arguments.model, "threads": report.threads, "bytes_per_s": round(report.bytes_per_s),
        "flop_per_s": round(report.flop_per_s), "kernels": report.rows,
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
