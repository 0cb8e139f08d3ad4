"""Tiny random checkpoints of every served family, and a tiny tokenizer, for tests.

transformers writes the weights, so names and layout are the published ones; Step-3, which it does not have, is written
by hand. Norms, biases and routers get values that differ from their initial ones, so that leaving one out shows.
"""

import json

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB_SIZE = 288

COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-2,  # large, so that a norm with another one shows
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
DENSE = {"intermediate_size": 88}

FAMILIES = {
    "llama": {**DENSE},
    "qwen2": {**DENSE},
    "qwen3": {**DENSE, "head_dim": 24},
    "mixtral": {"intermediate_size": 40, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **DENSE,
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "norm_topk_prob": False,
        "mlp_only_layers": [1],
    },
    "deepseek_v3": {
        **DENSE,
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "moe_intermediate_size": 24,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 1.0,
        },
    },
}


def write_checkpoint(family, directory, *, seed=0, dtype="float32", **overrides):
    """Writes config.json and model.safetensors into `directory` and returns it. Keys of the configuration in overrides."""
    if family == "step3":
        return write_step3(directory, seed=seed, dtype=dtype, **overrides)
    model = build_model(family, seed=seed, dtype=dtype, **overrides)
    model.save_pretrained(directory)
    return directory


def build_model(family, *, seed=0, dtype="float32", **overrides):
    """transformers' own model of the family, with random weights."""
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **overrides})
    config.dtype = getattr(torch, dtype)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            _randomise(name, parameter)
    return model.to(config.dtype)


def _randomise(name, tensor):
    if name.endswith("inv_freq"):
        return
    if "norm" in name:
        tensor.uniform_(0.5, 1.5)
    elif tensor.ndim == 1:  # biases, correction bias
        tensor.normal_(std=0.3)
    else:
        tensor.normal_(std=tensor.shape[-1] ** -0.5)


STEP3 = {
    "architectures": ["Step3TextForCausalLM"],
    "model_type": "step3_text",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 72,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_attention_groups": 1,
    "head_dim": 24,
    "share_q_dim": 40,
    "max_position_embedding": 256,
    "rms_norm_eps": 1e-2,  # large, so that a norm with another one shows
    "rope_theta": 500000.0,
    "moe_num_experts": 6,
    "moe_top_k": 3,
    "moe_intermediate_size": 20,
    "share_expert_dim": 28,
    "norm_expert_weight": False,
    "moe_layers_enum": "1,2",
    "eos_token_id": 257,
}


def write_step3(directory, *, seed=0, dtype="float32", **overrides):
    """A Step-3 as its hub repository lays it out: experts stacked, the fused query projection in its parts."""
    config = {**STEP3, "torch_dtype": dtype, **overrides}
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape):
        return torch.randn(shape, generator=generator).mul(shape[-1] ** -0.5).to(getattr(torch, dtype))

    def norm(size):
        return torch.rand(size, generator=generator).add(0.5).to(getattr(torch, dtype))

    def mlp(prefix, size, *stack):
        return {
            f"{prefix}.gate_proj.weight": matrix(*stack, size, hidden),
            f"{prefix}.up_proj.weight": matrix(*stack, size, hidden),
            f"{prefix}.down_proj.weight": matrix(*stack, hidden, size),
        }

    hidden, head_dim, rank = config["hidden_size"], config["head_dim"], config["share_q_dim"]
    experts, queries = config["moe_num_experts"], config["num_attention_heads"] * head_dim
    tensors = {
        "model.embed_tokens.weight": matrix(VOCAB_SIZE, hidden),
        "model.norm.weight": norm(hidden),
        "lm_head.weight": matrix(VOCAB_SIZE, hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        tensors |= {
            f"{prefix}.input_layernorm.weight": norm(hidden),
            f"{prefix}.post_attention_layernorm.weight": norm(hidden),
            f"{prefix}.self_attn.q_proj.weight": matrix(rank, hidden),
            f"{prefix}.self_attn.inter_norm.weight": norm(rank),
            f"{prefix}.self_attn.wq.weight": matrix(queries, rank),
            f"{prefix}.self_attn.k_proj.weight": matrix(head_dim, hidden),
            f"{prefix}.self_attn.v_proj.weight": matrix(head_dim, hidden),
            f"{prefix}.self_attn.o_proj.weight": matrix(hidden, queries),
        }
        if str(layer) in config["moe_layers_enum"].split(","):
            tensors[f"{prefix}.moe.gate.weight"] = matrix(experts, hidden)
            tensors |= mlp(f"{prefix}.moe", config["moe_intermediate_size"], experts)
            tensors |= mlp(f"{prefix}.share_expert", config["share_expert_dim"])
        else:
            tensors |= mlp(f"{prefix}.mlp", config["intermediate_size"])
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, directory / "model.safetensors")
    return directory


CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def write_tokenizer(directory):
    """A byte-level BPE without merges: one token a byte, ids 0 to 255, then SPECIAL_TOKENS from 256 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[1],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory
