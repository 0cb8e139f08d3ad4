"""One row per architecture: how its config.json is read, and what its checkpoints call each tensor.

This is the one place to add a family; docs/adding-a-model.md walks through it. What does not live here: the tables of
names themselves (tensor_names.py), which tensors a model has (tensors.py) and how they are loaded (checkpoint.py). Keys
and defaults are those of transformers' configuration classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from afd_server.errors import ModelError
from afd_server.models.config_file import ConfigFile
from afd_server.models.rope_config import latent_softmax_scale, read_rope
from afd_server.models.spec import (
    AttentionSpec,
    DenseSpec,
    FFNSpec,
    GQASpec,
    MFASpec,
    MLASpec,
    ModelSpec,
    MoESpec,
)
from afd_server.models.tensor_names import (
    DEEPSEEK_NAMES,
    DENSE_GQA_NAMES,
    MIXTRAL_NAMES,
    MOE_NAMES,
    STEP3_NAMES,
)

# Old checkpoints carry the rotary frequencies, which follow from the configuration.
ROTARY_FREQUENCIES = r"(.*\.)?rotary_emb\.inv_freq"


@dataclass(frozen=True, slots=True)
class Family:
    """names: slot -> name in the checkpoint, with {layer}, and {expert} where each expert is stored by itself.

    ignored: regular expressions of whole names that a checkpoint may hold and that no half needs. prediction_layers:
    so are layers after the last, which predict several tokens at once.
    """

    read: Callable[[ConfigFile], ModelSpec]
    names: Mapping[str, str]
    ignored: tuple[str, ...] = (ROTARY_FREQUENCIES,)
    prediction_layers: bool = False


def read_model_spec(directory: Path | str) -> ModelSpec:
    """The model in a Hugging Face directory.

    Raises ModelError, naming the key, for a config.json that is missing or damaged, an unknown architecture, and
    anything in it that would change the result and is not served.
    """
    config = ConfigFile.open(Path(directory))
    spec = family_of(config.architecture, config.where).read(config)
    config.refuse_what_was_not_read()
    return spec


def family_of(architecture: str, where: str = "config.json") -> Family:
    """The row of an architecture. Raises ModelError, naming the known ones."""
    if architecture not in FAMILIES:
        raise ModelError(f"{where}: architecture {architecture!r} is not served; known: {', '.join(FAMILIES)}")
    return FAMILIES[architecture]


# --- what the families share ---------------------------------------------------------------------------------------


def _decoder(
    config: ConfigFile, attention: AttentionSpec, ffn: FFNSpec | tuple[FFNSpec, ...], architecture: str = ""
) -> ModelSpec:
    """The rest of a model around its layers. One FFNSpec stands for every layer. architecture: the file's if empty."""
    config.only("hidden_act", "silu", default="silu")
    num_layers = config.integer("num_hidden_layers")
    max_positions = config.integer("max_position_embeddings")
    if attention.rope.kind == "dynamic":  # its point is to reach beyond the trained length
        max_positions = int(max_positions * attention.rope.factor)
    return ModelSpec(
        architecture=architecture or config.architecture,
        hidden_size=config.integer("hidden_size"),
        vocab_size=config.integer("vocab_size"),
        num_layers=num_layers,
        rms_norm_eps=config.number("rms_norm_eps"),
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
    no_window = config.integer("max_position_embeddings")
    window = config.integer("sliding_window", no_window)
    on = config.flag(switch, False) if switch else True
    if on and window < no_window:
        raise config.error("sliding_window", f"is {window}; sliding-window attention is not served")
    layer_types = config.value("layer_types", [])
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise config.error("layer_types", f"is {layer_types}; only full_attention is served")


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


# --- Mixtral, Qwen3-MoE --------------------------------------------------------------------------------------------


def read_mixtral(config: ConfigFile) -> ModelSpec:
    _refuse_sliding_window(config, switch=None)
    experts = MoESpec(
        num_experts=config.integer("num_local_experts"),
        top_k=config.integer("num_experts_per_tok"),
        intermediate_size=config.integer("intermediate_size"),
    )
    return _decoder(config, _grouped_query(config, rope_theta=1e6), _checked(config, experts))


def read_qwen3_moe(config: ConfigFile) -> ModelSpec:
    _refuse_sliding_window(config, switch="use_sliding_window")
    config.rename("num_local_experts", "num_experts")  # transformers 5 writes Mixtral's word
    bias = config.flag("attention_bias", False)
    attention = _grouped_query(config, qkv_bias=bias, output_bias=bias, qk_norm=True)
    experts = MoESpec(
        num_experts=config.integer("num_experts"),
        top_k=config.integer("num_experts_per_tok"),
        intermediate_size=config.integer("moe_intermediate_size"),
        renormalise=config.flag("norm_topk_prob", False),
    )
    every = config.integer("decoder_sparse_step", 1)
    dense_layers = config.integers("mlp_only_layers")
    num_layers = config.integer("num_hidden_layers")
    moe_layers = {
        layer for layer in range(num_layers) if layer not in dense_layers and (layer + 1) % every == 0
    }
    return _decoder(config, attention, _mixed(config, moe_layers, experts))


def _mixed(config: ConfigFile, moe_layers: set[int], experts: MoESpec) -> tuple[FFNSpec, ...]:
    """Experts on moe_layers, a dense MLP on the others."""
    dense = DenseSpec(config.integer("intermediate_size"))
    num_layers = config.integer("num_hidden_layers")
    _checked(config, experts)
    return tuple(experts if layer in moe_layers else dense for layer in range(num_layers))


def _checked(config: ConfigFile, experts: MoESpec) -> MoESpec:
    """Raises ModelError for a choice of experts that cannot be made."""
    if experts.top_k > experts.num_experts:
        raise ModelError(f"{config.where}: {experts.top_k} experts per token of {experts.num_experts}")
    if experts.num_groups > 1:
        group, rest = divmod(experts.num_experts, experts.num_groups)
        if rest or group < 2 or experts.top_groups * group < experts.top_k:
            raise config.error(
                "n_group", f"is {experts.num_groups}, which does not suit the numbers of experts"
            )
        if experts.top_groups > experts.num_groups:
            raise config.error("topk_group", f"is {experts.top_groups} of {experts.num_groups} groups")
    return experts


# --- DeepSeek-V3 ---------------------------------------------------------------------------------------------------


def read_deepseek_v3(config: ConfigFile) -> ModelSpec:
    num_heads = config.integer("num_attention_heads")
    config.only("num_key_value_heads", num_heads, default=num_heads)
    nope, rope = config.integer("qk_nope_head_dim"), config.integer("qk_rope_head_dim")
    config.only("head_dim", rope, default=rope)
    config.only("qk_head_dim", nope + rope, default=nope + rope)
    attention = MLASpec(
        num_heads=num_heads,
        query_rank=config.integer("q_lora_rank") if config.value("q_lora_rank", None) is not None else None,
        kv_rank=config.integer("kv_lora_rank"),
        nope_head_dim=nope,
        rope_head_dim=rope,
        value_head_dim=config.integer("v_head_dim"),
        softmax_scale=latent_softmax_scale(config, nope + rope),
        norm_eps=1e-6,
        rope=read_rope(config, interleaved=config.flag("rope_interleave", True)),
        bias=config.flag("attention_bias", False),
    )
    config.only("topk_method", "noaux_tc", default="noaux_tc")
    config.only("scoring_func", "sigmoid", default="sigmoid")
    config.only("moe_layer_freq", 1, default=1)
    experts = MoESpec(
        num_experts=config.integer("n_routed_experts"),
        top_k=config.integer("num_experts_per_tok"),
        intermediate_size=config.integer("moe_intermediate_size"),
        shared_intermediate_size=config.integer("moe_intermediate_size") * config.integer("n_shared_experts"),
        scoring="sigmoid",
        renormalise=config.flag("norm_topk_prob", True),
        num_groups=config.integer("n_group"),
        top_groups=config.integer("topk_group"),
        correction_bias=True,
        scaling=config.number("routed_scaling_factor"),
        float32_router=True,
    )
    first, num_layers = (
        config.integer("first_k_dense_replace", least=0),
        config.integer("num_hidden_layers"),
    )
    return _decoder(config, attention, _mixed(config, set(range(first, num_layers)), experts))


# --- Step-3 --------------------------------------------------------------------------------------------------------


STEP3_VISION = r"(vision_model|vit_downsampler|vit_downsampler2|vit_large_projector)\..*"


def read_step3(config: ConfigFile, architecture: str = "") -> ModelSpec:
    config.rename("max_position_embedding", "max_position_embeddings")
    config.rename("max_seq_len", "max_position_embeddings")
    config.set_aside("max_seq_len")
    config.only("num_attention_groups", 1, default=1)
    attention = MFASpec(
        num_heads=config.integer("num_attention_heads"),
        head_dim=config.integer("head_dim"),
        query_rank=config.integer("share_q_dim"),
        rope=read_rope(config, theta=5e5),
    )
    experts = MoESpec(
        num_experts=config.integer("moe_num_experts"),
        top_k=config.integer("moe_top_k"),
        intermediate_size=config.integer("moe_intermediate_size"),
        shared_intermediate_size=config.integer("share_expert_dim"),
        renormalise=config.flag("norm_expert_weight", False),
    )
    return _decoder(config, attention, _mixed(config, _step3_moe_layers(config), experts), architecture)


def _step3_moe_layers(config: ConfigFile) -> set[int]:
    """moe_layers_enum is a list or a string such as "4,5,6"; without it all layers but the first have experts."""
    value = config.value("moe_layers_enum", range(1, config.integer("num_hidden_layers")))
    try:
        return {int(layer) for layer in (value.split(",") if isinstance(value, str) else value)}
    except (TypeError, ValueError) as error:
        raise config.error("moe_layers_enum", f"is {value!r}, not a list of layers") from error


def read_step3_vl(config: ConfigFile) -> ModelSpec:
    """The text part. Images are not served."""
    config.set_aside(
        "vision_config", "understand_projector_stride", "projector_bias", "image_token_id", "image_token_len",
        "patch_token_len", "im_start_token", "im_end_token", "im_patch_token", "use_im_start_end",
        "vision_select_layer", "hidden_size",
    )  # fmt: skip
    inherited = ("dtype", "torch_dtype", "eos_token_id", "tie_word_embeddings", "quantization_config")
    config.set_aside(*inherited)
    return read_step3(config.part("text_config", inherit=inherited), config.architecture)


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(read_llama, DENSE_GQA_NAMES),
    "Qwen2ForCausalLM": Family(read_qwen2, DENSE_GQA_NAMES),
    "Qwen3ForCausalLM": Family(read_qwen3, DENSE_GQA_NAMES),
    "MixtralForCausalLM": Family(read_mixtral, MIXTRAL_NAMES),
    "Qwen3MoeForCausalLM": Family(read_qwen3_moe, {**DENSE_GQA_NAMES, **MOE_NAMES}),
    "DeepseekV3ForCausalLM": Family(read_deepseek_v3, DEEPSEEK_NAMES, prediction_layers=True),
    "Step3TextForCausalLM": Family(read_step3, STEP3_NAMES),
    "Step3VLForConditionalGeneration": Family(read_step3_vl, STEP3_NAMES, (ROTARY_FREQUENCIES, STEP3_VISION)),
}
