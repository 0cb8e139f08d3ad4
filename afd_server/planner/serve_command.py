"""The `afd serve` command that starts a layout, and what stands between the two.

What lives here: flags from a layout. What does not: the flags themselves (config.py).
"""

from __future__ import annotations

import shlex
from pathlib import Path

from afd_server.errors import ModelError
from afd_server.models.families import read_model_spec
from afd_server.planner.layout import Layout

MIN_BATCHED_TOKENS = 2048  # the server's own default of --max-num-batched-tokens


def serve_command(model: str, layout: Layout, *, context: int, dtype: str, tpot_sla_ms: float) -> str:
    """Cards of two kinds become Ray resources of their names, which the nodes must offer."""
    ffn_parallel = "ep" if layout.tensor_shards == 1 else f"{layout.expert_shards}x{layout.tensor_shards}"
    flags: dict[str, object] = {
        "--attention-workers": layout.attention_workers,
        "--ffn-workers": layout.ffn_workers,
        "--ffn-parallel": ffn_parallel,
        "--micro-batches": layout.micro_batches,
        "--wire-dtype": layout.wire_dtype,
        "--max-num-seqs": layout.requests,
        "--max-num-batched-tokens": max(MIN_BATCHED_TOKENS, layout.requests),
        "--max-model-len": context,
        "--tpot-sla-ms": f"{tpot_sla_ms:g}",
    }
    if dtype != "fp8":
        flags["--dtype"] = dtype
    if layout.attention_card != layout.ffn_card:
        flags |= {"--attention-resource": layout.attention_card, "--ffn-resource": layout.ffn_card}
    words = ["afd", "serve", model, *(str(word) for item in flags.items() for word in item)]
    return shlex.join(words)


def remarks_on_model(model: Path) -> list[str]:
    """Why the server does not serve a config.json, or the directory that it lies in; nothing where it does."""
    try:
        read_model_spec(model if model.is_dir() else model.parent)
    except ModelError as error:
        return [f"the server does not run this model as it is: {error}"]
    return []


def remarks_on_layout(layout: Layout, dtype: str) -> list[str]:
    """What else the command needs to become the layout that was counted, one sentence each."""
    found = []
    if dtype == "fp8":
        found.append("weights and caches of 8 bits were counted; the server holds them in bfloat16 on GPUs, and in int8 "
                     "(--quantization) on CPUs: --dtype bfloat16 counts what it does today")  # fmt: skip
    if layout.attention_card != layout.ffn_card:
        found.append(f"nodes must offer the resources {layout.attention_card} and {layout.ffn_card}: "
                     f"ray start --resources '{{\"{layout.attention_card}\": 8}}'")  # fmt: skip
    return found
