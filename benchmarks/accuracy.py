"""What smaller weights cost in accuracy: perplexity, and how often the likeliest token stays the same as with float32 weights.

    .venv/bin/python benchmarks/accuracy.py default default-moe

The text ships with Python (pydoc's help topics). It is cut into windows, each of which the whole model reads by itself, with
the CPU kernels; the first half of a window is context only. KL is the mean divergence of the next token's distribution from
float32's. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch

from afd_server.checkpoints.default_model import afd_home
from afd_server.models.checkpoint import load_attention_half, load_ffn_half, operations_for
from afd_server.models.families import read_model_spec
from afd_server.models.halves import FFNShard, WholeModel
from afd_server.serving import MADE_HERE
from afd_server.text.tokenizer import Tokenizer

WAYS = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "int8": (torch.float32, "int8"),
    "bfloat16 + int8": (torch.bfloat16, "int8"),
}
CPU = torch.device("cpu")


def load(directory: Path, dtype: torch.dtype, quantization: str | None) -> tuple[WholeModel, int]:
    """The model, and the bytes of its weights."""
    spec = read_model_spec(directory)
    where = {"device": CPU, "dtype": dtype, "gate_on": "attention",
             "operations": operations_for(CPU, dtype, "native", quantization)}  # fmt: skip
    attention = load_attention_half(directory, spec, **where)  # type: ignore[arg-type]
    ffn = load_ffn_half(directory, spec, FFNShard(), **where)  # type: ignore[arg-type]
    return WholeModel(attention, [ffn]), attention.weight_bytes() + ffn.weight_bytes()


def windows(directory: Path, count: int, size: int) -> list[list[int]]:
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = Tokenizer.load(directory).encode(text)
    step = max(size, len(ids) // count)
    return [list(ids[start : start + size]) for start in range(0, len(ids) - size, step)][:count]


def next_token_logprobs(model: WholeModel, window: list[int]) -> torch.Tensor:
    """[size / 2 - 1, V]: of the tokens of the window's second half, but for the first of them."""
    return model.logits(window)[len(window) // 2 : -1].log_softmax(-1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="default, default-moe, or directories of checkpoints")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window-tokens", type=int, default=512)
    arguments = parser.parse_args()
    results = []
    print(f"{'model':<14} {'weights':<16} {'MB':>6} {'perplexity':>10} {'top-1 same':>10} {'KL':>8}")
    for name in arguments.models:
        directory = MADE_HERE[name](afd_home()) if name in MADE_HERE else Path(name)
        texts = windows(directory, arguments.windows, arguments.window_tokens)
        exact: list[torch.Tensor] = []
        for way, (dtype, quantization) in WAYS.items():
            model, num_bytes = load(directory, dtype, quantization)
            loss, same, divergence, tokens = 0.0, 0, 0.0, 0
            for index, window in enumerate(texts):
                logprobs = next_token_logprobs(model, window)
                if way == "float32":
                    exact.append(logprobs)
                targets = torch.tensor(window[len(window) // 2 + 1 :])
                loss -= float(logprobs.gather(1, targets[:, None]).sum())
                same += int((logprobs.argmax(-1) == exact[index].argmax(-1)).sum())
                divergence += float((exact[index].exp() * (exact[index] - logprobs)).sum())
                tokens += len(targets)
            row = {"model": name, "weights": way, "megabytes": round(num_bytes / 1e6), "tokens": tokens,
                   "perplexity": round(math.exp(loss / tokens), 4), "top1_same": round(same / tokens, 4),
                   "kl": round(divergence / tokens, 6)}  # fmt: skip
            results.append(row)
            print(f"{name:<14} {way:<16} {row['megabytes']:>6} {row['perplexity']:>10} {row['top1_same']:>10.2%} "
                  f"{row['kl']:>8}", flush=True)  # fmt: skip
    print(
        json.dumps({"windows": arguments.windows, "window_tokens": arguments.window_tokens, "results": results})
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
