"""The shards' partial sums add up to the unsharded answer, however the FFN side is cut and whoever routes."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from afd_server.models.checkpoint import load_attention_half, load_ffn_half
from afd_server.models.families import read_model_spec
from afd_server.models.ffn_call import FFNCall
from afd_server.models.halves import FFNShard
from afd_server.models.spec import MoESpec
from tests.checkpoints import write_checkpoint
from tests.unit.models.served import CPU, KERNELS, PLANS, load_whole, random_texts, run

TEXTS = random_texts((30, 7, 1))
FAMILIES = ("llama", "mixtral", "qwen3_moe", "deepseek_v3", "step3")
LAYOUTS = [(1, 2), (2, 1), (2, 2), (4, 1), (1, 3), (3, 2), (5, 3)]


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    written = {}

    def get(family, **overrides):
        key = (family, *overrides.items())
        if key not in written:
            written[key] = write_checkpoint(family, tmp_path_factory.mktemp(family), **overrides)
        return written[key]

    return get


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("gate_on", ["attention", "ffn"])
@pytest.mark.parametrize(("ep", "tp"), LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_sharded_model(directories, family, ep, tp, gate_on, kernels):
    directory = directories(family)
    model = load_whole(directory, ep=ep, tp=tp, gate_on=gate_on, kernels=kernels)
    torch.testing.assert_close(
        model.logits(TEXTS[0]), load_whole(directory).logits(TEXTS[0]), atol=5e-5, rtol=5e-5
    )


def test_an_mlps_output_bias_is_added_once(directories):
    directory = directories("llama", mlp_bias=True)
    sharded = run(load_whole(directory, ep=2, tp=2), TEXTS, PLANS["mixed"](TEXTS))
    whole = run(load_whole(directory), TEXTS, PLANS["mixed"](TEXTS))
    for key, row in sharded.items():
        torch.testing.assert_close(row, whole[key], atol=5e-5, rtol=5e-5)


def moe_layer(spec):
    return next(layer for layer, ffn in enumerate(spec.ffn) if isinstance(ffn, MoESpec))


def routed_call(spec, layer, rows=13):
    generator = torch.Generator().manual_seed(4)
    ffn = spec.ffn[layer]
    scores = torch.rand(rows, ffn.num_experts, generator=generator)
    weights, ids = scores.topk(ffn.top_k)
    return FFNCall(layer, torch.randn(rows, spec.hidden_size, generator=generator), ids.int(), weights)


def load_half(directory, shard, *, dtype=torch.float32, gate_on="attention"):
    return load_ffn_half(directory, read_model_spec(directory), shard, device=CPU, dtype=dtype, gate_on=gate_on)


@torch.inference_mode()
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "step3"])
def test_rows_sent_only_where_an_expert_is_add_up_too(directories, family):
    """As an attention worker sends them from 4 expert shards on: each shard gets its rows only, some none at all."""
    directory = directories(family)
    spec = read_model_spec(directory)
    layer = moe_layer(spec)
    call = routed_call(spec, layer, rows=3)
    total = torch.zeros_like(call.x)
    sent = 0
    for rank in range(4):
        shard = FFNShard(rank, 4, 0, 1)
        first, last = shard.experts(spec.ffn[layer].num_experts)
        rows = ((call.topk_ids >= first) & (call.topk_ids < last)).any(1).nonzero()[:, 0]
        part = FFNCall(layer, call.x[rows], call.topk_ids[rows], call.topk_weights[rows])
        total.index_add_(0, rows, load_half(directory, shard).forward(part))
        sent += len(rows)
    assert sent < 4 * len(call.x)  # else this tests nothing
    torch.testing.assert_close(total, load_half(directory, FFNShard()).forward(call), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_a_shard_without_a_row_answers_zeros(directories):
    directory = directories("deepseek_v3")
    spec = read_model_spec(directory)
    call = routed_call(spec, moe_layer(spec))
    call.topk_ids = torch.zeros_like(call.topk_ids)  # expert 0 only, which the last shard does not hold
    y = load_half(directory, FFNShard(3, 4, 0, 1)).forward(call)
    assert y.shape == call.x.shape
    assert not y.any()


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
@pytest.mark.parametrize(
    ("wire", "dtype", "tolerance"),
    [(torch.bfloat16, torch.float32, 2e-2), (torch.float32, torch.bfloat16, 2e-2), (torch.float32, torch.float32, 0)],
)  # fmt: skip
def test_the_wire_may_be_of_another_type_than_the_model(directories, family, wire, dtype, tolerance):
    directory = directories(family)
    spec = read_model_spec(directory)
    exact = load_half(directory, FFNShard())
    for layer, ffn in enumerate(spec.ffn):
        call = routed_call(spec, layer) if isinstance(ffn, MoESpec) else FFNCall(layer, torch.randn(5, 64))
        expected = exact.forward(call)
        out = torch.full_like(call.x, torch.nan, dtype=wire)
        half = load_half(directory, FFNShard(), dtype=dtype)
        answer = half.forward(dataclasses.replace(call, x=call.x.to(wire)), out)
        assert answer is out
        assert (out.float() - expected).abs().max() <= tolerance * expected.abs().max()


def test_every_expert_and_every_slice_is_held_once(directories):
    directory = directories("qwen3_moe")
    whole = load_half(directory, FFNShard()).weight_bytes()
    for ep, tp in LAYOUTS:
        parts = [load_half(directory, FFNShard(e, ep, t, tp)) for e in range(ep) for t in range(tp)]
        assert sum(part.weight_bytes() for part in parts) == whole


@pytest.mark.parametrize("gate_on", ["attention", "ffn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_halves_hold_the_checkpoint_and_nothing_else(directories, family, gate_on):
    directory = directories(family)
    stored = load_file(directory / "model.safetensors").values()
    spec = read_model_spec(directory)
    attention = load_attention_half(directory, spec, device=CPU, dtype=torch.float32, gate_on=gate_on)
    ffn = load_half(directory, FFNShard(), gate_on=gate_on)
    assert attention.weight_bytes() + ffn.weight_bytes() == sum(tensor.numel() * 4 for tensor in stored)
    routers = sum(
        (spec.hidden_size + layer.correction_bias) * layer.num_experts * 4
        for layer in spec.ffn
        if isinstance(layer, MoESpec)
    )
    without = load_half(directory, FFNShard(), gate_on="attention").weight_bytes()
    assert ffn.weight_bytes() - without == (routers if gate_on == "ffn" else 0)


def test_a_call_names_its_experts_where_the_attention_side_routes(directories):
    directory = directories("qwen3_moe")
    spec = read_model_spec(directory)
    seen = {}
    for gate_on in ("attention", "ffn"):
        model = load_whole(directory, gate_on=gate_on)
        half = model._ffn_halves[0]
        forward, calls = half.forward, []
        half.forward = lambda call, calls=calls, forward=forward: calls.append(call) or forward(call)
        model.logits(TEXTS[1])
        seen[gate_on] = calls
    for layer, (named, bare) in enumerate(zip(seen["attention"], seen["ffn"], strict=True)):
        assert named.layer == bare.layer == layer
        assert bare.topk_ids is None
        assert bare.topk_weights is None
        if not isinstance(spec.ffn[layer], MoESpec):
            assert named.topk_ids is None
            continue
        assert named.topk_ids.shape == (len(TEXTS[1]), spec.ffn[layer].top_k)
        assert named.topk_ids.dtype == torch.int32
        assert named.topk_weights.dtype == torch.float32


@torch.inference_mode()
def test_calls_that_are_routed_before_they_are_merged_keep_their_experts(directories):
    directory = directories("deepseek_v3")
    spec = read_model_spec(directory)
    layer = moe_layer(spec)
    halves = [load_half(directory, FFNShard(e, 3, 0, 1), gate_on="ffn") for e in range(3)]
    bare = [FFNCall(layer, torch.randn(rows, spec.hidden_size)) for rows in (1, 5)]
    total = 0
    for half in halves:
        routed = [half.routed(call) for call in bare]
        merged = FFNCall(
            layer,
            torch.cat([call.x for call in routed]),
            torch.cat([call.topk_ids for call in routed]),
            torch.cat([call.topk_weights for call in routed]),
        )
        assert half.routed(merged) is merged
        total = total + half.forward(merged)
    expected = torch.cat([sum(half.forward(call) for half in halves) for call in bare])
    torch.testing.assert_close(total, expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_all_shards_route_a_call_alike_and_as_the_attention_side_does(directories):
    directory = directories("deepseek_v3")
    spec = read_model_spec(directory)
    layer = moe_layer(spec)
    attention = load_attention_half(directory, spec, device=CPU, dtype=torch.float32, gate_on="attention")
    call = FFNCall(layer, torch.randn(9, spec.hidden_size))
    ids, weights = attention._layers[layer].router.forward(call.x)
    for rank in range(4):
        routed = load_half(directory, FFNShard(rank, 4, 0, 1), gate_on="ffn").routed(call)
        assert torch.equal(routed.topk_ids, ids)
        assert torch.equal(routed.topk_weights, weights)
    assert call.topk_ids is None  # the caller may send it again


def test_a_dense_layers_call_is_not_routed(directories):
    half = load_half(directories("llama"), FFNShard(), gate_on="ffn")
    call = FFNCall(0, torch.randn(2, 64))
    assert half.routed(call) is call
