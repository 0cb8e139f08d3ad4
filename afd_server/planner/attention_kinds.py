"""What one attention layer of each kind holds and computes, as formulas over the numbers of config.json.

What lives here: weights of the projections, cache and arithmetic for one decoded token. What does not: which layer is of
which kind (model_config.py) and sums over layers (counts.py). FLOP are two for each multiply-add. Norms, rotation, softmax and
biases are left out: together below a percent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from afd_server.planner.formula import NOTHING, Formula, formula


@dataclass(frozen=True)
class AttentionLayer:
    """One layer's. weights: values of the projections; a token does two FLOP with each.

    entry_values: what the KV cache holds of one token. entry_flop: both products of a query token with one cache entry.
    window: entries that a token attends to at most. state_values, state_flop: of a linear layer, which keeps a state of
    fixed size for each request instead of a cache, and reads and writes all of it for each token.
    """

    kind: str
    weights: Formula
    entry_values: Formula = NOTHING
    entry_flop: Formula = NOTHING
    window: int | None = None
    state_values: Formula = NOTHING
    state_flop: Formula = NOTHING

    def within(self, window: int | None) -> AttentionLayer:
        """The same, attending to the last `window` tokens only."""
        return self if window is None else replace(self, kind=f"{self.kind}, window {window}", window=window)

    def entries(self, context: int) -> int:
        """Cache entries that a token with so many tokens before it attends to."""
        return context if self.window is None else min(context, self.window)


def grouped_query(
    hidden: int, heads: int, kv_heads: int, head_dim: int, *, output_gate: bool = False
) -> AttentionLayer:
    """GQA, and with as many kv_heads as heads plain multi-head attention. output_gate: a second matrix like the queries'."""
    queries = "3 * heads" if output_gate else "2 * heads"
    numbers = {"hidden": hidden, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    return AttentionLayer(
        "gqa",
        weights=formula(f"hidden * ({queries} + 2 * kv_heads) * head_dim", **numbers),
        entry_values=formula("2 * kv_heads * head_dim", kv_heads=kv_heads, head_dim=head_dim),
        entry_flop=formula("2 * heads * 2 * head_dim", heads=heads, head_dim=head_dim),
    )


def latent(
    hidden: int, heads: int, query_rank: int | None, kv_rank: int, nope: int, rope: int, value: int
) -> AttentionLayer:
    """MLA in the absorbed form: queries and outputs go through the cached latent's space, so the cache is read as it is.

    Both products are counted at kv_rank + rope, as the paper does; the second one needs kv_rank only.
    """
    numbers = {
        "hidden": hidden,
        "heads": heads,
        "kv_rank": kv_rank,
        "nope": nope,
        "rope": rope,
        "value_dim": value,
    }
    queries = "hidden * heads * (nope + rope)"
    if query_rank is not None:
        numbers["query_rank"] = query_rank
        queries = "hidden * query_rank + query_rank * heads * (nope + rope)"
    keys_and_values = "hidden * (kv_rank + rope) + heads * kv_rank * (nope + value_dim)"
    return AttentionLayer(
        "mla",
        weights=formula(f"{queries} + {keys_and_values} + heads * value_dim * hidden", **numbers),
        entry_values=formula("kv_rank + rope", kv_rank=kv_rank, rope=rope),
        entry_flop=formula("2 * heads * 2 * (kv_rank + rope)", heads=heads, kv_rank=kv_rank, rope=rope),
    )


def factorized(hidden: int, heads: int, groups: int, head_dim: int, query_rank: int) -> AttentionLayer:
    """MFA (arXiv 2412.19255): queries through a rank that all heads share, and one key and value head a group."""
    numbers = {
        "hidden": hidden,
        "heads": heads,
        "groups": groups,
        "head_dim": head_dim,
        "query_rank": query_rank,
    }
    projections = "hidden * query_rank + query_rank * heads * head_dim + 2 * hidden * groups * head_dim"
    return AttentionLayer(
        "mfa",
        weights=formula(f"{projections} + heads * head_dim * hidden", **numbers),
        entry_values=formula("2 * groups * head_dim", groups=groups, head_dim=head_dim),
        entry_flop=formula("2 * heads * 2 * head_dim", heads=heads, head_dim=head_dim),
    )


def gated_delta(
    hidden: int, key_heads: int, value_heads: int, key_dim: int, value_dim: int, kernel: int
) -> AttentionLayer:
    """Gated DeltaNet (arXiv 2412.06464): a matrix for each value head, read with the key, corrected, read with the query.

    Queries, keys, values, an output gate, two gates a value head, a short convolution, and the output.
    """
    numbers = {"hidden": hidden, "key_heads": key_heads, "value_heads": value_heads, "key_dim": key_dim,
               "value_dim": value_dim, "kernel": kernel}  # fmt: skip
    projections = "hidden * (2 * key_heads * key_dim + 3 * value_heads * value_dim + 2 * value_heads)"
    convolution = "kernel * (2 * key_heads * key_dim + value_heads * value_dim)"
    state = {"value_heads": value_heads, "key_dim": key_dim, "value_dim": value_dim}
    return AttentionLayer(
        "linear, gated delta rule",
        weights=formula(f"{projections} + {convolution}", **numbers),
        state_values=formula("value_heads * key_dim * value_dim", **state),
        state_flop=formula("3 * 2 * value_heads * key_dim * value_dim", **state),
    )


def kimi_delta(hidden: int, heads: int, head_dim: int, kernel: int) -> AttentionLayer:
    """Kimi Delta Attention (arXiv 2510.26692): the delta rule with a decay for each channel, from low-rank gates."""
    numbers = {"hidden": hidden, "heads": heads, "head_dim": head_dim, "kernel": kernel}
    gates = "2 * (hidden * head_dim + head_dim * heads * head_dim) + hidden * heads"
    return AttentionLayer(
        "linear, kimi delta rule",
        weights=formula(f"4 * hidden * heads * head_dim + {gates} + 3 * kernel * heads * head_dim", **numbers),
        state_values=formula("heads * head_dim * head_dim", heads=heads, head_dim=head_dim),
        state_flop=formula("3 * 2 * heads * head_dim * head_dim", heads=heads, head_dim=head_dim),
    )


def lightning(hidden: int, heads: int, head_dim: int) -> AttentionLayer:
    """Lightning attention (MiniMax-01, arXiv 2501.08313): a sum of outer products that decays. Q, K, V, gate, output."""
    return AttentionLayer(
        "linear, lightning",
        weights=formula("5 * hidden * heads * head_dim", hidden=hidden, heads=heads, head_dim=head_dim),
        state_values=formula("heads * head_dim * head_dim", heads=heads, head_dim=head_dim),
        state_flop=formula("2 * 2 * heads * head_dim * head_dim", heads=heads, head_dim=head_dim),
    )
