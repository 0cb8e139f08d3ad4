"""A dense Llama and the Mixtral made of it say the same, by transformers' own reading of both."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralForCausalLM

from afd_server.checkpoints.upcycle import upcycle
from afd_server.errors import ConfigError, ModelError

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def save_llama(directory, dtype=torch.float32, **changes):
    """A random Llama whose every setting differs from Mixtral's default."""
    settings = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-3,
        "rope_parameters": LLAMA3_ROPE,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**settings | changes)).to(dtype).save_pretrained(directory)
    return directory


def logits(directory):
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        return model(torch.arange(40)[None] % 61).logits


def edit_config(directory, remove=(), **changes):
    path = directory / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in remove}
    path.write_text(json.dumps(config | changes))


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "num_key_value_heads": 4}])
def test_without_noise_logits_equal_the_dense_model(tmp_path, changes):
    dense, moe = save_llama(tmp_path / "dense", **changes), tmp_path / "moe"
    upcycle(dense, moe, experts=4, top_k=2)
    model = AutoModelForCausalLM.from_pretrained(moe)
    assert type(model) is MixtralForCausalLM
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (4, 2)
    assert model.config.sliding_window is None
    torch.testing.assert_close(logits(moe), logits(dense), rtol=1e-5, atol=1e-5)


def test_every_tensor_finds_its_place_in_mixtral(tmp_path):
    upcycle(save_llama(tmp_path / "dense"), tmp_path / "moe", experts=3, top_k=1)
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]


def test_keys_that_llama_leaves_to_its_defaults_are_not_left_to_mixtrals(tmp_path):
    """As older versions wrote it: no head_dim, no num_key_value_heads, rope_theta and torch_dtype at the top."""
    dense = save_llama(
        tmp_path / "dense",
        head_dim=8,
        num_key_value_heads=4,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    expected = logits(dense)
    edit_config(dense, remove=("head_dim", "num_key_value_heads", "rope_parameters", "rms_norm_eps"))
    upcycle(dense, tmp_path / "moe")
    torch.testing.assert_close(logits(tmp_path / "moe"), expected, rtol=1e-5, atol=1e-5)


def test_noise_makes_experts_differ_by_the_given_share(tmp_path):
    dense = save_llama(tmp_path / "dense")
    upcycle(dense, tmp_path / "moe", experts=4, top_k=2, noise=0.1)
    assert (logits(tmp_path / "moe") - logits(dense)).abs().max() > 1e-2
    original = AutoModelForCausalLM.from_pretrained(dense).model.layers[1].mlp.down_proj.weight
    experts = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").model.layers[1].mlp.experts.down_proj
    assert not torch.equal(experts[0], experts[1])
    for expert in experts:
        assert 0.08 < ((expert - original).std() / original.std()).item() < 0.12


def test_the_seed_decides_the_noise_and_the_routers(tmp_path):
    dense = save_llama(tmp_path / "dense")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        upcycle(dense, tmp_path / name, noise=0.1, seed=seed)
    assert torch.equal(logits(tmp_path / "a"), logits(tmp_path / "b"))
    assert not torch.equal(logits(tmp_path / "a"), logits(tmp_path / "c"))


def test_above_the_limit_weights_are_cut_into_files_with_an_index(tmp_path):
    dense = save_llama(tmp_path / "dense")
    upcycle(dense, tmp_path / "moe", experts=4, max_file_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "moe").glob("*.safetensors"))
    index = json.loads((tmp_path / "moe" / "model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    torch.testing.assert_close(logits(tmp_path / "moe"), logits(dense), rtol=1e-5, atol=1e-5)
    upcycle_again = tmp_path / "again"  # a source in several files is read as well as one in one
    save_llama(tmp_path / "one").rename(tmp_path / "two")
    LlamaForCausalLM.from_pretrained(tmp_path / "two").save_pretrained(tmp_path / "cut", max_shard_size="10KB")
    assert (tmp_path / "cut" / "model.safetensors.index.json").is_file()
    upcycle(tmp_path / "cut", upcycle_again)
    torch.testing.assert_close(logits(upcycle_again), logits(dense), rtol=1e-5, atol=1e-5)


def test_dtype_and_tokenizer_files_are_carried_over(tmp_path):
    dense = save_llama(tmp_path / "dense", dtype=torch.bfloat16)
    (dense / "chat_template.jinja").write_text("{{ messages }}")
    upcycle(dense, tmp_path / "moe", noise=0.05)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert (tmp_path / "moe" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "moe" / "generation_config.json").is_file()


@pytest.mark.parametrize(
    ("options", "flag"),
    [({"experts": 4, "top_k": 5}, "--top-k"), ({"top_k": 0}, "--top-k"), ({"experts": 0}, "--experts"),
     ({"noise": -0.1}, "--noise"), ({"noise": float("nan")}, "--noise")],
)  # fmt: skip
def test_impossible_options_are_refused_by_their_flag(tmp_path, options, flag):
    with pytest.raises(ConfigError) as caught:
        upcycle(tmp_path, tmp_path / "out", **options)
    assert caught.value.flag == flag


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"model_type": "qwen2"}, "qwen2"), ({"attention_bias": True}, "attention_bias"), ({"mlp_bias": True}, "mlp_bias"),
     ({"logit_scale": 0.5}, "logit_scale"), ({"hidden_size": None}, "hidden_size"),
     ({"quantization_config": {"bits": 4}}, "quantization_config"),
     ({"num_hidden_layers": 3}, r"model.layers.2.mlp.gate_proj.weight"), ({"intermediate_size": 40}, "shape")],
)  # fmt: skip
def test_a_source_that_cannot_become_a_mixtral_is_refused_and_nothing_is_left(tmp_path, changes, said):
    dense = save_llama(tmp_path / "dense")
    edit_config(dense, **changes)
    with pytest.raises(ModelError, match=said):
        upcycle(dense, tmp_path / "moe")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize(
    "index", ["[]", "{}", '{"weight_map": {"x": 3}}', '{"weight_map": {"x": "../a.safetensors"}}']
)
def test_a_damaged_index_is_named(tmp_path, index):
    dense = save_llama(tmp_path / "dense")
    (dense / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=r"index\.json"):
        upcycle(dense, tmp_path / "moe")


@pytest.mark.parametrize("config", ["[1]", "{"])
def test_a_damaged_config_is_named(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError, match=r"config\.json"):
        upcycle(tmp_path, tmp_path / "moe")


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json"):
        upcycle(tmp_path, tmp_path / "moe")


def test_what_is_in_out_is_not_touched(tmp_path):
    dense = save_llama(tmp_path / "dense")
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        upcycle(dense, tmp_path / "moe")
    assert [path.name for path in (tmp_path / "moe").iterdir()] == ["notes.txt"]
