"""What the published checkpoints call each tensor: slot -> name, a table per layout.

{layer} and {expert} stand for numbers; an expert's name without {expert} is that of all experts stacked on a dimension in
front. What does not live here: which slots a model has (tensors.py), and which architecture has which table (families.py).
"""

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

MIXTRAL_NAMES = {
    **DECODER_NAMES,
    **GQA_NAMES,
    "router": "model.layers.{layer}.block_sparse_moe.gate.weight",
    "expert.gate": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
    "expert.up": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
    "expert.down": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
}

MOE_NAMES = {
    "router": "model.layers.{layer}.mlp.gate.weight",
    "expert.gate": "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
    "expert.up": "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
    "expert.down": "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
}

DEEPSEEK_NAMES = {
    **DECODER_NAMES,
    **MLP_NAMES,
    **MOE_NAMES,
    "router_correction": "model.layers.{layer}.mlp.gate.e_score_correction_bias",
    "shared.gate": "model.layers.{layer}.mlp.shared_experts.gate_proj.weight",
    "shared.up": "model.layers.{layer}.mlp.shared_experts.up_proj.weight",
    "shared.down": "model.layers.{layer}.mlp.shared_experts.down_proj.weight",
    "q": "model.layers.{layer}.self_attn.q_proj.weight",
    "q_down": "model.layers.{layer}.self_attn.q_a_proj.weight",
    "q_down_bias": "model.layers.{layer}.self_attn.q_a_proj.bias",
    "q_norm": "model.layers.{layer}.self_attn.q_a_layernorm.weight",
    "q_up": "model.layers.{layer}.self_attn.q_b_proj.weight",
    "kv_down": "model.layers.{layer}.self_attn.kv_a_proj_with_mqa.weight",
    "kv_down_bias": "model.layers.{layer}.self_attn.kv_a_proj_with_mqa.bias",
    "kv_norm": "model.layers.{layer}.self_attn.kv_a_layernorm.weight",
    "kv_up": "model.layers.{layer}.self_attn.kv_b_proj.weight",
    "o": "model.layers.{layer}.self_attn.o_proj.weight",
    "o_bias": "model.layers.{layer}.self_attn.o_proj.bias",
}

STEP3_NAMES = {
    **DECODER_NAMES,
    **MLP_NAMES,
    "q_down": "model.layers.{layer}.self_attn.q_proj.weight",
    "q_norm": "model.layers.{layer}.self_attn.inter_norm.weight",
    "q_up": "model.layers.{layer}.self_attn.wq.weight",
    "k": "model.layers.{layer}.self_attn.k_proj.weight",
    "v": "model.layers.{layer}.self_attn.v_proj.weight",
    "o": "model.layers.{layer}.self_attn.o_proj.weight",
    "router": "model.layers.{layer}.moe.gate.weight",
    "expert.gate": "model.layers.{layer}.moe.gate_proj.weight",
    "expert.up": "model.layers.{layer}.moe.up_proj.weight",
    "expert.down": "model.layers.{layer}.moe.down_proj.weight",
    "shared.gate": "model.layers.{layer}.share_expert.gate_proj.weight",
    "shared.up": "model.layers.{layer}.share_expert.up_proj.weight",
    "shared.down": "model.layers.{layer}.share_expert.down_proj.weight",
}
