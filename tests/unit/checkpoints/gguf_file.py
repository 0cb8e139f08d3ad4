"""A small Llama as a GGUF file, written by the gguf library in llama.cpp's conventions."""

import gguf
import torch
from transformers import LlamaConfig, LlamaForCausalLM

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot|>"]
MERGES = ["Ġ Ġ", "a b", "Ġ ab", "c d"]
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def byte_level_alphabet():
    """GPT-2's printable stand-ins of the 256 bytes, as the tokenizers library lists them."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def vocabulary():
    return SPECIAL_TOKENS + byte_level_alphabet() + [merge.replace(" ", "") for merge in MERGES]


def write_gguf(path, *, tied=True, end_of_turn=None, pre="smollm"):
    """Writes the file and returns the transformers model that it holds, in float32."""
    tokens = vocabulary()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, rms_norm_eps=1e-5, initializer_range=0.3,
        tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * len(SPECIAL_TOKENS) + [gguf.TokenType.NORMAL] * 260)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    if end_of_turn is not None:
        writer.add_eot_token_id(end_of_turn)
    _add_tensors(writer, model, tied)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _add_tensors(writer, model, tied):
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    if not tied:
        writer.add_tensor("output.weight", state["lm_head.weight"].numpy())
    for layer in range(2):
        for theirs, ours in _NAMES.items():
            tensor = state[f"model.layers.{layer}.{theirs}.weight"]
            if ours in (
                "attn_q",
                "attn_k",
            ):  # llama.cpp rotates neighbours, transformers the two halves of a head
                heads = tensor.shape[0] // 8
                tensor = tensor.view(heads, 2, 4, 32).transpose(1, 2).reshape(tensor.shape)
            writer.add_tensor(f"blk.{layer}.{ours}.weight", tensor.contiguous().numpy())
