"""What a configuration means for a model: every `auto` resolved, what cannot work refused, every worker's place."""

import dataclasses
from pathlib import Path

import pytest
import torch

from afd_server.cluster import layout
from afd_server.cluster.layout import (
    ffn_shard,
    graph_capture,
    link_shape,
    operations,
    resolve,
    threads_per_worker,
)
from afd_server.config import ServeConfig
from afd_server.errors import ConfigError
from afd_server.kernels.library import KernelBuildError
from afd_server.models.halves import FFNShard
from afd_server.models.operations import TorchOperations
from afd_server.models.operations_cpu import CPUOperations
from afd_server.models.operations_gpu import GPUOperations
from afd_server.models.spec import DenseSpec, GQASpec, ModelSpec, MoESpec, RopeSpec

DENSE = ModelSpec(
    architecture="LlamaForCausalLM",
    hidden_size=64,
    vocab_size=256,
    num_layers=2,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    max_position_embeddings=512,
    dtype="bfloat16",
    eos_token_ids=(2,),
    attention=GQASpec(num_heads=4, num_kv_heads=2, head_dim=16, rope=RopeSpec("default", 1e4)),
    ffn=(DenseSpec(128), DenseSpec(128)),
)
MIXTURE = dataclasses.replace(
    DENSE, ffn=(DenseSpec(128), MoESpec(num_experts=4, top_k=2, intermediate_size=64))
)


def test_auto_becomes_the_models_own():
    config = resolve(ServeConfig(model="org/name", executor="local"), DENSE, Path("/models/name"))
    assert (config.dtype, config.wire_dtype, config.transport, config.max_model_len) == (
        "bfloat16",
        "bfloat16",
        "inproc",
        512,
    )
    assert (config.model, config.served_model_name) == ("/models/name", "org/name")


def test_a_step_can_carry_what_its_requests_may_have_reported():
    wide = dataclasses.replace(DENSE, vocab_size=100_000)
    for possible in ({"max_logprobs": -1, "max_num_seqs": 2}, {"max_num_seqs": 2000}, {"max_logprobs": 4096}):
        resolve(ServeConfig(executor="local", **possible), wide, Path("/models/name"))
    for impossible in ({"max_logprobs": -1, "max_num_seqs": 3}, {"max_logprobs": 4097}):
        with pytest.raises(ConfigError, match=r"--max-logprobs.*--max-num-seqs"):
            resolve(ServeConfig(executor="local", **impossible), wide, Path("/models/name"))
    with pytest.raises(ConfigError, match="--max-logprobs"):
        ServeConfig(max_logprobs=-2)


def test_what_is_given_stays():
    given = ServeConfig(dtype="float32", wire_dtype="fp8", max_model_len=100, served_model_name="mine")
    config = resolve(given, DENSE, Path("/models/name"))
    assert (config.dtype, config.wire_dtype, config.max_model_len) == ("float32", "fp8", 100)
    assert (config.served_model_name, config.transport) == ("mine", "auto")


@pytest.mark.parametrize(
    ("settings", "spec", "flag"),
    [
        ({"max_model_len": 513}, DENSE, "--max-model-len"),
        ({"ffn_workers": 5}, MIXTURE, "--ffn-workers"),
        ({}, dataclasses.replace(DENSE, dtype="float16"), "--dtype"),
    ],
)
def test_what_cannot_work_is_refused_by_its_flag(settings, spec, flag):
    with pytest.raises(ConfigError) as caught:
        resolve(ServeConfig(**settings), spec, Path("/models/name"))
    assert caught.value.flag == flag


def test_every_ffn_worker_has_its_own_part_and_replicas_have_the_same():
    config = ServeConfig(ffn_workers=8, ffn_replicas=2, ffn_parallel="2x2")
    shards = [ffn_shard(config, index) for index in range(8)]
    assert shards[:4] == [
        FFNShard(0, 2, 0, 2),
        FFNShard(0, 2, 1, 2),
        FFNShard(1, 2, 0, 2),
        FFNShard(1, 2, 1, 2),
    ]
    assert shards[4:] == shards[:4]


