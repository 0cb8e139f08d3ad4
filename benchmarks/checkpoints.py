"""Checkpoints to measure on: random Qwen3-MoE ones with a tokenizer, float32, the same bytes on every run; and SmolLM2.

    .venv/bin/python benchmarks/checkpoints.py tiny /tmp/tiny
    .venv/bin/python benchmarks/checkpoints.py smollm2-moe        # made under $AFD_HOME on first use, and named

Speed depends on the shapes of the weights, and on how many experts the tokens of a step choose: evenly spread over all of
them, as roofline.py assumes, which ATTENTION_NORM sees to. Names and layout are the hub's, so that every server that knows Qwen3-MoE
loads them. One layer is one file: no more than that is in memory at once. No token ends an output, so servers that know
no ignore_eos write as many tokens as the others.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from afd_server.bench.dataset import WORDS
from afd_server.checkpoints.default_model import afd_home, default_model, default_moe

CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"

# Of queries and keys: each token attends to few others. With 1 it sees the mean of its context, much the same in every
# prompt; greedy texts then repeat a word or two, their tokens choose the same experts, and 8 requests of "tiny" read 11 of
# 16 experts in a step, where independent ones read 14.4. With 3 it is 13.7.
ATTENTION_NORM = 3.0


@dataclass(frozen=True)
class Shape:
    """The numbers of a Qwen3-MoE; every layer has experts, and the LM head is the embedding."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int
    expert_width: int
    vocab: int


SHAPES = {
    "micro": Shape(2, 64, 4, 2, 16, 4, 2, 32, 1024),  # as little as a model can be: for counting, not for speed
    "tiny": Shape(8, 512, 8, 2, 64, 16, 4, 256, 8192),  # 60 million parameters
    "small": Shape(
        16, 1024, 16, 4, 128, 32, 4, 512, 32768
    ),  # 923 million, 219 million of them active for a token
}

# The default model of `afd serve`, 135 million parameters, and the same as 8 experts of which 2 are active.
SMOLLM2 = {"smollm2": default_model, "smollm2-moe": default_moe}


def config(shape: Shape) -> dict[str, object]:
    """config.json as the hub's Qwen3-MoE models have it."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "float32",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "attention_bias": False,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "moe_intermediate_size": shape.expert_width,
        "intermediate_size": shape.expert_width,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def files(shape: Shape, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of one file after the other: the embedding and last norm, then each layer."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(columns**-0.5)

    hidden, width, queries = shape.hidden, shape.expert_width, shape.heads * shape.head_dim
    yield {"model.embed_tokens.weight": matrix(shape.vocab, hidden), "model.norm.weight": torch.ones(hidden)}
    for layer in range(shape.layers):
        tensors = {
            "input_layernorm.weight": torch.ones(hidden),
            "post_attention_layernorm.weight": torch.ones(hidden),
            "self_attn.q_proj.weight": matrix(queries, hidden),
            "self_attn.k_proj.weight": matrix(shape.kv_heads * shape.head_dim, hidden),
            "self_attn.v_proj.weight": matrix(shape.kv_heads * shape.head_dim, hidden),
            "self_attn.q_norm.weight": torch.full((shape.head_dim,), ATTENTION_NORM),
            "self_attn.k_norm.weight": torch.full((shape.head_dim,), ATTENTION_NORM),
            "self_attn.o_proj.weight": matrix(hidden, queries),
            "mlp.gate.weight": matrix(shape.experts, hidden),
        }
        for expert in range(shape.experts):
            tensors[f"mlp.experts.{expert}.gate_proj.weight"] = matrix(width, hidden)
            tensors[f"mlp.experts.{expert}.up_proj.weight"] = matrix(width, hidden)
            tensors[f"mlp.experts.{expert}.down_proj.weight"] = matrix(hidden, width)
        yield {f"model.layers.{layer}.{name}": tensor for name, tensor in tensors.items()}


def write_weights(shape: Shape, directory: Path, seed: int) -> int:
    """Writes the files and their index; gives the number of parameters."""
    weight_map: dict[str, str] = {}
    parameters = 0
    for number, tensors in enumerate(files(shape, seed), start=1):
        name = f"model-{number:05}-of-{shape.layers + 1:05}.safetensors"
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        parameters += sum(tensor.numel() for tensor in tensors.values())
    index = {"metadata": {"total_size": 4 * parameters}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return parameters


def vocabulary(size: int) -> list[str]:
    """Every byte, the words of `afd bench`'s prompts with and without the space before them, and made-up words up to size.

    One word of a prompt is so one token, and every id that a random model picks has text of its own.
    """
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *WORDS, *(f"Ġ{word}" for word in WORDS)]
    consonants, vowels = "bdfghjklmnprstvwz", "aeiou"
    made_up = map("".join, itertools.product("Ġ", consonants, vowels, consonants, vowels, consonants))
    return words + list(itertools.islice(made_up, size - len(words)))


def write_tokenizer(size: int, directory: Path) -> None:
    """A byte-level BPE whose words are found whole, as ignore_merges says; what it does not know becomes bytes."""
    vocab = {word: index for index, word in enumerate(vocabulary(size))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*SHAPES, *SMOLLM2])
    parser.add_argument("directory", type=Path, nargs="?", help="where a random one is written")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if (arguments.name in SHAPES) != (arguments.directory is not None):
        parser.error("a random checkpoint needs a directory; SmolLM2 has its place under $AFD_HOME")
    if arguments.name in SMOLLM2:
        print(SMOLLM2[arguments.name](afd_home()))
        return 0
    shape = SHAPES[arguments.name]
    arguments.directory.mkdir(parents=True, exist_ok=True)
    (arguments.directory / "config.json").write_text(json.dumps(config(shape), indent=1))
    write_tokenizer(shape.vocab, arguments.directory)
    parameters = write_weights(shape, arguments.directory, arguments.seed)
    print(f"{arguments.directory}: {parameters / 1e6:.0f} million parameters, {4 * parameters / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
