"""What this machine allows a checkpoint at best: its memory's and its cores' speed, and tokens a second from them.

    .venv/bin/python benchmarks/roofline.py /tmp/tiny --concurrency 1 8 32 --input-tokens 64 --output-tokens 64

Measured on the spot, with torch, on matrices of the checkpoint's own shapes: the bytes/s of a product with one row
(matvec), which only reads weights, and the FLOP/s of products with more rows (GEMM), each with 1 and 2 threads; and by
machine.py what reading memory, and multiplying in registers, reach by themselves, which is far more. The best of them are
the two limits, B bytes/s and F FLOP/s. A step that reads every weight it needs once, and does nothing else,
takes for each of its products

    max(bytes / B, operations / F) seconds

and the step's time is the sum over the products of all layers. With n rows in a step, s bytes a value, context c tokens:

    attention weights   P = hidden * (2 * heads + 2 * kv_heads) * head_dim values, 2 n P operations
    attention           n c * 2 * kv_heads * head_dim values read at decode (a prompt's keys and values are read once),
                        4 n c * heads * head_dim operations; a prompt's tokens see half of it on average
    experts             3 * hidden * width values each. A row takes top_k of E; n rows that choose at random take
                        E * (1 - (1 - top_k / E) ** n) different ones, and only those are read. 2 operations a value
                        for each of the n * top_k pairs
    router, LM head     hidden * E and hidden * vocab values, 2 operations each a row (the head: a row that samples)

Decode at concurrency n: n rows a step, c = input + output / 2, n tokens a step. Prefill: the prompts of all clients in
steps of at most 2048 rows. Together: every client's whole request, the first token of which comes from prefill. Norms,
activations, sampling, wire, HTTP count as nothing, and so does prefix caching. No kernel passes these limits. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import machine
import torch
from torch.nn import functional as F

from afd_server.models.families import read_model_spec
from afd_server.models.spec import GQASpec, ModelSpec, MoESpec

THREADS = (1, 2)
ROWS = (8, 32, 128, 1024)  # of a GEMM; at the last one the cores' limit is reached
WORKING_SET_BYTES = 1 << 30  # what a sweep reads at most; a smaller checkpoint's own size if it is smaller
SWEEP_OPERATIONS = 2e10  # a sweep of a GEMM stops reading there
SWEEPS = 5  # the fastest counts: others may use the machine
STEP_ROWS = 2048


@dataclass(frozen=True)
class Limits:
    """Of the machine: bytes/s of reading weights, and FLOP/s."""

    bytes_per_s: float
    flop_per_s: float

    def seconds(self, num_bytes: float, operations: float) -> float:
        return max(num_bytes / self.bytes_per_s, operations / self.flop_per_s)


# --- the machine -------------------------------------------------------------------------------------------------


def shapes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Rows and columns of the matrices that a step multiplies with, parts of one input fused."""
    attention, hidden = spec.attention, spec.hidden_size
    assert isinstance(attention, GQASpec)
    found = {
        "qkv": ((attention.num_heads + 2 * attention.num_kv_heads) * attention.head_dim, hidden),
        "attention output": (hidden, attention.num_heads * attention.head_dim),
        "LM head": (spec.vocab_size, hidden),
    }
    for width in sorted({ffn.intermediate_size for ffn in spec.ffn}):
        found[f"gate and up, {width}"] = (2 * width, hidden)
        found[f"down, {width}"] = (hidden, width)
    return found


def fastest_s(sweep: Callable[[], None]) -> float:
    """Seconds of the fastest of SWEEPS calls, after one that touches the memory."""
    times_s = []
    for _ in range(SWEEPS + 1):
        started = time.perf_counter()
        sweep()
        times_s.append(time.perf_counter() - started)
    return min(times_s[1:])


