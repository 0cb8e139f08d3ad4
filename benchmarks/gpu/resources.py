"""What the compiler makes of the Triton kernels for a Hopper GPU, on any machine: registers, spills and shared memory.

    .venv/bin/python benchmarks/gpu/resources.py

Calls of every kind at the shapes of real models, on tensors without memory: Triton compiles what it would launch, and ptxas and
cuobjdump, which come with Triton, say what that needs. A kernel that spills registers or wants more shared memory than a
multiprocessor has fails the run. The last line is JSON.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from afd_server.kernels.gpu.attention import paged_decode_attention
from afd_server.kernels.gpu.choice import choose_experts
from afd_server.kernels.gpu.experts import grouped_expert_ffn
from afd_server.kernels.gpu.fp8 import BlockScaledWeight
from afd_server.kernels.gpu.heads import rotate_and_write
from afd_server.kernels.gpu.rows import add_rms_norm

COMPUTE_CAPABILITY = 90
# Of a thread. The attention that holds 64 heads of 256 spills ten registers, and is the fastest of all tiles on an H100.
SPILLED_BYTES = 40
SHARED_MEMORY_BYTES = 227 * 1024  # that one program may have on a multiprocessor of that generation
FP8, INT32, FLOAT32 = torch.float8_e4m3fn, torch.int32, torch.float32


@dataclass(frozen=True, slots=True)
class Usage:
    """tensor_core: "wgmma" (whole warp groups, Hopper's own), "mma", or "" without products."""

    case: str
    kernel: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    num_warps: int
    tensor_core: str

    def fits(self) -> bool:
        return self.stack_bytes <= SPILLED_BYTES and self.shared_bytes <= SHARED_MEMORY_BYTES


class _Driver:
    """As much of Triton's driver as compiling asks for."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", COMPUTE_CAPABILITY, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_instead_of_launching(found: Callable[[str, Any], None]) -> None:
    """From here on every launch in this process compiles its kernel, and hands `found` its name and what came out."""
    import triton

    triton.runtime.driver.set_active(_Driver())
    launch = triton.runtime.JITFunction.run

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = launch(self, *arguments, grid=grid, warmup=True, **options)
        found(self.fn.__name__.lstrip("_"), compiled)
        return compiled

    triton.runtime.JITFunction.run = run


def usage_of(case: str, kernel: str, compiled: Any) -> Usage:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", said)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    ptx = compiled.asm["ptx"]
    tensor_core = next((name for name in ("wgmma", "mma") if f"{name}." in ptx), "")
    meta = compiled.metadata
    return Usage(case, kernel, registers, stack, meta.shared, meta.num_warps, tensor_core)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attend(rows: int, num_heads: int, entry: tuple[int, ...], value_dim: int | None = None) -> None:
    tables, lengths = empty(rows, 512, dtype=INT32), empty(rows, dtype=INT32)
    query, cache = empty(rows, num_heads, entry[-1]), empty(1000, 16, *entry)
    paged_decode_attention(query, cache, tables, lengths, 0.1, value_dim=value_dim)


def mix(
    rows: int, experts: int, top_k: int, hidden: int, width: int, dtype: torch.dtype = torch.bfloat16
) -> None:
    def weight(n: int, k: int) -> Tensor | BlockScaledWeight:
        values = empty(experts, n, k, dtype=dtype)
        if dtype is not FP8:
            return values
        return BlockScaledWeight(values, empty(experts, n // 128, k // 128, dtype=FLOAT32))

    chosen = empty(rows, top_k, dtype=INT32), empty(rows, top_k, dtype=FLOAT32)
    grouped_expert_ffn(empty(rows, hidden), weight(2 * width, hidden), weight(hidden, width), *chosen)


def norm(rows: int, hidden: int) -> None:
    add_rms_norm(empty(rows, hidden), empty(rows, hidden), empty(hidden), 1e-5)


def heads(rows: int, num_heads: int, groups: int, dim: int, *, normed: bool = False) -> None:
    norms = (empty(dim), empty(dim)) if normed else None
    angles, slots = empty(rows, dim // 2), empty(rows, dtype=torch.int64)
    key, cache = empty(rows, groups, dim), empty(1000, 16, 2, groups, dim)
    rotate_and_write(empty(rows, num_heads, dim), key, key, norms, 1e-5, angles, angles, False, cache, slots)


def choice(rows: int, num_experts: int, top_k: int) -> None:
    logits = empty(rows, num_experts)
    choose_experts(logits, top_k, sigmoid=False, correction=None, renormalise=True, scaling=1.0)


CASES: dict[str, Callable[[], None]] = {
    "Step-3 attention, 128 requests": lambda: attend(128, 64, (2, 1, 256)),
    "Step-3 attention, 1 request": lambda: attend(1, 64, (2, 1, 256)),
    "DeepSeek-V3 attention, 64 requests": lambda: attend(64, 128, (576,), 512),
    "Qwen3-MoE attention, 64 requests": lambda: attend(64, 64, (2, 4, 128)),
    "SmolLM2 attention, 64 requests": lambda: attend(64, 9, (2, 3, 64)),
    "Step-3 experts bfloat16, 2048 rows": lambda: mix(2048, 3, 3, 7168, 5120),
    "Step-3 experts bfloat16, 250 rows": lambda: mix(250, 3, 3, 7168, 5120),
    "Step-3 experts bfloat16, 24 rows": lambda: mix(24, 3, 3, 7168, 5120),
    "Step-3 experts bfloat16, 4 rows": lambda: mix(4, 3, 3, 7168, 5120),
    "Step-3 experts FP8, 2048 rows": lambda: mix(2048, 3, 3, 7168, 5120, FP8),
    "Step-3 experts FP8, 24 rows": lambda: mix(24, 3, 3, 7168, 5120, FP8),
    "Step-3 experts FP8, 4 rows": lambda: mix(4, 3, 3, 7168, 5120, FP8),
    "Qwen3-MoE experts bfloat16, 64 rows": lambda: mix(64, 128, 8, 4096, 1536),
    "Step-3 norms": lambda: norm(128, 7168),
    "Step-3 heads": lambda: heads(128, 64, 1, 256),
    "Qwen3-MoE heads": lambda: heads(64, 64, 4, 128, normed=True),
    "Step-3 choice": lambda: choice(128, 48, 3),
    "Qwen3-MoE choice": lambda: choice(64, 128, 8),
}


def usages() -> list[Usage]:
    """Of every kernel of every case; a kernel that cases share counts once."""
    rows: list[Usage] = []
    case, seen = "", set()

    def found(kernel: str, compiled: Any) -> None:
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            rows.append(usage_of(case, kernel, compiled))

    compile_instead_of_launching(found)
    for case, call in CASES.items():  # noqa: B007  # `found` reads it
        call()
    return rows


def main() -> None:
    rows = usages()
    print(f"{'case':<38} {'kernel':<18} {'registers':>9} {'stack':>6} {'shared':>7} {'warps':>5}  tensor core")
    for row in rows:
        print(f"{row.case:<38} {row.kernel:<18} {row.registers:>9} {row.stack_bytes:>6} {row.shared_bytes:>7} "
              f"{row.num_warps:>5}  {row.tensor_core}{'' if row.fits() else '  DOES NOT FIT'}")  # fmt: skip
    print(json.dumps({"compute_capability": COMPUTE_CAPABILITY, "kernels": [asdict(row) for row in rows]}))
    if not all(row.fits() for row in rows):
        sys.exit("a kernel spills registers or does not fit a multiprocessor")


if __name__ == "__main__":
    main()
