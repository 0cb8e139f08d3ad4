"""Loading one half of a model from safetensors: by memory map, only the tensors and slices of its role and shard.

What lives here: the check of a checkpoint's names and shapes against the model's tensors, and the two loaders. What
does not: which tensors there are (tensors.py), what they are called (families.py), the files (weight_files.py).
Called by whoever starts a worker.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from afd_server.errors import ModelError
from afd_server.kernels.memory import give_back_freed_memory
from afd_server.models.attention_gqa import GQAttention
from afd_server.models.attention_layer import Attention, AttentionLayer
from afd_server.models.attention_mfa import FactorizedAttention
from afd_server.models.attention_mla import LatentAttention
from afd_server.models.families import Family, family_of
from afd_server.models.ffn_dense import DenseFFN
from afd_server.models.ffn_moe import MoEFFN
from afd_server.models.halves import AttentionHalf, FFNHalf, FFNShard
from afd_server.models.operations import Operations, TorchOperations
from afd_server.models.operations_cpu import CPUOperations
from afd_server.models.operations_gpu import GPUOperations
from afd_server.models.rope import Rope
from afd_server.models.router import ExpertRouter
from afd_server.models.spec import DenseSpec, GQASpec, MLASpec, ModelSpec, MoESpec
from afd_server.models.tensors import TensorSlot, model_tensors
from afd_server.models.weight_files import WeightFiles

MAX_MISSING = 1000


def check_checkpoint(directory: Path, spec: ModelSpec) -> None:
    """Finds out in no time what would stop a worker later: raises ModelError for missing, left-over and wrong tensors."""
    files, family = WeightFiles(directory), family_of(spec.architecture)
    there = files.names
    needed = (name for tensor in model_tensors(spec) for name in _names(tensor, family))
    # A few will do: a config.json may speak of more experts than there is memory for their names.
    missing = list(islice((name for name in needed if name not in there), MAX_MISSING))
    if missing:
        raise ModelError(f"{files.where}: {missing[0]} is missing{_and_more(missing)}")
    _refuse_left_over(files, family, spec)
    files.check(
        {name: shape for tensor in model_tensors(spec) for name, shape in _stored_shapes(tensor, family)}
    )


def operations_for(
    device: torch.device, dtype: torch.dtype, kernels: str = "torch", quantization: str | None = None
) -> Operations:
    """How a worker computes. kernels: "native" for this server's own, "torch" for torch's operations. quantization: for a CPU's
    own only."""
    if kernels == "native" and device.type == "cpu":
        return CPUOperations(dtype, quantization)
    assert quantization is None
    return GPUOperations(dtype) if kernels == "native" else TorchOperations(dtype)


def load_attention_half(
    directory: Path,
    spec: ModelSpec,
    *,
    device: torch.device,
    dtype: torch.dtype,
    gate_on: str,
    operations: Operations | None = None,
) -> AttentionHalf:
    """The attention side of the checkpoint, converted to dtype. gate_on: the side that runs the routers. operations: how
    it computes; torch's own if not given.

    Raises ModelError, naming the tensor, if one is missing, of another shape, or known to neither side.
    """
    operations = operations or TorchOperations(dtype)
    reader = _Reader(directory, spec, device, dtype, operations)
    embedding = operations.embedding(reader.read("embedding"))
    layers = [
        AttentionLayer(
            attention_norm=reader.read_norm("attention_norm", layer),
            attention=_attention(spec, reader.read_attention(layer), operations),
            ffn_norm=reader.read_norm("ffn_norm", layer),
            router=_router(reader, layer, ffn) if isinstance(ffn, MoESpec) and gate_on == "attention" else None,
        )
        for layer, ffn in enumerate(spec.ffn)
    ]
    half = AttentionHalf(
        spec,
        embedding=embedding,
        layers=layers,
        final_norm=reader.read_norm("final_norm"),
        lm_head=embedding
        if spec.tie_word_embeddings
        else operations.linear([reader.read("lm_head")], exact=True),
        rope=_rope(spec, device),
        operations=operations,
        cache_dtype=dtype,
        device=device,
    )
    give_back_freed_memory()
    return half


def load_ffn_half(
    directory: Path,
    spec: ModelSpec,
    shard: FFNShard,
    *,
    device: torch.device,
    dtype: torch.dtype,
    gate_on: str,
    operations: Operations | None = None,
) -> FFNHalf:
    """One shard of the checkpoint's FFN side, converted to dtype; otherwise as load_attention_half."""
    operations = operations or TorchOperations(dtype)
    reader = _Reader(directory, spec, device, dtype, operations)
    layers: list[DenseFFN | MoEFFN] = []
    for layer, ffn in enumerate(spec.ffn):
        if isinstance(ffn, DenseSpec):
            layers.append(_dense(reader, layer, ffn, shard))
        else:
            router = _router(reader, layer, ffn) if gate_on == "ffn" else None
            layers.append(_experts(reader, layer, ffn, shard, router))
    give_back_freed_memory()
    return FFNHalf(layers, device=device, dtype=operations.activation_dtype)


