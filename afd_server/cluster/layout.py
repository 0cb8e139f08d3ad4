"""What a configuration means for a model on this machine: every "auto" resolved, every worker's place in the model.

Called once before workers start (`resolve`), and by each worker for its own part. Imports no ray.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path

import torch

from afd_server.attention.dispatch import GroupLayout
from afd_server.config import ServeConfig
from afd_server.errors import ConfigError
from afd_server.kernels.gpu.device import what_is_missing
from afd_server.kernels.library import KernelBuildError, library
from afd_server.models.checkpoint import operations_for
from afd_server.models.graphs import CUDACapture
from afd_server.models.halves import FFNShard
from afd_server.models.operations import Operations
from afd_server.models.spec import ModelSpec, MoESpec
from afd_server.planner.profile_file import read_profile
from afd_server.planner.times import LayerTimes
from afd_server.transport.base import LinkShape

logger = logging.getLogger(__name__)

# Shares of what is free that the KV caches may take where --kv-cache-memory-bytes does not say. On a CPU the weights of
# all workers still have to fit beside them; on a GPU the weights are loaded already and the rest is activations.
CPU_KV_CACHE_SHARE = 0.25
CUDA_KV_CACHE_SHARE = 0.8
# What one step may report of the tokens that it samples, in log-probabilities: they go to the router in one message. So few of
# each token are always possible.
MAX_STEP_LOGPROBS = 2**18
FEW_LOGPROBS = 20


def resolve(config: ServeConfig, spec: ModelSpec, directory: Path) -> ServeConfig:
    """The configuration with nothing left open that does not depend on a worker's own node. Raises ConfigError."""
    longest = spec.max_position_embeddings
    max_model_len = config.max_model_len or longest
    if max_model_len > longest:
        raise ConfigError(
            "--max-model-len", f"{max_model_len} is beyond the model's {longest} positions", "lower it"
        )
    ep, _ = config.ffn_shards
    num_experts = _num_experts(spec)
    if num_experts and ep > num_experts:
        raise ConfigError(
            "--ffn-workers", f"{ep} expert shards for {num_experts} experts", "use --ffn-parallel tp"
        )
    if config.device == "cuda" and config.executor == "local" and not torch.cuda.is_available():
        raise ConfigError("--device", "there is no CUDA device here", "use --device cpu")
    dtype = spec.dtype if config.dtype == "auto" else config.dtype
    if dtype == "float16":
        raise ConfigError(
            "--dtype", "the checkpoint's float16 is not served", "use --dtype bfloat16 or float32"
        )
    num_logprobs = spec.vocab_size if config.max_logprobs == -1 else config.max_logprobs
    if num_logprobs > FEW_LOGPROBS and num_logprobs * config.max_num_seqs > MAX_STEP_LOGPROBS:
        raise ConfigError(
            "--max-logprobs",
            f"{num_logprobs} of each of {config.max_num_seqs} requests are more than the {MAX_STEP_LOGPROBS} of one step",
            "lower it, or --max-num-seqs",
        )
    if config.profile is not None:
        profiled_times(config, spec)  # whether it is one, and of such a model
    return dataclasses.replace(
        config,
        model=str(directory),
        served_model_name=config.served_model_name or config.model,
        dtype=dtype,
        max_model_len=max_model_len,
        profile=config.profile and str(Path(config.profile).absolute()),
        wire_dtype=dtype if config.wire_dtype == "auto" else config.wire_dtype,
        transport=("inproc" if config.transport == "auto" and config.executor == "local" else config.transport),
    )


def with_workers(config: ServeConfig, attention_workers: int, ffn_replicas: int) -> ServeConfig:
    """The same with other numbers of workers. How the FFN side is divided into shards stays."""
    ep, tp = config.ffn_shards
    return dataclasses.replace(
        config,
        attention_workers=attention_workers,
        ffn_workers=ffn_replicas * ep * tp,
        ffn_replicas=ffn_replicas,
    )


