"""A checkpoint written as GGUF and read again with the gguf library: names, shapes, numbers, tokens."""

import json

import gguf
import numpy as np
import pytest
import torch
from checkpoints import Shape, config, write_tokenizer, write_weights
from peers.to_gguf import convert, neighbours
from safetensors.torch import load_file, save_file

SHAPE = Shape(
    layers=2, hidden=64, heads=4, kv_heads=2, head_dim=32, experts=4, top_k=2, expert_width=32, vocab=512
)


@pytest.fixture
def checkpoint(tmp_path):
    directory = tmp_path / "toy"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config(SHAPE)))
    write_tokenizer(SHAPE.vocab, directory)
    write_weights(SHAPE, directory, seed=0)
    return directory


def weights_of(directory):
    return {
        name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()
    }


def read(checkpoint, tmp_path, dtype="float32"):
    """The file's reader, and its tensors by name with the outermost dimension first."""
    convert(checkpoint, tmp_path / "toy.gguf", dtype)
    reader = gguf.GGUFReader(tmp_path / "toy.gguf")
    return reader, {tensor.name: tensor for tensor in reader.tensors}


def test_every_weight_is_there_with_its_numbers(checkpoint, tmp_path):
    _, tensors = read(checkpoint, tmp_path)
    weights = weights_of(checkpoint)
    wanted = {tensor.name.format(bid=layer) for layer in range(2) for tensor in _qwen3_moe_tensors()}
    assert set(tensors) == wanted
    for ours, theirs in {
        "blk.1.attn_q.weight": "model.layers.1.self_attn.q_proj.weight",
        "blk.0.attn_k_norm.weight": "model.layers.0.self_attn.k_norm.weight",
        "blk.1.ffn_gate_inp.weight": "model.layers.1.mlp.gate.weight",
        "blk.0.ffn_norm.weight": "model.layers.0.post_attention_layernorm.weight",
        "token_embd.weight": "model.embed_tokens.weight",
    }.items():
        np.testing.assert_array_equal(tensors[ours].data, weights[theirs].numpy())


def _qwen3_moe_tensors():
    """What the architecture has, by the gguf library's own table; the LM head is the embedding."""
    from types import SimpleNamespace

    for tensor in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.QWEN3MOE]:
        if tensor is not gguf.MODEL_TENSOR.OUTPUT:
            yield SimpleNamespace(name=gguf.TENSOR_NAMES[tensor] + ".weight")


def test_experts_are_stacked_in_the_order_of_their_numbers(checkpoint, tmp_path):
    _, tensors = read(checkpoint, tmp_path)
    weights = weights_of(checkpoint)
    down = tensors["blk.1.ffn_down_exps.weight"].data
    assert down.shape == (4, 64, 32)
    for expert in range(4):
        np.testing.assert_array_equal(
            down[expert], weights[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"]
        )


def test_the_model_and_its_tokens_are_described(checkpoint, tmp_path):
    reader, _ = read(checkpoint, tmp_path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    assert values["general.architecture"] == "qwen3moe"
    assert values["qwen3moe.expert_used_count"] == 2
    assert values["qwen3moe.attention.key_length"] == 32
    vocab = json.loads((checkpoint / "tokenizer.json").read_text())["model"]["vocab"]
    assert values["tokenizer.ggml.tokens"] == sorted(vocab, key=vocab.get)
    assert values["tokenizer.ggml.pre"] == "llama-bpe"
    assert values["tokenizer.ggml.add_bos_token"] is False


def test_bfloat16_keeps_norms_and_router_in_float32(checkpoint, tmp_path):
    _, tensors = read(checkpoint, tmp_path, "bfloat16")
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert {kinds["blk.0.attn_q.weight"], kinds["blk.0.ffn_up_exps.weight"]} == {"BF16"}
    assert {kinds["blk.0.ffn_gate_inp.weight"], kinds["output_norm.weight"]} == {"F32"}


def test_llamas_halves_become_neighbours():
    """Row i of a head's first half and row i of its second half lie side by side."""
    rows = torch.arange(8.0)[:, None].expand(8, 3)  # two heads of four
    assert neighbours(rows, heads=2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_mixtrals_router_and_experts_have_names(checkpoint, tmp_path):
    changed = {**config(SHAPE), "model_type": "mixtral", "num_local_experts": 4, "tie_word_embeddings": False}
    (checkpoint / "config.json").write_text(json.dumps(changed))
    for file in checkpoint.glob("*.safetensors"):
        file.unlink()
    tensors = {
        f"model.layers.0.block_sparse_moe.experts.{e}.w3.weight": torch.full((32, 64), e) for e in range(4)
    }
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    tensors["model.layers.0.block_sparse_moe.gate.weight"] = torch.ones(4, 64)
    save_file(tensors, checkpoint / "model.safetensors")
    _, written = read(checkpoint, tmp_path)
    assert set(written) == {"blk.0.ffn_up_exps.weight", "blk.0.ffn_gate_inp.weight"}
    assert written["blk.0.ffn_up_exps.weight"].data[:, 0, 0].tolist() == [0, 1, 2, 3]


def test_another_architecture_is_refused_and_leaves_no_file(checkpoint, tmp_path):
    (checkpoint / "config.json").write_text(json.dumps({**config(SHAPE), "model_type": "step3"}))
    with pytest.raises(ValueError, match="is a step3"):
        convert(checkpoint, tmp_path / "toy.gguf")
    assert not list(tmp_path.glob("toy.*"))