def _attention(spec: ModelSpec, weights: dict[str, Tensor], operations: Operations) -> Attention:
    attention = spec.attention
    if isinstance(attention, GQASpec):
        return GQAttention(attention, weights, spec.rms_norm_eps, operations)
    if isinstance(attention, MLASpec):
        return LatentAttention(attention, weights, operations)
    return FactorizedAttention(attention, weights, spec.rms_norm_eps, operations)


def _rope(spec: ModelSpec, device: torch.device) -> Rope:
    attention = spec.attention
    dim = attention.rope_head_dim if isinstance(attention, MLASpec) else attention.head_dim
    return Rope(attention.rope, dim, device)


def _router(reader: _Reader, layer: int, ffn: MoESpec) -> ExpertRouter:
    # A correction bias is compared with float32 scores, and is never rounded.
    correction = reader.read("router_correction", layer, dtype=torch.float32) if ffn.correction_bias else None
    weight = reader.read("router", layer, dtype=torch.float32 if ffn.float32_router else None)
    return ExpertRouter(ffn, weight, correction, reader.operations)


def _dense(reader: _Reader, layer: int, ffn: DenseSpec, shard: FFNShard) -> DenseFFN:
    start, stop = shard.dense_slice(ffn.intermediate_size)
    first = shard.ep_rank == shard.tp_rank == 0
    weights = reader.read_mlp("mlp", layer, start, stop, bias=ffn.bias, down_bias=first)
    return DenseFFN(reader.operations.mlp(weights))


def _experts(reader: _Reader, layer: int, ffn: MoESpec, shard: FFNShard, router: ExpertRouter | None) -> MoEFFN:
    first, last = shard.experts(ffn.num_experts)
    start, stop = shard.expert_slice(ffn.intermediate_size)
    gate_up, down = reader.read_experts(layer, range(first, last), start, stop)
    shared = None
    if ffn.shared_intermediate_size:
        start, stop = shard.expert_slice(ffn.shared_intermediate_size)
        shared = reader.operations.mlp(reader.read_mlp("shared", layer, start, stop))
    experts = reader.operations.experts(gate_up, down, first)
    return MoEFFN(
        experts, range(first, last), shared=shared, router=router, capturable=reader.operations.capturable
    )