def torch_dtype(config: ServeConfig) -> torch.dtype:
    """Of weights and KV cache, and with torch's operations of activations."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]


def torch_device(config: ServeConfig) -> torch.device:
    """The worker's device; `auto` is settled here, on the worker's own node. Raises ConfigError."""
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError("--device", "there is no CUDA device on this worker's node", "use --device cpu")
    return torch.device("cuda" if available and config.device != "cpu" else "cpu")


def operations(config: ServeConfig, device: torch.device) -> Operations:
    """How a worker on this device computes; `auto` kernels are settled here, on the worker's own node. Raises ConfigError."""
    native = config.kernels != "torch"
    if device.type != "cpu":
        if config.quantization:
            raise ConfigError("--quantization", f"there are no {config.quantization} kernels for {device.type}")
        missing = what_is_missing(device)
        if native and missing:
            if config.kernels == "native":
                raise ConfigError("--kernels", f"no native ones on this GPU: {missing}", "use --kernels torch")
            logger.warning("torch's operations are used, which are slower: %s", missing)
            native = False
        return operations_for(device, torch_dtype(config), "native" if native else "torch")
    if native:
        try:
            library()
        except KernelBuildError as error:
            if config.kernels == "native" or config.quantization:
                raise ConfigError("--kernels", str(error), "use --kernels torch") from None
            logger.warning("torch's operations are used, which are slower: %s", error)
            native = False
    return operations_for(device, torch_dtype(config), "native" if native else "torch", config.quantization)


def graph_capture(
    config: ServeConfig, device: torch.device, operations: Operations, name: str
) -> CUDACapture | None:
    """What records the CUDA graphs of the worker `name`; None where there are to be none."""
    if config.enforce_eager or device.type != "cuda" or not operations.capturable:
        return None
    return CUDACapture(device, name)


def group_layout(config: ServeConfig, spec: ModelSpec) -> GroupLayout:
    ep, tp = config.ffn_shards
    return GroupLayout(ep, tp, num_experts=_num_experts(spec))


def ffn_shard(config: ServeConfig, index: int) -> FFNShard:
    """The part of the model that FFN worker `index` holds; see GroupLayout for the order."""
    ep, tp = config.ffn_shards
    shard = index % (ep * tp)
    return FFNShard(ep_rank=shard // tp, ep_size=ep, tp_rank=shard % tp, tp_size=tp)


def link_shape(config: ServeConfig, spec: ModelSpec) -> LinkShape:
    """What both ends of a link agree on: the largest call and how it is encoded."""
    top_k = max((ffn.top_k for ffn in spec.ffn if isinstance(ffn, MoESpec)), default=0)
    routed = config.gate_on == "attention"
    return LinkShape(
        max_rows=config.max_num_batched_tokens,
        hidden_size=spec.hidden_size,
        top_k=top_k if routed else 0,
        wire_dtype=config.wire_dtype,
    )


def profiled_times(config: ServeConfig, spec: ModelSpec) -> LayerTimes:
    """Of this layout, from the profile of an undivided FFN. Raises ConfigError."""
    assert config.profile is not None
    profile = read_profile(Path(config.profile), spec.num_layers)
    return dataclasses.replace(profile.times, ffn=profile.times.ffn.shard(*config.ffn_shards))


def threads_per_worker(config: ServeConfig, cores: int) -> int:
    """CPU threads of one worker on a node with `cores`.

    With one micro-batch the sides take turns, so each may use every core; with more they work at once and share.
    """
    if config.micro_batches in ("auto", "1") and config.attention_workers == 1:
        return cores
    return max(1, cores // (config.attention_workers + config.ffn_workers))


def usable_cores() -> int:
    """Cores that this process may run on: its affinity, which a container or a batch system may have narrowed."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_kv_cache_bytes(config: ServeConfig, device: torch.device, workers_per_gpu: int) -> int:
    """Bytes that one attention worker may take for its KV cache where the configuration does not say.

    FFN workers on the same GPU have loaded already, so only as many attention workers as may be there share what is free.
    """
    if device.type == "cuda":
        return int(free_bytes(device) * CUDA_KV_CACHE_SHARE) // min(config.attention_workers, workers_per_gpu)
    return int(free_bytes(device) * CPU_KV_CACHE_SHARE) // config.attention_workers


def free_bytes(device: torch.device) -> int:
    """Memory of the device that nobody uses now."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_host_bytes()


def _free_host_bytes() -> int:
    """Memory that can be had without swapping: the kernel's own estimate, or the container's limit if lower."""
    with open("/proc/meminfo") as meminfo:
        lines = dict(line.split(":", 1) for line in meminfo)
    available = int(lines["MemAvailable"].split()[0]) * 1024
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except OSError:
        return available
    return available if limit == "max" else min(available, max(0, int(limit) - used))


def _num_experts(spec: ModelSpec) -> int:
    return max((ffn.num_experts for ffn in spec.ffn if isinstance(ffn, MoESpec)), default=0)
