"""Every tensor that a model has, from its spec alone: slot, role and shape.

A slot is this server's own word for a tensor ("q", "expert.down"); families.py says what a checkpoint calls it. What
does not live here: names in files, and which slices of a tensor a shard reads (checkpoint.py).

Shapes: V vocabulary, H hidden, I intermediate, E experts; matrices are [out, in].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from afd_server.models.spec import DenseSpec, GQASpec, MFASpec, MLASpec, ModelSpec, MoESpec

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """One tensor, or the stack of all experts' ones. layer: None for those outside the layers.

    role: "attention", "ffn", or "router" for what goes to the side that runs the router. num_experts: where it is not
    0, the shape is one expert's, and a checkpoint has that many, each by itself or stacked on a dimension in front.
    """

    slot: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    num_experts: int = 0


def model_tensors(spec: ModelSpec) -> Iterator[TensorSlot]:
    """All of a model's tensors, layer by layer."""
    hidden, vocab = spec.hidden_size, spec.vocab_size
    yield TensorSlot("embedding", "attention", None, (vocab, hidden))
    yield TensorSlot("final_norm", "attention", None, (hidden,))
    if not spec.tie_word_embeddings:
        yield TensorSlot("lm_head", "attention", None, (vocab, hidden))
    attention_shapes = {"attention_norm": (hidden,), "ffn_norm": (hidden,), **_attention_shapes(spec)}
    for layer, ffn in enumerate(spec.ffn):
        for slot, shape in attention_shapes.items():
            yield TensorSlot(slot, "attention", layer, shape)
        if isinstance(ffn, DenseSpec):
            for slot, shape in _mlp_shapes("mlp", hidden, ffn.intermediate_size, ffn.bias).items():
                yield TensorSlot(slot, "ffn", layer, shape)
        else:
            yield from _moe_tensors(ffn, hidden, layer)


def _moe_tensors(ffn: MoESpec, hidden: int, layer: int) -> Iterator[TensorSlot]:
    yield TensorSlot("router", "router", layer, (ffn.num_experts, hidden))
    if ffn.correction_bias:
        yield TensorSlot("router_correction", "router", layer, (ffn.num_experts,))
    for slot, shape in _mlp_shapes("expert", hidden, ffn.intermediate_size).items():
        yield TensorSlot(slot, "ffn", layer, shape, num_experts=ffn.num_experts)
    if ffn.shared_intermediate_size:
        for slot, shape in _mlp_shapes("shared", hidden, ffn.shared_intermediate_size).items():
            yield TensorSlot(slot, "ffn", layer, shape)


def _mlp_shapes(prefix: str, hidden: int, intermediate: int, bias: bool = False) -> Shapes:
    shapes: Shapes = {
        f"{prefix}.gate": (intermediate, hidden),
        f"{prefix}.up": (intermediate, hidden),
        f"{prefix}.down": (hidden, intermediate),
    }
    if bias:
        shapes |= {
            f"{prefix}.gate_bias": (intermediate,),
            f"{prefix}.up_bias": (intermediate,),
            f"{prefix}.down_bias": (hidden,),
        }
    return shapes


def _attention_shapes(spec: ModelSpec) -> Shapes:
    attention = spec.attention
    if isinstance(attention, GQASpec):
        return _gqa_shapes(attention, spec.hidden_size)
    if isinstance(attention, MLASpec):
        return _mla_shapes(attention, spec.hidden_size)
    return _mfa_shapes(attention, spec.hidden_size)


def _gqa_shapes(attention: GQASpec, hidden: int) -> Shapes:
    query = attention.num_heads * attention.head_dim
    key = attention.num_kv_heads * attention.head_dim
    shapes: Shapes = {"q": (query, hidden), "k": (key, hidden), "v": (key, hidden), "o": (hidden, query)}
    if attention.qkv_bias:
        shapes |= {"q_bias": (query,), "k_bias": (key,), "v_bias": (key,)}
    if attention.output_bias:
        shapes |= {"o_bias": (hidden,)}
    if attention.qk_norm:
        shapes |= {"q_norm": (attention.head_dim,), "k_norm": (attention.head_dim,)}
    return shapes


def _mla_shapes(attention: MLASpec, hidden: int) -> Shapes:
    heads, nope, rope = attention.num_heads, attention.nope_head_dim, attention.rope_head_dim
    query = heads * (nope + rope)
    shapes: Shapes = {
        "kv_down": (attention.kv_rank + rope, hidden),
        "kv_norm": (attention.kv_rank,),
        "kv_up": (heads * (nope + attention.value_head_dim), attention.kv_rank),
        "o": (hidden, heads * attention.value_head_dim),
    }
    if attention.query_rank is None:
        shapes |= {"q": (query, hidden)}
    else:
        rank = attention.query_rank
        shapes |= {"q_down": (rank, hidden), "q_norm": (rank,), "q_up": (query, rank)}
    if attention.bias:
        shapes |= {"kv_down_bias": (attention.kv_rank + rope,), "o_bias": (hidden,)}
        if attention.query_rank is not None:
            shapes |= {"q_down_bias": (attention.query_rank,)}
    return shapes


def _mfa_shapes(attention: MFASpec, hidden: int) -> Shapes:
    rank, head_dim, query = (
        attention.query_rank,
        attention.head_dim,
        attention.num_heads * attention.head_dim,
    )
    return {
        "q_down": (rank, hidden),
        "q_norm": (rank,),
        "q_up": (query, rank),
        "k": (head_dim, hidden),
        "v": (head_dim, hidden),
        "o": (hidden, query),
    }
