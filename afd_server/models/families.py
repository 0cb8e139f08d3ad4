"""One row per architecture: how its config.json is read, and what its checkpoints call each tensor.

This is the one place to add a family; docs/adding-a-model.md walks through it. What does not live here: which tensors a
model has (tensors.py) and how they are loaded (checkpoint.py). Keys and defaults are those of transformers'
configuration classes; tensor names are those of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from afd_server.errors import ModelError
from afd_server.models.config_file import ConfigFile
from afd_server.models.rope_config import read_rope
from afd_server.models.spec import AttentionSpec, DenseSpec, FFNSpec, GQASpec, ModelSpec

# Old checkpoints carry the rotary frequencies, which follow from the configuration.
ROTARY_FREQUENCIES = r"(.*\.)?rotary_emb\.inv_freq"


@dataclass(frozen=True, slots=True)
class Family:
    """names: slot -> name in the checkpoint, with {layer}, and {expert} where each expert is stored by itself.

    ignored: regular expressions of whole names that a checkpoint may hold and that no half needs.
    """

    read: Callable[[ConfigFile], ModelSpec]
    names: Mapping[str, str]
    ignored: tuple[str, ...] = (ROTARY_FREQUENCIES,)


def family_of(architecture: str, where: str = "config.json") -> Family:
    """The row of an architecture. Raises ModelError, naming the known ones."""
    if architecture not in FAMILIES:
        raise ModelError(f"{where}: architecture {architecture!r} is not served; known: {', '.join(FAMILIES)}")
    return FAMILIES[architecture]


# --- what the families share ---------------------------------------------------------------------------------------


def _decoder(config: ConfigFile, attention: AttentionSpec, ffn: FFNSpec | tuple[FFNSpec, ...]) -> ModelSpec:
    """The rest of a model around its layers. One FFNSpec stands for every layer."""
    config.only("hidden_act", "silu", default="silu")
    num_layers = config.integer("num_hidden_layers")
    max_positions = config.integer("max_position_embeddings")
    if attention.rope.kind == "dynamic":  # its point is to reach beyond the trained length
        max_positions = int(max_positions * attention.rope.factor)
    return ModelSpec(
        architecture=config.architecture,
        hidden_size=config.integer("hidden_size"),
        vocab_size=config.integer("vocab_size"),
        num_layers=num_layers,
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=config.flag("tie_word_embeddings", False),
        max_position_embeddings=max_positions,
        dtype=config.dtype(),
        eos_token_ids=config.eos_token_ids(),
        attention=attention,
        ffn=ffn if isinstance(ffn, tuple) else (ffn,) * num_layers,
    )


def _grouped_query(
    config: ConfigFile, *, head_dim: int | None = None, qkv_bias: bool = False, output_bias: bool = False,
    qk_norm: bool = False, rope_theta: float = 10000.0,
) -> GQASpec:  # fmt: skip
    """head_dim: where the file has none; hidden_size / num_attention_heads if None."""
    num_heads = config.integer("num_attention_heads")
    num_kv_heads = config.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise config.error("num_key_value_heads", f"is {num_kv_heads}, which does not divide {num_heads} heads")
    head_dim = config.integer("head_dim", head_dim or config.integer("hidden_size") // num_heads)
    if head_dim % 2:
        raise config.error("head_dim", f"is {head_dim}; RoPE needs an even one")
    return GQASpec(num_heads, num_kv_heads, head_dim, read_rope(config, theta=rope_theta),
                   qkv_bias=qkv_bias, output_bias=output_bias, qk_norm=qk_norm)  # fmt: skip


def _refuse_sliding_window(config: ConfigFile, *, switch: str | None) -> None:
    """Raises ModelError if any position is kept from attending to all before it. switch: the key that turns it on."""
    window = config.value("sliding_window", None)
    on = config.flag(switch, False) if switch else True
    if on and window is not None and window < config.integer("max_position_embeddings"):
        raise config.error("sliding_window", f"is {window}; sliding-window attention is not served")
    layer_types = config.value("layer_types", [])
    if set(layer_types) - {"full_attention"}:
        raise config.error("layer_types", f"has {sorted(set(layer_types))}; only full_attention is served")


DECODER_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
    "attention_norm": "model.layers.{layer}.input_layernorm.weight",
    "ffn_norm": "model.layers.{layer}.post_attention_layernorm.weight",
}
GQA_NAMES = {
    "q": "model.layers.{layer}.self_attn.q_proj.weight",
    "k": "model.layers.{layer}.self_attn.k_proj.weight",
    "v": "model.layers.{layer}.self_attn.v_proj.weight",
    "o": "model.layers.{layer}.self_attn.o_proj.weight",
    "q_bias": "model.layers.{layer}.self_attn.q_proj.bias",
    "k_bias": "model.layers.{layer}.self_attn.k_proj.bias",
    "v_bias": "model.layers.{layer}.self_attn.v_proj.bias",
    "o_bias": "model.layers.{layer}.self_attn.o_proj.bias",
    "q_norm": "model.layers.{layer}.self_attn.q_norm.weight",
    "k_norm": "model.layers.{layer}.self_attn.k_norm.weight",
}
MLP_NAMES = {
    "mlp.gate": "model.layers.{layer}.mlp.gate_proj.weight",
    "mlp.up": "model.layers.{layer}.mlp.up_proj.weight",
    "mlp.down": "model.layers.{layer}.mlp.down_proj.weight",
    "mlp.gate_bias": "model.layers.{layer}.mlp.gate_proj.bias",
    "mlp.up_bias": "model.layers.{layer}.mlp.up_proj.bias",
    "mlp.down_bias": "model.layers.{layer}.mlp.down_proj.bias",
}
DENSE_GQA_NAMES = {**DECODER_NAMES, **GQA_NAMES, **MLP_NAMES}


# --- Llama, Qwen2, Qwen3 -------------------------------------------------------------------------------------------


def read_llama(config: ConfigFile) -> ModelSpec:
    bias = config.flag("attention_bias", False)
    attention = _grouped_query(config, qkv_bias=bias, output_bias=bias)
    return _decoder(
        config, attention, DenseSpec(config.integer("intermediate_size"), config.flag("mlp_bias", False))
    )


def read_qwen2(config: ConfigFile) -> ModelSpec:
    _refuse_sliding_window(config, switch="use_sliding_window")
    attention = _grouped_query(config, qkv_bias=True)  # the architecture's own, whatever the file says
    return _decoder(config, attention, DenseSpec(config.integer("intermediate_size")))


def read_qwen3(config: ConfigFile) -> ModelSpec:
    _refuse_sliding_window(config, switch="use_sliding_window")
    bias = config.flag("attention_bias", False)
    attention = _grouped_query(config, head_dim=128, qkv_bias=bias, output_bias=bias, qk_norm=True)
    return _decoder(config, attention, DenseSpec(config.integer("intermediate_size")))


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(read_llama, DENSE_GQA_NAMES),
    "Qwen2ForCausalLM": Family(read_qwen2, DENSE_GQA_NAMES),
    "Qwen3ForCausalLM": Family(read_qwen3, DENSE_GQA_NAMES),
}
