"""Counts: the paper's table, the checkpoints' own shapes, and what no config.json may change."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd_server.errors import ModelError
from afd_server.models.config_file import ConfigFile
from afd_server.models.families import read_model_spec
from afd_server.models.spec import DenseSpec
from afd_server.models.tensors import model_tensors
from afd_server.planner.counts import count, explain
from afd_server.planner.model_config import counted_model, read_counted_model
from afd_server.planner.paper import bundled_model
from tests.checkpoints import COMMON, FAMILIES

# arXiv 2507.19427: KV bytes, attention, linear and FFN FLOP of a token at 8192.
PAPER = {
    "deepseek-v3": (2.88e8, 1.47e11, 2.28e10, 4.84e10, 512),
    "qwen3-moe-235b": (7.89e8, 2.52e10, 1.34e10, 2.84e10, 32),
    "step-3": (2.56e8, 3.27e10, 2.07e10, 5.33e10, 128),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_counts(name):
    counts = count(bundled_model(name), 8192)
    ours = counts.kv_bytes, counts.attention_flop, counts.linear_flop, counts.ffn_flop, counts.intensity
    assert ours == pytest.approx(PAPER[name], rel=3e-3)


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [("deepseek-v3", 671, 37.5), ("qwen3-moe-235b", 235, 22.2), ("step-3", 316, 38.8)],
)
def test_parameters_as_published(name, billions, active):
    counts = count(bundled_model(name), 1)
    assert counts.attention_parameters + counts.ffn_parameters == pytest.approx(billions * 1e9, rel=2e-3)
    assert counts.active_parameters == pytest.approx(active * 1e9, rel=3e-3)


ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM",
}  # fmt: skip


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_what_the_server_loads_is_counted_by_its_tensors(family, tmp_path):
    content = {**COMMON, **FAMILIES[family], "architectures": [ARCHITECTURES[family]], "model_type": family}
    (tmp_path / "config.json").write_text(json.dumps(content))
    spec = read_model_spec(tmp_path)
    held = {"attention": 0, "ffn": 0, "router": 0}
    for tensor in model_tensors(spec):
        if len(tensor.shape) == 2:  # norms and biases are not counted
            held[tensor.role] += tensor.shape[0] * tensor.shape[1] * (tensor.num_experts or 1)
    counts = count(read_counted_model(tmp_path), 100, kv_value_bytes=4)
    assert counts.attention_parameters == held["attention"] + held["router"]
    assert counts.ffn_parameters == held["ffn"]
    values = spec.num_layers
    for extent in spec.attention.cache_entry_shape:
        values *= extent
    assert counts.request_bytes == 4 * 100 * values


def read(**values):
    content = {
        "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
        "intermediate_size": 96, "vocab_size": 100, **values,
    }  # fmt: skip
    return counted_model(ConfigFile(content, "config.json"), "test")


dimensions = st.fixed_dictionaries({
    "hidden_size": st.integers(1, 64).map(lambda n: 8 * n),
    "num_hidden_layers": st.integers(1, 8),
    "num_key_value_heads": st.sampled_from([1, 2, 4, 8]),
    "intermediate_size": st.integers(1, 512),
    "num_experts": st.integers(2, 64),
    "num_experts_per_tok": st.integers(1, 2),
})  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(dimensions, st.integers(1, 10**5), st.integers(1, 8))
def test_cache_and_attention_are_linear_in_context_and_the_rest_knows_none(values, context, times):
    model = read(**values)
    once, more = count(model, context), count(model, times * context)
    assert (more.kv_bytes, more.attention_flop) == (times * once.kv_bytes, times * once.attention_flop)
    assert (more.linear_flop, more.ffn_flop) == (once.linear_flop, once.ffn_flop)


@settings(deadline=None, max_examples=40)
@given(dimensions, st.sampled_from(["hidden_size", "num_hidden_layers", "intermediate_size", "num_experts"]))
def test_a_larger_model_never_counts_less(values, key):
    larger = count(read(**{**values, key: 2 * values[key]}), 100)
    smaller = count(read(**values), 100)
    assert larger.ffn_parameters > smaller.ffn_parameters
    assert larger.ffn_flop >= smaller.ffn_flop
    assert larger.linear_flop >= smaller.linear_flop


def test_a_window_bounds_what_is_read_and_kept():
    types = ["sliding_attention", "full_attention"] * 2
    windowed, full = read(layer_types=types, sliding_window=128), read()
    assert count(windowed, 100).kv_bytes == count(full, 100).kv_bytes
    assert count(windowed, 1000).kv_bytes == count(full, 1000).kv_bytes * (1000 + 128) / 2000
    assert count(windowed, 1000).request_bytes == count(windowed, 1000).kv_bytes


@pytest.mark.parametrize(
    ("values", "sliding"),
    [
        ({"sliding_window": 16}, [0, 1, 2, 3]),
        ({"sliding_window": 16, "use_sliding_window": False}, []),
        ({"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 3}, [3]),
        ({"sliding_window": 16, "sliding_window_pattern": 2}, [0, 2]),
        ({"sliding_window": 16, "model_type": "gemma2"}, [0, 2]),
        ({"attention_chunk_size": 16}, [0, 1, 2]),
    ],
)
def test_which_layers_slide(values, sliding):
    model = read(**values)
    assert [layer for layer, attention in enumerate(model.attention) if attention.window] == sliding


QWEN3_NEXT = {"full_attention_interval": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
              "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4}  # fmt: skip
KIMI = {
    "linear_attn_config": {"full_attn_layers": [4], "num_heads": 4, "head_dim": 8, "short_conv_kernel_size": 4}
}


@pytest.mark.parametrize("values", [QWEN3_NEXT, KIMI, {"attn_type_list": [0, 0, 0, 1]}])
def test_linear_layers_cost_the_same_at_any_context(values):
    model, full = read(**values), read()
    growth = count(model, 2000).kv_bytes - count(model, 1000).kv_bytes
    assert growth == (count(full, 2000).kv_bytes - count(full, 1000).kv_bytes) / 4
    state = count(model, 1000).request_bytes - 1000 * growth / 1000
    assert state == 3 * 4 * sum(layer.state_values.value for layer in model.attention) / 3 > 0


MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.mark.parametrize(
    ("values", "sparse"),
    [
        (MOE, [0, 1, 2, 3]),
        ({**MOE, "first_k_dense_replace": 1}, [1, 2, 3]),
        ({**MOE, "mlp_only_layers": [2]}, [0, 1, 3]),
        ({**MOE, "decoder_sparse_step": 2}, [1, 3]),
        ({**MOE, "interleave_moe_layer_step": 2}, [1, 3]),
        ({**MOE, "moe_layers_enum": "1,2"}, [1, 2]),
        ({**MOE, "moe_layer_freq": [0, 1, 1, 1]}, [1, 2, 3]),
        ({"num_experts": 0}, []),
    ],
)
def test_which_layers_have_experts(values, sparse):
    assert [layer for layer, ffn in enumerate(read(**values).ffn) if ffn.num_experts] == sparse


@pytest.mark.parametrize(
    ("values", "width"),
    [
        ({"share_expert_dim": 40}, 40),
        ({"n_shared_experts": 2}, 64),
        ({"shared_expert_intermediate_size": 48}, 48),
    ],
)
def test_shared_experts(values, width):
    ffn = read(**MOE, **values).ffn[0]
    assert ffn.shared.value == 3 * 64 * width
    assert ffn.active.value == 2 * ffn.expert.value + ffn.shared.value
    assert ffn.weights.value == 8 * ffn.expert.value + ffn.shared.value


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"intermediate_size": None}, "intermediate_size is missing"),
        ({"num_experts": 8}, "num_experts_per_tok or .* is missing"),
        ({"kv_lora_rank": 16}, "qk_nope_head_dim is missing"),
        ({"layer_types": ["mamba"] * 4}, "names 'mamba' layers, which are not counted"),
        ({"layer_types": ["full_attention"]}, "names 1 layers of 4"),
        ({"layer_types": ["sliding_attention"] * 4}, "sliding_window is missing"),
        ({"index_topk": 2048}, "sparse attention with an indexer, which is not counted"),
        ({"num_key_value_heads": 3}, "does not divide 8 heads"),
        ({"num_hidden_layers": "four"}, "num_hidden_layers is 'four'"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, "5 experts per token of 4"),
    ],
)
def test_what_cannot_be_counted_is_refused_by_name(values, says):
    with pytest.raises(ModelError, match=says):
        read(**values)


def test_every_number_of_an_explanation_is_the_one_that_is_counted():
    model = bundled_model("step-3")
    lines = list(explain(model, 8192))
    kv = next(line for line in lines if line.startswith("KV bytes"))
    assert kv.endswith("2 * groups * head_dim * context = 2 * 1 * 256 * 8192 = 4,194,304")
    assert count(model, 8192).kv_bytes == 61 * 4194304
    assert {line.split("(")[0].split(",")[0].strip() for line in lines} >= {
        "attention weights", "router weights", "FFN weights", "KV bytes", "attention FLOP", "linear FLOP", "FFN FLOP"
    }  # fmt: skip


def test_dense_and_expert_layers_are_told_apart_like_the_servers(tmp_path):
    content = {**COMMON, **FAMILIES["deepseek_v3"], "architectures": ["DeepseekV3ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(content))
    theirs = [isinstance(ffn, DenseSpec) for ffn in read_model_spec(tmp_path).ffn]
    assert [not ffn.num_experts for ffn in read_counted_model(tmp_path).ffn] == theirs
