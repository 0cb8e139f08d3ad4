"""`afd upcycle IN OUT`: a dense Llama becomes a mixture of experts of the same text.

Every MLP is copied into N experts behind a random router whose top-k weights are renormalised to sum to one: a Mixtral.
With exact copies the output is the dense model's, so the sparse path can be checked on real weights. With noise the
experts differ, and a token sent to the wrong one shows (Komatsuzaki et al., "Sparse Upcycling", 2023).
Called by cli and `default_model`. Tensors are read by memory map and written file by file: one output file (at most
MAX_FILE_BYTES) is in memory at a time.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afd_server.checkpoints.output import check_output, staged_directory
from afd_server.errors import ConfigError, ModelError
from afd_server.models.config_file import ConfigFile, read_json_object
from afd_server.models.families import read_llama

if TYPE_CHECKING:
    import torch

MAX_FILE_BYTES = 2 * 10**9

# A Mixtral expert's names for the three matrices of a Llama MLP.
_EXPERT_MATRIX = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}

# What Llama means by an absent key, written out because Mixtral means something else by it.
_LLAMA_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_KEPT_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Output:
    """One tensor to write: a copy of `source` (for an expert, with noise), or a router where source is None."""

    name: str
    source: str | None
    shape: tuple[int, ...]
    is_expert: bool = False


def upcycle(
    source: Path,
    out: Path,
    *,
    experts: int = 8,
    top_k: int = 2,
    noise: float = 0.0,
    seed: int = 0,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write the Mixtral made of the dense Llama directory `source` as directory `out`, which appears when complete.

    noise: standard deviation of what is added to each expert's matrix, relative to the matrix's own. seed: of the noise
    and the routers. max_file_bytes: above it the weights are cut into several files with an index.

    Raises ConfigError for `out` and the options, ModelError for `source`.
    """
    from rich.progress import track

    _check_options(experts, top_k, noise)
    check_output(out)
    dense = _read_config(source)
    config = _mixtral_config(dense, experts, top_k)
    with ExitStack() as stack:
        tensors = _open_tensors(source, stack)
        outputs = list(_plan(tensors, config))
        make = _TensorMaker(tensors, noise, seed)
        staging = stack.enter_context(staged_directory(out))
        for filename, names in _cut_into_files(outputs, make.dtype, max_file_bytes, staging):
            wanted = set(names)
            shown = track(
                [output for output in outputs if output.name in wanted], description=f"Writing {filename}"
            )
            _save({output.name: make(output) for output in shown}, staging / filename)
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for name in _KEPT_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, staging / name)


def _check_options(experts: int, top_k: int, noise: float) -> None:
    if experts < 1:
        raise ConfigError("--experts", f"{experts} is not positive")
    if not 1 <= top_k <= experts:
        raise ConfigError("--top-k", f"{top_k} is not between 1 and --experts {experts}")
    if not (noise >= 0 and math.isfinite(noise)):
        raise ConfigError("--noise", f"{noise} is not zero or a positive number")


def _read_config(source: Path) -> dict[str, Any]:
    path = source / "config.json"
    config = read_json_object(path)
    if config.get("model_type") != "llama":
        raise ModelError(f"{path}: model_type is {config.get('model_type')!r}; only llama can be upcycled")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise ModelError(f"{path}: {key} is set, and a Mixtral has no such bias")
    known = ConfigFile(_LLAMA_DEFAULTS | config, str(path))
    read_llama(known)
    known.refuse_what_was_not_read()  # a key that changes the maths, and that would be lost on the way
    return config


def _mixtral_config(dense: dict[str, Any], experts: int, top_k: int) -> dict[str, Any]:
    heads = dense["num_attention_heads"]
    config: dict[str, Any] = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **{key: dense[key] for key in _REQUIRED},
        **{key: dense.get(key, default) for key, default in _LLAMA_DEFAULTS.items()},
        "num_key_value_heads": dense.get("num_key_value_heads") or heads,
        "head_dim": dense.get("head_dim") or dense["hidden_size"] // heads,
        "sliding_window": None,
        "num_local_experts": experts,
        "num_experts_per_tok": top_k,
        "output_router_logits": False,
    }
    if "rope_parameters" in dense:  # transformers 5 writes this one, earlier versions the other two
        config["rope_parameters"] = dense["rope_parameters"]
    else:
        config["rope_theta"] = dense.get("rope_theta", 10000.0)
        config["rope_scaling"] = dense.get("rope_scaling")
    dtype = dense.get("dtype") or dense.get("torch_dtype")
    if dtype:
        config["dtype"] = dtype
    return config


