"""From any config.json to the layers that are counted, by its keys and not by its architecture's name.

What lives here: which keys say what, over the families that have such keys. What does not: formulas (attention_kinds.py,
ffn_kinds.py) and what the server runs (models/families.py): this reads models that it does not. A key that is lacking, and
one that says of something that is not counted, is refused by name; a wrong number would be worse than none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afd_server.errors import ModelError
from afd_server.models.config_file import ConfigFile, read_json_object
from afd_server.planner.attention_kinds import (
    AttentionLayer,
    factorized,
    gated_delta,
    grouped_query,
    kimi_delta,
    latent,
    lightning,
)
from afd_server.planner.ffn_kinds import FFNLayer, dense_mlp, mixture

# Keys of layers that are of no kind that is counted here, and what they are.
NOT_COUNTED = {
    "index_topk": "sparse attention with an indexer",
    "num_kv_shared_layers": "layers that share their KV cache",
    "mamba_d_state": "state-space layers",
    "ssm_state_size": "state-space layers",
    "ssm_cfg": "state-space layers",
    "d_state": "state-space layers",
    "is_encoder_decoder": "an encoder",
    "cross_attention_layers": "cross-attention",
    "moe_every_n_layers": "experts on some layers",
}
# MLPs of two matrices, where nothing in the file says so.
WITHOUT_GATE = {"gpt_neox", "nemotron", "phi", "starcoder2"}
# Every n-th layer attends to everything, where the file names a window and neither n nor the layers.
FULL_EVERY = {"gemma2": 2, "gemma3_text": 6, "cohere2": 4}


@dataclass(frozen=True)
class CountedModel:
    """One entry a layer of attention and ffn. max_context: positions that the model knows, 0 where it does not say."""

    name: str
    hidden: int
    vocab: int
    tied_head: bool
    max_context: int
    attention: tuple[AttentionLayer, ...]
    ffn: tuple[FFNLayer, ...]

    @property
    def num_layers(self) -> int:
        return len(self.attention)


def read_counted_model(path: Path, name: str = "") -> CountedModel:
    """Of a config.json, or of the directory that it lies in. Raises ModelError, naming the key that is at fault."""
    config = ConfigFile.open(path) if path.is_dir() else ConfigFile(read_json_object(path), str(path))
    return counted_model(config, name or (path.name if path.is_dir() else path.stem))


def counted_model(config: ConfigFile, name: str) -> CountedModel:
    if config.has("text_config"):  # of a model that also sees or hears
        config = config.part("text_config", inherit=("architectures", "tie_word_embeddings"))
    for key, what in NOT_COUNTED.items():
        if config.value(key, None) not in (None, False, 0, []):
            raise config.error(key, f"is set: {what}, which is not counted")
    return CountedModel(
        name,
        hidden=config.integer("hidden_size"),
        vocab=config.integer("vocab_size"),
        tied_head=config.flag("tie_word_embeddings", False),
        max_context=_first(
            config, "max_position_embeddings", "max_position_embedding", "max_seq_len", default=0
        ),
        attention=_attention_layers(config),
        ffn=_ffn_layers(config),
    )


def _first(config: ConfigFile, *keys: str, default: int | None = None) -> int:
    """The first of some names for one thing. Raises ModelError, naming them all, when there is none and no default."""
    for key in keys:
        if config.has(key):
            return config.integer(key, least=0)
    if default is None:
        raise ModelError(f"{config.where}: {' or '.join(keys)} is missing")
    return default


# --- attention -----------------------------------------------------------------------------------------------------


def _attention_layers(config: ConfigFile) -> tuple[AttentionLayer, ...]:
    full = _softmax_attention(config)
    window = None
    layers = []
    for kind in _layer_kinds(config):
        if kind == "full_attention":
            layers.append(full)
        elif kind == "linear_attention":
            layers.append(_linear_attention(config))
        elif kind in ("sliding_attention", "chunked_attention"):
            # A chunk is full on its last token only: counted as a window, at its most.
            key = "sliding_window" if kind == "sliding_attention" else "attention_chunk_size"
            window = config.integer(key)
            layers.append(full.within(window))
        else:
            raise config.error("layer_types", f"names {kind!r} layers, which are not counted")
    return tuple(layers)


def _softmax_attention(config: ConfigFile) -> AttentionLayer:
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if config.has("kv_lora_rank"):
        return latent(
            hidden,
            heads,
            config.integer("q_lora_rank") if config.has("q_lora_rank") else None,
            config.integer("kv_lora_rank"),
            config.integer("qk_nope_head_dim"),
            config.integer("qk_rope_head_dim"),
            config.integer("v_head_dim"),
        )
    head_dim = config.integer("head_dim", hidden // heads)
    if config.has("share_q_dim"):
        groups = config.integer("num_attention_groups", 1)
        return factorized(hidden, heads, groups, head_dim, config.integer("share_q_dim"))
    kv_heads = _first(config, "num_key_value_heads", "num_attention_groups", default=heads)
    if kv_heads == 0 or heads % kv_heads:
        raise config.error("num_key_value_heads", f"is {kv_heads}, which does not divide {heads} heads")
    gated = config.value("model_type", "") in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
    return grouped_query(hidden, heads, kv_heads, head_dim, output_gate=gated)


def _linear_attention(config: ConfigFile) -> AttentionLayer:
    hidden = config.integer("hidden_size")
    if config.has("linear_num_value_heads"):
        numbers = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
                   "linear_conv_kernel_dim")  # fmt: skip
        return gated_delta(hidden, *(config.integer(key) for key in numbers))
    if config.has("linear_attn_config"):
        part = config.part("linear_attn_config")
        return kimi_delta(
            hidden, part.integer("num_heads"), part.integer("head_dim"), part.integer("short_conv_kernel_size")
        )
    heads = config.integer("num_attention_heads")
    return lightning(hidden, heads, config.integer("head_dim", hidden // heads))


def _layer_kinds(config: ConfigFile) -> Sequence[str]:
    """One word of transformers' layer_types a layer, from whichever keys the family has for it."""
    num_layers = config.integer("num_hidden_layers")
    listed = config.value("layer_types", None)
    if listed is not None:
        return _listed_kinds(config, listed, num_layers)
    if config.has("attn_type_list"):  # MiniMax: 0 is lightning attention
        types = config.integers("attn_type_list")
        return _of_length(
            config, "attn_type_list", ["full_attention" if t else "linear_attention" for t in types]
        )
    if config.has("linear_attn_config"):  # Kimi-Linear counts layers from 1
        full = set(config.part("linear_attn_config").integers("full_attn_layers"))
        return ["full_attention" if n in full else "linear_attention" for n in range(1, num_layers + 1)]
    if config.has("full_attention_interval"):  # Qwen3-Next
        every = config.integer("full_attention_interval")
        return ["linear_attention" if (n + 1) % every else "full_attention" for n in range(num_layers)]
    if config.has("attention_chunk_size"):  # Llama 4: each fourth layer has no positions and no chunks
        return ["chunked_attention" if (n + 1) % 4 else "full_attention" for n in range(num_layers)]
    return _windowed_kinds(config, num_layers)


