"""What a model is, as plain numbers: read from a checkpoint's config.json, used by every other file of this room.

What lives here: the frozen descriptions. What does not: how they are read (families.py), names of tensors
(tensor_names.py), tensors themselves (checkpoint.py). Imports no torch, so that layout and
memory can be decided without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding and how its frequencies are stretched beyond the trained length.

    kind: "default", "linear", "dynamic", "yarn" or "llama3". interleaved: a pair is two neighbours (2i, 2i + 1) of the
    head dimension, not (i, i + half). The fields after that have a meaning for the kinds named behind them.
    """

    kind: str
    theta: float
    interleaved: bool = False
    factor: float = 1.0  # all but default
    original_max_position_embeddings: int = 0  # dynamic, yarn, llama3: tokens
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: whole dimensions as bounds of the ramp
    cos_sin_scale: float = 1.0  # yarn: cosines and sines are multiplied by it


@dataclass(frozen=True, slots=True)
class GQASpec:
    """Grouped-query attention: num_heads query heads share num_kv_heads key and value heads.

    qk_norm: an RMSNorm over head_dim on every query and key head, before RoPE.
    """

    kind: ClassVar[str] = "gqa"
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False

    @property
    def cache_entry_shape(self) -> tuple[int, ...]:
        """Of one token in one layer: its keys, then its values."""
        return (2, self.num_kv_heads, self.head_dim)


@dataclass(frozen=True, slots=True)
class MLASpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): the cache holds one latent vector for all heads.

    query_rank: None when queries are projected from the hidden state directly. softmax_scale: of the scores. norm_eps:
    of the norms of the latents, which is not the model's.
    """

    kind: ClassVar[str] = "mla"
    num_heads: int
    query_rank: int | None
    kv_rank: int
    nope_head_dim: int
    rope_head_dim: int
    value_head_dim: int
    softmax_scale: float
    norm_eps: float
    rope: RopeSpec
    bias: bool = False

    @property
    def cache_entry_shape(self) -> tuple[int, ...]:
        """Of one token in one layer: the normed latent, then the rotated key part that all heads share."""
        return (self.kv_rank + self.rope_head_dim,)


@dataclass(frozen=True, slots=True)
class MFASpec:
    """Multi-matrix factorization attention (Step-3, arXiv 2507.19427): low-rank queries, one key and value head."""

    kind: ClassVar[str] = "mfa"
    num_heads: int
    head_dim: int
    query_rank: int
    rope: RopeSpec

    @property
    def cache_entry_shape(self) -> tuple[int, ...]:
        """Of one token in one layer: its key, then its value."""
        return (2, 1, self.head_dim)


AttentionSpec = GQASpec | MLASpec | MFASpec


@dataclass(frozen=True, slots=True)
class DenseSpec:
    """One gated MLP: down(silu(gate x) * up x)."""

    intermediate_size: int
    bias: bool = False


@dataclass(frozen=True, slots=True)
class MoESpec:
    """Routed experts, each a gated MLP, of which every token gets top_k; beside them at most one shared expert.

    shared_intermediate_size: 0 without a shared expert. scoring: "softmax" over all experts, or "sigmoid" of each.
    renormalise: the chosen weights are scaled to sum to 1. num_groups, top_groups: experts are chosen from the
    top_groups best of num_groups groups. correction_bias: added to scores for the choice, not for the weights.
    scaling: of the weights, last of all. float32_router: the gate's product is done in float32 whatever the model's
    type.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    shared_intermediate_size: int = 0
    scoring: str = "softmax"
    renormalise: bool = True
    num_groups: int = 1
    top_groups: int = 1
    correction_bias: bool = False
    scaling: float = 1.0
    float32_router: bool = False


FFNSpec = DenseSpec | MoESpec


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A whole decoder. dtype: the checkpoint's, "float32", "bfloat16" or "float16". ffn: one per layer.

    max_position_embeddings: tokens that the positions reach. eos_token_ids: any of them ends an output.
    """

    architecture: str
    hidden_size: int
    vocab_size: int
    num_layers: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    dtype: str
    eos_token_ids: tuple[int, ...]
    attention: AttentionSpec
    ffn: tuple[FFNSpec, ...]
