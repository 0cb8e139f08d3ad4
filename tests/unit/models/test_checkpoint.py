"""Loading fails by name when a checkpoint is not what its config.json says, and reads what it should when it is."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from afd_server.errors import ModelError
from afd_server.models.checkpoint import load_attention_half, load_ffn_half
from afd_server.models.families import read_model_spec
from afd_server.models.halves import FFNShard
from tests.checkpoints import write_checkpoint
from tests.unit.models.served import CPU, load_whole

IDS = list(range(20))


def change(directory, changes):
    """Rewrites model.safetensors: name -> its new value, None to leave it out."""
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()} | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


ATTENTION = "model.layers.1.self_attn.k_proj.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
ROUTER = "model.layers.1.block_sparse_moe.gate.weight"


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        (ATTENTION, None, f"{ATTENTION} is missing"),
        (ATTENTION, torch.zeros(32, 63), f"{ATTENTION} has shape [32, 63], not [32, 64]"),
        (EXPERT, None, f"{EXPERT} is missing"),
        (EXPERT, torch.zeros(64, 40), f"{EXPERT} has shape [64, 40], not [40, 64]"),
        (ROUTER, None, f"{ROUTER} is missing"),
        ("lm_head.weight", None, "lm_head.weight is missing"),
        ("model.norm.bias", torch.zeros(64), "model.norm.bias: no part of MixtralForCausalLM has such a tensor"),
        ("model.layers.9.input_layernorm.weight", torch.zeros(64), "model.layers.9.input_layernorm.weight: no part"),
    ],
)  # fmt: skip
def test_a_wrong_tensor_is_named(tmp_path, name, value, problem):
    directory = write_checkpoint("mixtral", tmp_path)
    change(directory, {name: value})
    with pytest.raises(ModelError, match=re.escape(problem)):
        load_whole(directory)


def test_each_half_reads_its_own_tensors_only(tmp_path):
    """Tensors of the other role or shard may be absent: nobody looked for them."""
    directory = write_checkpoint("mixtral", tmp_path)
    tensors = load_file(directory / "model.safetensors")
    spec = read_model_spec(directory)
    where = {"device": CPU, "dtype": torch.float32}
    change(directory, {name: None for name in tensors if ".experts." in name})
    load_attention_half(directory, spec, **where, gate_on="attention")
    experts_0_to_3 = {name: tensor for name, tensor in tensors.items() if re.search(r"experts\.[0-3]\.", name)}
    save_file(experts_0_to_3, directory / "model.safetensors")
    load_ffn_half(directory, spec, FFNShard(0, 2, 0, 1), **where, gate_on="attention")
    with pytest.raises(ModelError, match=r"experts\.4\.w1\.weight is missing"):
        load_ffn_half(directory, spec, FFNShard(1, 2, 0, 1), **where, gate_on="attention")
    with pytest.raises(ModelError, match=re.escape("block_sparse_moe.gate.weight is missing")):
        load_ffn_half(directory, spec, FFNShard(0, 2, 0, 1), **where, gate_on="ffn")


def test_what_is_known_to_be_needless_is_passed_over(tmp_path):
    tied = write_checkpoint("llama", tmp_path / "llama", tie_word_embeddings=True)
    expected = load_whole(tied).logits(IDS)
    change(tied, {
        "lm_head.weight": load_file(tied / "model.safetensors")["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
    })  # fmt: skip
    assert torch.equal(load_whole(tied).logits(IDS), expected)
    deepseek = write_checkpoint("deepseek_v3", tmp_path / "deepseek")
    expected = load_whole(deepseek).logits(IDS)
    change(deepseek, {"model.layers.3.eh_proj.weight": torch.zeros(64, 128)})
    assert torch.equal(load_whole(deepseek).logits(IDS), expected)


def test_the_files_may_go_once_they_are_read(tmp_path):
    directory = write_checkpoint("deepseek_v3", tmp_path)
    model = load_whole(directory)
    expected = model.logits(IDS)
    size = (directory / "model.safetensors").stat().st_size
    (directory / "model.safetensors").write_bytes(b"\xff" * size)
    assert torch.equal(model.logits(IDS), expected)


def in_two_files(directory, *, second="model-2.safetensors"):
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], second: names[1::2]}
    for file_name, its_names in parts.items():
        save_file({name: tensors[name] for name in its_names}, directory / file_name)
    weight_map = {name: file_name for file_name, its_names in parts.items() for name in its_names}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_several_files_with_an_index(tmp_path):
    directory = write_checkpoint("qwen3_moe", tmp_path)
    expected = load_whole(directory).logits(IDS)
    in_two_files(directory)
    assert torch.equal(load_whole(directory, ep=1).logits(IDS), expected)


@pytest.mark.parametrize("second", ["../elsewhere.safetensors", "sub/../../elsewhere.safetensors"])
def test_an_index_that_points_elsewhere_is_refused(tmp_path, second):
    directory = write_checkpoint("llama", tmp_path / "model")
    (directory / "sub").mkdir()
    in_two_files(directory, second=second)
    with pytest.raises(ModelError, match="which is not a file beside it"):
        load_whole(directory)


def test_damaged_files_are_named(tmp_path):
    directory = write_checkpoint("llama", tmp_path)
    in_two_files(directory)
    (directory / "model-2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-2\.safetensors: cannot be read"):
        load_whole(directory)
    (directory / "model-2.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ModelError, match=r"model-2\.safetensors: cannot be read"):
        load_whole(directory)
    (directory / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(ModelError, match="is not an index"):
        load_whole(directory)
    (directory / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        load_whole(directory)


def test_an_index_that_names_the_wrong_file(tmp_path):
    directory = write_checkpoint("llama", tmp_path)
    in_two_files(directory)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "model-1.safetensors")
    path.write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"model-1\.safetensors: .*weight"):
        load_whole(directory)
