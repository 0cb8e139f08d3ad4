"""config.json: what is read from it, and what is refused by name."""

import json
import re

import pytest

from afd_server.errors import ModelError
from afd_server.models.families import FAMILIES, read_model_spec
from afd_server.models.spec import DenseSpec, GQASpec, MFASpec, MLASpec, MoESpec
from tests.checkpoints import write_step3

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
    "transformers_version": "4.40.0",
}
MIXTRAL = {
    **LLAMA,
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}
QWEN3_MOE = {
    **LLAMA,
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
DEEPSEEK = {
    **LLAMA,
    "architectures": ["DeepseekV3ForCausalLM"],
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
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 1,
}
LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}
QWEN2 = {
    **LLAMA,
    "architectures": ["Qwen2ForCausalLM"],
    "use_sliding_window": False,
    "sliding_window": 128,
    "max_window_layers": 21,
}


def read(directory, config, generation=None):
    (directory / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return read_model_spec(directory)


def test_a_llama(tmp_path):
    spec = read(tmp_path, LLAMA)
    assert (spec.hidden_size, spec.vocab_size, spec.num_layers) == (64, 100, 2)
    assert spec.ffn == (DenseSpec(88), DenseSpec(88))
    assert isinstance(spec.attention, GQASpec)
    assert (spec.attention.head_dim, spec.attention.num_kv_heads) == (16, 2)
    assert spec.attention.cache_entry_shape == (2, 2, 16)
    assert spec.attention.rope.theta == 10000.0
    assert spec.dtype == "bfloat16"
    assert not spec.tie_word_embeddings
    assert spec.eos_token_ids == (2,)


def test_cache_entries_of_latent_and_factorised_attention(tmp_path):
    latent = read(tmp_path, DEEPSEEK).attention
    assert isinstance(latent, MLASpec)
    assert latent.cache_entry_shape == (40,)
    factorised = read_model_spec(write_step3(tmp_path / "step3")).attention
    assert isinstance(factorised, MFASpec)
    assert factorised.cache_entry_shape == (2, 1, 24)


def test_dense_and_moe_layers(tmp_path):
    dense, experts = read(tmp_path, DEEPSEEK).ffn
    assert dense == DenseSpec(88)
    assert isinstance(experts, MoESpec)
    assert (experts.num_experts, experts.top_k, experts.num_groups, experts.top_groups) == (8, 3, 4, 2)
    kinds = [type(ffn) for ffn in read_model_spec(write_step3(tmp_path / "step3")).ffn]
    assert kinds == [DenseSpec, MoESpec, MoESpec, DenseSpec]


@pytest.mark.parametrize(
    ("key", "in_config", "in_generation", "expected"),
    [
        ("one", 5, None, (5,)),
        ("several", [5, 6], None, (5, 6)),
        ("generation wins", 5, [7, 8], (7, 8)),
        ("none", None, None, ()),
    ],
)
def test_eos_token_ids(tmp_path, key, in_config, in_generation, expected):
    generation = None if in_generation is None else {"eos_token_id": in_generation}
    assert read(tmp_path, {**LLAMA, "eos_token_id": in_config}, generation).eos_token_ids == expected


def test_dtype_in_both_spellings(tmp_path):
    newer = {**LLAMA, "dtype": "float16"}
    del newer["torch_dtype"]
    assert read(tmp_path, newer).dtype == "float16"
    del newer["dtype"]
    assert read(tmp_path, newer).dtype == "float32"


def test_windows_that_no_position_reaches_are_no_windows(tmp_path):
    read(tmp_path, QWEN2)
    read(tmp_path, {**QWEN2, "layer_types": ["full_attention"] * 2})
    read(tmp_path, {**MIXTRAL, "sliding_window": 512})


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (LLAMA, {"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel' is not served; known: LlamaFor"),
        (LLAMA, {"architectures": None}, "architectures is None"),
        (LLAMA, {"hidden_size": None}, "hidden_size is missing"),
        (LLAMA, {"hidden_size": "64"}, "hidden_size is '64', not a whole number"),
        (LLAMA, {"num_hidden_layers": 0}, "num_hidden_layers is 0, not a whole number from 1"),
        (LLAMA, {"rms_norm_eps": "x"}, "rms_norm_eps is 'x', not a number"),
        (LLAMA, {"tie_word_embeddings": 1}, "tie_word_embeddings is 1, not true or false"),
        (LLAMA, {"num_key_value_heads": 3}, "num_key_value_heads is 3, which does not divide 4"),
        (LLAMA, {"head_dim": 15}, "head_dim is 15; RoPE needs an even one"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act is 'gelu'; served: 'silu'"),
        (LLAMA, {"torch_dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn'; served"),
        (LLAMA, {"eos_token_id": "</s>"}, "eos_token_id is '</s>', not token ids"),
        (LLAMA, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config is set"),
        (LLAMA, {"logit_softcapping": 30.0}, "logit_softcapping is 30.0, a key that is not known"),
        (LLAMA, {"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0, not a finite number above 0"),
        (LLAMA, {"rope_theta": float("inf")}, "rope_theta is inf, not a finite number"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": -1}}, "factor is -1, not a finite number above 0"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (LLAMA, {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_scaling: rope_type is 'longrope'"),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0, "skew": 3}}, "rope_scaling: skew is 3"),
        (LLAMA, {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "full_attention is {'rope_theta'"),
        (LLAMA, {"rope_scaling": LLAMA3}, "high_freq_factor is 1.0, not above low_freq_factor's 4.0"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": LINEAR}, "rope_scaling is {"),
        (LLAMA, {"rope_scaling": "linear"}, "rope_scaling is 'linear', not an object"),
        (QWEN2, {"use_sliding_window": True}, "sliding_window is 128; sliding-window attention"),
        (QWEN2, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
        (MIXTRAL, {"sliding_window": 256}, "sliding_window is 256; sliding-window attention"),
        (QWEN3_MOE, {"mlp_only_layers": "1"}, "mlp_only_layers is '1', not a list of whole numbers"),
        (MIXTRAL, {"num_experts_per_tok": 5}, "5 experts per token of 4"),
        (DEEPSEEK, {"scoring_func": "softmax"}, "scoring_func is 'softmax'; served: 'sigmoid'"),
        (DEEPSEEK, {"topk_method": "greedy"}, "topk_method is 'greedy'"),
        (DEEPSEEK, {"n_group": 3}, "n_group is 3"),
        (DEEPSEEK, {"topk_group": 5}, "topk_group is 5 of 4"),
        (DEEPSEEK, {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
    ],
)  # fmt: skip
def test_refusals_name_the_key(tmp_path, base, changes, message):
    with pytest.raises(ModelError, match=re.escape(message)):
        read(tmp_path, {**base, **changes})


@pytest.mark.parametrize(
    ("config", "message"),
    [("{", "cannot be read"), ("[]", "is not a JSON object")],
)
def test_a_damaged_file(tmp_path, config, message):
    with pytest.raises(ModelError, match=message):
        read(tmp_path, config)


def test_a_missing_file(tmp_path):
    with pytest.raises(ModelError, match=r"there is no config\.json"):
        read_model_spec(tmp_path)


def test_step3_in_another_form_is_refused(tmp_path):
    for change in ({"num_attention_groups": 8}, {"moe_layers_enum": "1,x"}):
        directory = write_step3(tmp_path)
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(ModelError, match=next(iter(change))):
            read_model_spec(directory)


def test_every_family_names_every_slot_it_may_need():
    """A row is data: names are templates of layer and expert only, and no two slots share one."""
    for family in FAMILIES.values():
        names = [name.format(layer=3, expert=5) for name in family.names.values()]
        assert len(set(names)) == len(names)
        for slot, name in family.names.items():
            assert ("{layer}" in name) == (slot not in ("embedding", "final_norm", "lm_head"))
            assert "{expert}" not in name or slot.startswith("expert.")