def test_a_call_carries_expert_ids_only_when_attention_routes():
    config = resolve(ServeConfig(max_num_batched_tokens=32, max_num_seqs=8), MIXTURE, Path("m"))
    assert link_shape(config, MIXTURE).top_k == 2
    assert link_shape(config, MIXTURE).max_rows == 32
    assert link_shape(dataclasses.replace(config, gate_on="ffn"), MIXTURE).top_k == 0
    assert link_shape(config, DENSE).top_k == 0


@pytest.mark.parametrize(
    ("settings", "threads"),
    [
        ({}, 8),
        ({"micro_batches": "2"}, 4),
        ({"attention_workers": 3}, 2),
        ({"ffn_workers": 20, "micro_batches": "2"}, 1),
    ],
)
def test_sides_that_take_turns_use_all_cores_and_others_share(settings, threads):
    assert threads_per_worker(ServeConfig(**settings), cores=8) == threads


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("kernels", "kind"), [("auto", CPUOperations), ("native", CPUOperations), ("torch", TorchOperations)]
)
def test_what_a_cpu_worker_computes_with(kernels, kind):
    config = ServeConfig(model="m", dtype="bfloat16", kernels=kernels)
    computing = operations(config, CPU)
    assert type(computing) is kind
    assert computing.activation_dtype == (torch.bfloat16 if kind is TorchOperations else torch.float32)


@pytest.fixture
def no_compiler(monkeypatch):
    def fail():
        raise KernelBuildError("there is no C++ compiler")

    monkeypatch.setattr(layout, "library", fail)


def test_without_a_compiler_auto_falls_back_on_torch_and_says_so(no_compiler, caplog):
    assert isinstance(operations(ServeConfig(model="m", dtype="float32"), CPU), TorchOperations)
    assert "there is no C++ compiler" in caplog.text


@pytest.mark.parametrize("asked", [{"kernels": "native"}, {"quantization": "int8"}])
def test_what_was_asked_for_is_not_replaced(no_compiler, asked):
    with pytest.raises(ConfigError, match=r"--kernels: there is no C\+\+ compiler"):
        operations(ServeConfig(model="m", dtype="float32", **asked), CPU)


CUDA = torch.device("cuda")


@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("kernels", ["auto", "native", "torch"])
def test_what_a_gpu_worker_computes_with(monkeypatch, caplog, triton, kernels):
    monkeypatch.setattr(layout, "what_is_missing", lambda device: "" if triton else f"nothing for {device}")
    config = ServeConfig(model="m", dtype="bfloat16", kernels=kernels)
    if kernels == "native" and not triton:
        with pytest.raises(ConfigError, match="--kernels: no native ones on this GPU: nothing for cuda"):
            operations(config, CUDA)
        return
    computing = operations(config, CUDA)
    assert type(computing) is (GPUOperations if triton and kernels != "torch" else TorchOperations)
    assert computing.activation_dtype == torch.bfloat16
    assert ("nothing for cuda" in caplog.text) == (kernels == "auto" and not triton)


def test_graphs_are_for_cuda_devices_and_native_kernels(monkeypatch):
    monkeypatch.setattr(layout, "CUDACapture", lambda device, name: (device, name))
    config, native = ServeConfig(model="m", dtype="bfloat16"), GPUOperations(torch.bfloat16)
    assert graph_capture(config, CUDA, native, "ffn-0") == (CUDA, "ffn-0")
    assert graph_capture(config, CPU, native, "ffn-0") is None
    assert graph_capture(config, CUDA, TorchOperations(torch.bfloat16), "ffn-0") is None
    assert graph_capture(dataclasses.replace(config, enforce_eager=True), CUDA, native, "ffn-0") is None


@pytest.mark.parametrize("setting", [{"device": "cuda"}, {"kernels": "torch"}])
def test_quantization_needs_the_cpu_kernels(setting):
    with pytest.raises(ConfigError, match="--quantization"):
        ServeConfig(model="m", quantization="int8", **setting)