class _Reader:
    """A checkpoint that was checked against its spec, read slot by slot. Reading copies: the files may go later."""

    def __init__(
        self, directory: Path, spec: ModelSpec, device: torch.device, dtype: torch.dtype, operations: Operations
    ) -> None:
        self.operations = operations
        self._files = WeightFiles(directory)
        self._family = family_of(spec.architecture)
        self._slots = {(tensor.slot, tensor.layer): tensor for tensor in model_tensors(spec)}
        self._hidden_size = spec.hidden_size
        self._device, self._dtype = device, dtype
        _refuse_left_over(self._files, self._family, spec)

    def read(
        self, slot: str, layer: int | None = None, *slices: slice, dtype: torch.dtype | None = None
    ) -> Tensor:
        """A tensor, or what the slices cut out of it. dtype: another one than the model's."""
        tensor = self._slots[slot, layer]
        name = self._family.names[slot].format(layer=layer)
        return self._files.read(name, tensor.shape, slices).to(
            device=self._device, dtype=dtype or self._dtype, copy=True
        )

    def read_norm(self, slot: str, layer: int | None = None) -> Tensor:
        """In the activations' type, rounded to the model's as every other weight."""
        return self.read(slot, layer).to(self.operations.activation_dtype)

    def read_experts(self, layer: int, experts: range, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """gate and up [E, 2 I, H] and down [E, H, I] of these experts, I the slice start to stop."""
        width, inner = stop - start, slice(start, stop)

        def empty(*shape: int) -> Tensor:
            return torch.empty(len(experts), *shape, device=self._device, dtype=self._dtype)

        gate_up, down = empty(2 * width, self._hidden_size), empty(self._hidden_size, width)
        for index, expert in enumerate(experts):
            gate_up[index, :width] = self._expert("expert.gate", layer, expert, inner)
            gate_up[index, width:] = self._expert("expert.up", layer, expert, inner)
            down[index] = self._expert("expert.down", layer, expert, slice(None), inner)
        return gate_up, down

    def _expert(self, slot: str, layer: int, expert: int, *slices: slice) -> Tensor:
        """A view of one expert's matrix in the mapped file, stored by itself or as part of a stack."""
        tensor, template = self._slots[slot, layer], self._family.names[slot]
        if "{expert}" in template:
            return self._files.read(template.format(layer=layer, expert=expert), tensor.shape, slices)
        stacked = (tensor.num_experts, *tensor.shape)
        return self._files.read(template.format(layer=layer), stacked, (slice(expert, expert + 1), *slices))[0]

    def read_attention(self, layer: int) -> dict[str, Tensor]:
        """Every slot of the layer's attention, norms around it left out."""
        outside = ("attention_norm", "ffn_norm")
        return {
            slot: self.read_norm(slot, layer) if slot.endswith("norm") else self.read(slot, layer)
            for (slot, its_layer), tensor in self._slots.items()
            if its_layer == layer and tensor.role == "attention" and slot not in outside
        }

    def read_mlp(
        self, prefix: str, layer: int, start: int, stop: int, *, bias: bool = False, down_bias: bool = False
    ) -> dict[str, Tensor]:
        """The slice start to stop of an MLP's intermediate dimension, under DenseFFN's names."""
        inner = slice(start, stop)
        weights = {
            "gate": self.read(f"{prefix}.gate", layer, inner),
            "up": self.read(f"{prefix}.up", layer, inner),
            "down": self.read(f"{prefix}.down", layer, slice(None), inner),
        }
        if bias:
            weights |= {name: self.read(f"{prefix}.{name}", layer, inner) for name in ("gate_bias", "up_bias")}
            if down_bias:
                weights["down_bias"] = self.read(f"{prefix}.down_bias", layer)
        return weights


def _names(tensor: TensorSlot, family: Family) -> Iterator[str]:
    """What the checkpoint calls a slot: one name, or one for each expert."""
    return (name for name, _ in _stored_shapes(tensor, family))


def _stored_shapes(tensor: TensorSlot, family: Family) -> Iterator[tuple[str, tuple[int, ...]]]:
    template = family.names[tensor.slot]
    if "{expert}" in template:
        for expert in range(tensor.num_experts):
            yield template.format(layer=tensor.layer, expert=expert), tensor.shape
    else:
        stack = (tensor.num_experts,) if tensor.num_experts else ()
        yield template.format(layer=tensor.layer), (*stack, *tensor.shape)


def _needed_names(family: Family, spec: ModelSpec) -> set[str]:
    return {name for tensor in model_tensors(spec) for name in _names(tensor, family)}


def _refuse_left_over(files: WeightFiles, family: Family, spec: ModelSpec) -> None:
    """Raises ModelError for a tensor that no slot asks for: a model that has it is not the model that was described."""
    known = _needed_names(family, spec)
    if spec.tie_word_embeddings:
        known.add(family.names["lm_head"])  # many files carry the tied matrix twice
    left_over = [
        name
        for name in sorted(files.names - known)
        if not any(re.fullmatch(pattern, name) for pattern in family.ignored)
        and not (family.prediction_layers and _layer_of(name) >= spec.num_layers)
    ]
    if left_over:
        raise ModelError(
            f"{files.where}: {left_over[0]}{_and_more(left_over)}: no part of {spec.architecture} has such a tensor"
        )


def _and_more(names: list[str]) -> str:
    if len(names) >= MAX_MISSING:
        return " and many more"
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _layer_of(name: str) -> int:
    """The layer in a tensor's name, -1 where it is of none."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else -1