def measure_shape(
    shape: tuple[int, int], dtype: torch.dtype, threads: int, working_set_bytes: int
) -> dict[int, float]:
    """Products with one matrix after the other, by rows: bytes/s of weights at one row, FLOP/s at more."""
    torch.set_num_threads(threads)
    values = shape[0] * shape[1]
    count = max(2, working_set_bytes // (values * dtype.itemsize))
    matrices = torch.randn(values).mul_(0.02).to(dtype).repeat(count).view(count, *shape)
    rates = {}
    for rows in (1, *ROWS):
        x = torch.randn(rows, shape[1]).to(dtype)
        used = matrices[: max(1, min(count, int(SWEEP_OPERATIONS / (2 * rows * values))))]

        def sweep(x: torch.Tensor = x, used: torch.Tensor = used) -> None:
            for matrix in used:
                F.linear(x, matrix)

        work = values * (dtype.itemsize if rows == 1 else 2 * rows)
        rates[rows] = len(used) * work / fastest_s(sweep)
    return rates


def measure_machine(
    spec: ModelSpec, dtypes: list[str], working_set_bytes: int
) -> tuple[Limits, list[dict[str, object]]]:
    """The limits, and one row a shape, type and number of threads. FLOP/s count in the first of the types."""
    table: list[dict[str, object]] = []
    bytes_per_s = flop_per_s = 0.0
    for dtype, threads, (name, shape) in itertools.product(dtypes, THREADS, shapes(spec).items()):
        rates = measure_shape(shape, getattr(torch, dtype), threads, working_set_bytes)
        bytes_per_s = max(bytes_per_s, rates[1])
        if dtype == dtypes[0]:
            flop_per_s = max(flop_per_s, *(rates[rows] for rows in ROWS))
        row = {"matrix": name, "shape": shape, "dtype": dtype, "threads": threads}
        row |= {"matvec_gb_per_s": round(rates[1] / 1e9, 1)}
        row |= {f"gemm_{rows}_gflop_per_s": round(rates[rows] / 1e9, 1) for rows in ROWS}
        table.append(row)
        gemm = " ".join(f"{rates[rows] / 1e9:>7.1f}" for rows in ROWS)
        print(f"{name:<20} {shape!s:>14} {dtype:>9} {threads:>7} {rates[1] / 1e9:>6.1f}  {gemm}", flush=True)
    bytes_per_s = max(bytes_per_s, *(machine.read_bytes_per_s(threads) for threads in THREADS))
    flop_per_s = max(flop_per_s, *(machine.flop_per_s(threads) for threads in THREADS))
    return Limits(bytes_per_s, flop_per_s), table


# --- the model on it -----------------------------------------------------------------------------------------------


def step_s(
    spec: ModelSpec, limits: Limits, *, rows: int, samples: int, context: float, kv_reads: float, size: int
) -> float:
    """Seconds of one step of `rows` tokens. context: tokens that each sees. kv_reads: entries read in each layer.

    samples: rows that the LM head sees. size: bytes of a value.
    """
    attention, hidden = spec.attention, spec.hidden_size
    assert isinstance(attention, GQASpec)
    heads, kv_heads, head_dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
    projections = hidden * 2 * (heads + kv_heads) * head_dim
    layer_s = limits.seconds(size * projections, 2 * rows * projections)
    layer_s += limits.seconds(size * kv_reads * 2 * kv_heads * head_dim, 4 * rows * context * heads * head_dim)
    total_s = len(spec.ffn) * layer_s
    for ffn in spec.ffn:
        expert = 3 * hidden * ffn.intermediate_size
        if not isinstance(ffn, MoESpec):
            total_s += limits.seconds(size * expert, 2 * rows * expert)
            continue
        distinct = ffn.num_experts * (1 - (1 - ffn.top_k / ffn.num_experts) ** rows)
        shared = 3 * hidden * ffn.shared_intermediate_size
        router = hidden * ffn.num_experts
        total_s += limits.seconds(size * distinct * expert, 2 * rows * ffn.top_k * expert)
        total_s += limits.seconds(size * (shared + router), 2 * rows * (shared + router))
    head = hidden * spec.vocab_size
    return total_s + limits.seconds(size * head, 2 * samples * head)


def highest(
    spec: ModelSpec, limits: Limits, concurrency: int, input_tokens: int, output_tokens: int, size: int
) -> dict[str, float]:
    """Tokens a second at best: of decode, of prefill, and output tokens of whole requests."""
    context = input_tokens + output_tokens / 2
    decode_step_s = step_s(
        spec,
        limits,
        rows=concurrency,
        samples=concurrency,
        context=context,
        kv_reads=concurrency * context,
        size=size,
    )
    prompts = concurrency * input_tokens
    steps = math.ceil(prompts / STEP_ROWS)
    prefill_step_s = step_s(
        spec, limits, rows=math.ceil(prompts / steps), samples=math.ceil(concurrency / steps),
        context=input_tokens / 2, kv_reads=prompts / steps, size=size,
    )  # fmt: skip
    whole_s = steps * prefill_step_s + (output_tokens - 1) * decode_step_s
    return {
        "concurrency": concurrency,
        "decode_tokens_per_s": round(concurrency / decode_step_s, 1),
        "prefill_tokens_per_s": round(prompts / (steps * prefill_step_s), 1),
        "output_tokens_per_s": round(concurrency * output_tokens / whole_s, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of a checkpoint with grouped-query attention")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--input-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="served in this type"
    )
    arguments = parser.parse_args()
    spec = read_model_spec(arguments.model)
    if not isinstance(spec.attention, GQASpec):
        parser.error(f"{arguments.model} has {spec.attention.kind} attention; only gqa is counted here")
    checkpoint_bytes = sum(file.stat().st_size for file in Path(arguments.model).glob("*.safetensors"))
    gemm = " ".join(f"M={rows:<5}" for rows in ROWS)
    print(f"{'matrix':<20} {'shape':>14} {'type':>9} {'threads':>7} {'GB/s':>6}  GFLOP/s {gemm}")
    dtypes = sorted(["float32", "bfloat16"], key=lambda dtype: dtype != arguments.dtype)
    limits, table = measure_machine(spec, dtypes, min(WORKING_SET_BYTES, checkpoint_bytes))
    size = getattr(torch, arguments.dtype).itemsize
    best = [
        highest(spec, limits, concurrency, arguments.input_tokens, arguments.output_tokens, size)
        for concurrency in arguments.concurrency
    ]
    print(f"limits: {limits.bytes_per_s / 1e9:.1f} GB/s, {limits.flop_per_s / 1e9:.0f} GFLOP/s")
    for row in best:
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    print(json.dumps({
        "model": arguments.model, "dtype": arguments.dtype, "input_tokens": arguments.input_tokens,
        "output_tokens": arguments.output_tokens, "bytes_per_s": round(limits.bytes_per_s),
        "flop_per_s": round(limits.flop_per_s), "measured": table, "highest": best,
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