def _open_tensors(source: Path, stack: ExitStack) -> dict[str, Any]:
    """Tensor name -> the open file that holds it. One file, or several with an index."""
    from safetensors import SafetensorError, safe_open

    index = source / "model.safetensors.index.json"
    filenames = ["model.safetensors"]
    if index.is_file():
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or any(
            Path(str(name)).name != name for name in weight_map.values()
        ):
            raise ModelError(f"{index}: weight_map does not name files beside it")
        filenames = sorted(set(weight_map.values()))
    tensors: dict[str, Any] = {}
    for filename in filenames:
        try:
            opened = stack.enter_context(safe_open(source / filename, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{source / filename}: cannot be read: {error}") from error
        tensors.update(dict.fromkeys(opened.keys(), opened))
    return tensors


def _plan(tensors: dict[str, Any], config: dict[str, Any]) -> Iterator[_Output]:
    """Every tensor of the Mixtral, in the order of its layers."""
    hidden, inner, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield _Output(f"{prefix}block_sparse_moe.gate.weight", None, (experts, hidden))
        for matrix, shape in shapes.items():
            source = f"{prefix}mlp.{matrix}.weight"
            if source not in tensors:
                raise ModelError(f"IN has no tensor {source}")
            found = tuple(tensors[source].get_slice(source).get_shape())
            if found != shape:
                raise ModelError(f"{source} is of shape {found}, config.json says {shape}")
            for expert in range(experts):
                name = f"{prefix}block_sparse_moe.experts.{expert}.{_EXPERT_MATRIX[matrix]}.weight"
                yield _Output(name, source, shape, is_expert=True)
    for source in sorted(tensors):
        tied_head = source == "lm_head.weight" and config["tie_word_embeddings"]
        if ".mlp." not in source and not source.endswith("rotary_emb.inv_freq") and not tied_head:
            yield _Output(source, source, tuple(tensors[source].get_slice(source).get_shape()))


class _TensorMaker:
    """Makes the tensors of the plan, in its order: the noise comes from one generator."""

    def __init__(self, tensors: dict[str, Any], noise: float, seed: int) -> None:
        import torch

        self._tensors, self._noise = tensors, noise
        self._generator = torch.Generator().manual_seed(seed)
        some_name = next(name for name in tensors if name.endswith("gate_proj.weight"))
        self.dtype = tensors[some_name].get_tensor(some_name).dtype

    def __call__(self, output: _Output) -> torch.Tensor:
        import torch

        if output.source is None:
            # Unit-variance logits for inputs of unit variance, which is what the norm before the router gives it.
            router = torch.randn(output.shape, generator=self._generator) / output.shape[1] ** 0.5
            return router.to(self.dtype)
        tensor: torch.Tensor = self._tensors[output.source].get_tensor(output.source)
        if not (output.is_expert and self._noise):
            return tensor.clone()  # a file may not hold one storage under two names
        exact = tensor.float()
        change = torch.randn(output.shape, generator=self._generator) * (self._noise * exact.std())
        return (exact + change).to(tensor.dtype)


def _cut_into_files(
    outputs: list[_Output], dtype: torch.dtype, max_file_bytes: int, staging: Path
) -> list[tuple[str, list[str]]]:
    """(filename, tensor names) of every file; writes the index where there are several."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards

    planned = {output.name: torch.empty(output.shape, dtype=dtype, device="meta") for output in outputs}
    split = split_torch_state_dict_into_shards(planned, max_shard_size=max_file_bytes)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (staging / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return list(split.filename_to_tensors.items())


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})
