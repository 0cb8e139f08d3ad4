"""A checkpoint as the hub has it, written as a GGUF file: the same numbers for a server that reads nothing else.

    .venv/bin/python benchmarks/peers/to_gguf.py /tmp/tiny /tmp/tiny.gguf

Qwen3-MoE, Llama and Mixtral, with a byte-level BPE in tokenizer.json. Names are looked up in the gguf library's tables.
What differs from the checkpoint is only what llama.cpp wants otherwise: the experts of a layer are one tensor, and
Llama's queries and keys are ordered for a rotation of neighbours. Norms and the router stay float32 in every type.
Called by versus.py, once for each checkpoint.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open

ARCHITECTURES = {
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
}
TYPES = {
    "float32": gguf.GGMLQuantizationType.F32,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
FILE_TYPES = {
    "float32": gguf.LlamaFileType.ALL_F32,
    "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)\.weight")


# --- numbers of the model ----------------------------------------------------------------------------------------


def rope_theta(config: dict[str, Any]) -> float:
    parameters = config.get("rope_parameters") or {}
    return float(parameters.get("rope_theta") or config.get("rope_theta") or 1e4)


def head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def write_numbers(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(rope_theta(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if experts := config.get("num_experts") or config.get("num_local_experts"):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if width := config.get("moe_intermediate_size"):
        writer.add_expert_feed_forward_length(width)


# --- its tokenizer -----------------------------------------------------------------------------------------------


def write_tokenizer(writer: gguf.GGUFWriter, model: Path, config: dict[str, Any]) -> None:
    """Vocabulary and merges of tokenizer.json. Raises ValueError for anything but a BPE."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    bpe = tokenizer["model"]
    if bpe["type"] != "BPE":
        raise ValueError(f"{model}/tokenizer.json: is a {bpe['type']}; only BPE is written")
    tokens = [""] * config["vocab_size"]
    types = [gguf.TokenType.UNUSED] * len(tokens)
    for text, index in bpe["vocab"].items():
        tokens[index], types[index] = text, gguf.TokenType.NORMAL
    for added in tokenizer.get("added_tokens", ()):
        tokens[added["id"]], types[added["id"]] = added["content"], gguf.TokenType.CONTROL
    tokens = [text or f"[unused {index}]" for index, text in enumerate(tokens)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    writer.add_tokenizer_model("gpt2")
    # llama.cpp derives from this name how text is cut, and whether whole words are looked up before any merge.
    writer.add_tokenizer_pre("llama-bpe" if bpe.get("ignore_merges") else "smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    # It wants at least one: two zero bytes, which no prompt has.
    writer.add_token_merges(merges or ["Ā Ā"])
    # It takes a token that it is not told of to be number 11. A model without an end token gives up its last word.
    writer.add_eos_token_id(_first(config.get("eos_token_id"), len(tokens) - 1))
    writer.add_bos_token_id(_first(config.get("bos_token_id"), len(tokens) - 1))
    writer.add_add_bos_token(False)


def _first(token: int | list[int] | None, otherwise: int) -> int:
    if isinstance(token, list):
        token = token[0] if token else None
    return otherwise if token is None else token


# --- its weights -------------------------------------------------------------------------------------------------


def neighbours(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head: the two halves that the hub's models rotate against each other, made neighbours."""
    return tensor.view(heads, 2, tensor.shape[0] // heads // 2, -1).transpose(1, 2).reshape(tensor.shape)


def tensors(model: Path, config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """(GGUF name, tensor) of the whole checkpoint; of a layer's experts one stacked tensor for each matrix."""
    names = gguf.get_tensor_name_map(ARCHITECTURES[config["model_type"]], config["num_hidden_layers"])
    files = {}
    for file in sorted(model.glob("*.safetensors")):
        opened = safe_open(file, framework="pt")
        files.update(dict.fromkeys(opened.keys(), opened))
    stacks: dict[str, dict[int, str]] = {}
    single = {}
    for name in files:
        if found := EXPERT.fullmatch(name):
            group, expert, matrix = found.groups()
            stacks.setdefault(f"{group}.{matrix}", {})[int(expert)] = name
        else:
            single[name.removesuffix(".weight")] = name
    heads = {
        "q_proj": config["num_attention_heads"],
        "k_proj": config.get("num_key_value_heads") or config["num_attention_heads"],
    }
    for base, name in single.items():
        tensor = files[name].get_tensor(name)
        if ARCHITECTURES[config["model_type"]] is gguf.MODEL_ARCH.LLAMA and base.rpartition(".")[2] in heads:
            tensor = neighbours(tensor, heads[base.rpartition(".")[2]])
        yield _gguf_name(names, base), tensor
    for base, experts in stacks.items():
        stacked = torch.stack([files[experts[i]].get_tensor(experts[i]) for i in range(len(experts))])
        yield _gguf_name(names, base), stacked


def _gguf_name(names: gguf.TensorNameMap, base: str) -> str:
    found = names.get_name(base)
    if found is None:
        raise ValueError(f"{base}: the gguf library has no name for it")
    return f"{found}.weight"


def convert(model: Path, output: Path, dtype: str = "float32") -> None:
    """Writes the file, whole or not at all. Raises ValueError for a model it cannot write."""
    config = json.loads((model / "config.json").read_text())
    if config["model_type"] not in ARCHITECTURES:
        raise ValueError(f"{model}: is a {config['model_type']}; written are {', '.join(ARCHITECTURES)}")
    part = output.with_suffix(".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    # Tensors wait in a temporary file, not in memory.
    writer = gguf.GGUFWriter(
        part, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config["model_type"]]], use_temp_file=True
    )
    writer.add_name(model.name)
    writer.add_file_type(FILE_TYPES[dtype])
    write_numbers(writer, config)
    write_tokenizer(writer, model, config)
    for name, tensor in tensors(model, config):
        values = np.ascontiguousarray(tensor.float().numpy())
        keeps_float32 = tensor.ndim == 1 or name.endswith("ffn_gate_inp.weight")
        kind = gguf.GGMLQuantizationType.F32 if keeps_float32 else TYPES[dtype]
        if kind is gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.replace(output)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory of a checkpoint")
    parser.add_argument("output", type=Path)
    parser.add_argument("--dtype", choices=TYPES, default="float32")
    arguments = parser.parse_args()
    convert(arguments.model, arguments.output, arguments.dtype)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
