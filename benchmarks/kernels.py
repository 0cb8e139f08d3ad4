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


def per_call_s(calls: Sequence[Callable[[], object]]) -> float:
    def sweep() -> None:
        for call in calls:
            call()

    return fastest_s(sweep, repeats=3) / len(calls)


def products(report: Report, name: str, n: int, k: int, formats: Sequence[Format]) -> None:
    for format, rows in itertools.product(formats, (1, 8, 32, 128, 1024)):
        size = n * k * ELEMENT_BYTES[format]
        count = max(2, min(SET_BYTES // size, int(2e10 / (2 * rows * n * k))))
        matrices = [torch.randn(n, k) for _ in range(2)]
        packed = [PackedMatrix.pack([matrices[i % 2]], format) for i in range(count)]
        x = torch.randn(rows, k)
        seconds = per_call_s([lambda w=w: linear(x, w) for w in packed])  # type: ignore[misc]
        torch_s = None
        if format == "float32":
            copies = [matrices[i % 2].clone() for i in range(count)]
            torch_s = per_call_s([lambda w=w: F.linear(x, w) for w in copies])  # type: ignore[misc]
        report.add(f"{name} {n}x{k} {format} T={rows}", size, 2 * rows * n * k, seconds, torch_s)


def mixtures(report: Report, spec: ModelSpec, ffn: MoESpec, formats: Sequence[Format]) -> None:
    hidden, width, experts, top_k = spec.hidden_size, ffn.intermediate_size, ffn.num_experts, ffn.top_k
    expert_values = 3 * hidden * width
    gate_up, down = torch.randn(experts, 2 * width, hidden) / 30, torch.randn(experts, hidden, width) / 20
    for format in formats:
        layers = max(2, SET_BYTES // (experts * expert_values * ELEMENT_BYTES[format]))
        packed = [PackedExperts.pack(list(gate_up), list(down), format) for _ in range(layers)]
        reference = [TorchExperts(gate_up.clone(), down.clone(), 0) for _ in range(min(4, layers))]
        for rows in (1, 8, 32, 128, 512):
            x, weights = torch.randn(rows, hidden), torch.rand(rows, top_k)
            ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(rows)]).to(torch.int32)
            active = len(ids.unique())
            seconds = per_call_s([
                lambda p=p: run_experts(x, p, ids, weights, first_expert=0, num_experts=experts)  # type: ignore[misc]
                for p in packed
            ])  # fmt: skip
            torch_s = None
            if format == "float32":
                torch_s = per_call_s([lambda r=r: r.forward(x, ids, weights) for r in reference])  # type: ignore[misc]
            num_bytes = active * expert_values * ELEMENT_BYTES[format]
            report.add(f"experts {active}/{experts} {format} T={rows}", num_bytes, 2 * rows * top_k * expert_values,
                       seconds, torch_s)  # fmt: skip


def attention(report: Report, spec: ModelSpec) -> None:
    gqa = spec.attention
    assert isinstance(gqa, GQASpec)
    entry = 2 * gqa.num_kv_heads * gqa.head_dim
    for requests, rows, length in (
        (1, 1, 128), (1, 1, 1024), (1, 1, 8192), (8, 1, 256), (32, 1, 256), (32, 1, 2048), (1, 128, 128), (1, 512, 2048),
    ):  # fmt: skip
        blocks = -(-length // BLOCK_SIZE)
        size = requests * length * entry * 4
        count = max(1, SET_BYTES // 2 // (requests * blocks * BLOCK_SIZE * entry * 4))
        cache = torch.randn(count * requests * blocks, BLOCK_SIZE, 2, gqa.num_kv_heads, gqa.head_dim)
        order = torch.randperm(len(cache)).view(count, requests, blocks).tolist()
        batches = [
            AttentionBatch.build(
                [ScheduledRequest(str(i), length - rows, (0,) * rows, tuple(table), samples=True)
                 for i, table in enumerate(tables)], BLOCK_SIZE, torch.device("cpu"),
            )
            for tables in order
        ]  # fmt: skip
        query = torch.randn(requests * rows, gqa.num_heads, gqa.head_dim)
        seconds = per_call_s([
            lambda b=b: paged_attention(query, cache, row_starts=b.row_starts, lengths=b.lengths,  # type: ignore[misc]
                                        block_tables=b.block_tables, scale=0.1, value_dim=gqa.head_dim)
            for b in batches
        ])  # fmt: skip
        torch_s = per_call_s([lambda b=b: torch_attention(query, cache, b, 0.1) for b in batches[:16]])  # type: ignore[misc]
        seen = rows * (length - (rows - 1) / 2)
        operations = 4 * requests * seen * gqa.num_heads * gqa.head_dim
        report.add(f"attention {requests} x {rows} of {length}", size, operations, seconds, torch_s)


def norms(report: Report, hidden: int) -> None:
    weight = torch.ones(hidden)
    for rows in (1, 32, 2048):
        x, delta = torch.randn(rows, hidden), torch.zeros(rows, hidden)
        seconds = per_call_s([lambda: add_rms_norm(x, delta, weight, 1e-6)] * 50)
        torch_s = per_call_s([lambda: rms_norm(x.add_(delta), weight, 1e-6)] * 50)
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