def _windowed_kinds(config: ConfigFile, num_layers: int) -> list[str]:
    if not config.has("sliding_window") or config.value("use_sliding_window", True) is False:
        return ["full_attention"] * num_layers
    model_type = str(config.value("model_type", ""))
    every = config.integer("sliding_window_pattern", FULL_EVERY.get(model_type, 0), least=0)
    if every:
        return ["sliding_attention" if (n + 1) % every else "full_attention" for n in range(num_layers)]
    first = config.integer("max_window_layers", 0, least=0) if config.has("use_sliding_window") else 0
    return ["sliding_attention" if n >= first else "full_attention" for n in range(num_layers)]


def _listed_kinds(config: ConfigFile, listed: Any, num_layers: int) -> list[str]:
    if not isinstance(listed, list) or not all(isinstance(kind, str) for kind in listed):
        raise config.error("layer_types", f"is {listed!r}, not a list of words")
    return _of_length(config, "layer_types", listed)


def _of_length(config: ConfigFile, key: str, values: list[str]) -> list[str]:
    num_layers = config.integer("num_hidden_layers")
    if len(values) < num_layers:
        raise config.error(key, f"names {len(values)} layers of {num_layers}")
    return values[:num_layers]  # what is beyond predicts several tokens at once


# --- FFN -----------------------------------------------------------------------------------------------------------


def _ffn_layers(config: ConfigFile) -> tuple[FFNLayer, ...]:
    hidden, num_layers = config.integer("hidden_size"), config.integer("num_hidden_layers")
    model_type = str(config.value("model_type", ""))
    matrices = 2 if model_type in WITHOUT_GATE else 3
    experts = _first(
        config, "n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts", default=0
    )
    if experts <= 1:
        return (dense_mlp(hidden, config.integer("intermediate_size"), matrices=matrices),) * num_layers
    top_k = _first(config, "num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k",
                   "experts_per_token")  # fmt: skip
    if not 1 <= top_k <= experts:
        raise ModelError(f"{config.where}: {top_k} experts per token of {experts}")
    width = _first(config, "moe_intermediate_size", "intermediate_size")
    sparse = mixture(hidden, experts, top_k, width, _shared_width(config, width, model_type), matrices=matrices)
    with_experts = _layers_with_experts(config, num_layers)
    if len(with_experts) == num_layers:
        return (sparse,) * num_layers
    dense = dense_mlp(hidden, _first(config, "intermediate_size_mlp", "intermediate_size"), matrices=matrices)
    return tuple(sparse if layer in with_experts else dense for layer in range(num_layers))


def _shared_width(config: ConfigFile, width: int, model_type: str) -> int:
    named = ("share_expert_dim", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size")
    counted = ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts")
    if any(config.has(key) for key in named):
        return _first(config, *named)
    if model_type in ("llama4", "llama4_text"):  # one, of which the file says nothing
        return width
    return width * _first(config, *counted, default=0)


def _layers_with_experts(config: ConfigFile, num_layers: int) -> set[int]:
    layers = set(range(num_layers))
    enumerated = config.value("moe_layers_enum", None) or config.value("moe_layers", None)
    if enumerated is not None:
        try:
            words = enumerated.split(",") if isinstance(enumerated, str) else enumerated
            return layers & {int(layer) for layer in words}
        except (TypeError, ValueError) as error:
            raise config.error("moe_layers_enum", f"is {enumerated!r}, not a list of layers") from error
    if isinstance(config.value("moe_layer_freq", 1), list):
        return {layer for layer, on in enumerate(config.integers("moe_layer_freq")) if on} & layers
    for key in ("moe_layer_freq", "decoder_sparse_step", "interleave_moe_layer_step"):
        # DeepSeek's counts from layer 0, the others have experts on the last of each so many.
        every, offset = config.integer(key, 1), 0 if key == "moe_layer_freq" else 1
        layers = {layer for layer in layers if (layer + offset) % every == 0}
    layers -= set(range(config.integer("first_k_dense_replace", 0, least=0)))
    return layers - set(config.integers("mlp_only_layers"))
