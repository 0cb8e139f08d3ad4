"""RoPE as config.json spells it, before transformers 5 (`rope_theta`, `rope_scaling`) and since (`rope_parameters`).

What lives here: the reading, and the refusal of kinds that are not served. What does not: the mathematics (rope.py).
Called by families.py. The meaning of each key is transformers' (`modeling_rope_utils`).
"""

from __future__ import annotations

import math

from afd_server.models.config_file import ConfigFile
from afd_server.models.spec import RopeSpec

KINDS = ("default", "linear", "dynamic", "yarn", "llama3")


def read_rope(config: ConfigFile, *, theta: float = 10000.0, interleaved: bool = False) -> RopeSpec:
    """The rope of a decoder. theta: what the architecture takes where the file has none. Raises ModelError."""
    config.only("partial_rotary_factor", 1.0, default=1.0)
    theta = config.number("rope_theta", theta)
    scaling, kind = _scaling(config)
    if scaling is None:
        return RopeSpec(kind, theta, interleaved)
    theta = scaling.number("rope_theta", theta)
    scaling.only("partial_rotary_factor", 1.0, default=1.0)
    return _read_kind(config, scaling, kind, theta, interleaved)


def _scaling(config: ConfigFile) -> tuple[ConfigFile | None, str]:
    """The section that describes the stretching, if there is one, and its kind. Raises ModelError for an unknown kind.

    An older section beside a newer one is left unread, and so refused by name with every other key that was not read.
    """
    for key in ("rope_parameters", "rope_scaling"):
        if config.has(key):
            scaling = config.part(key)
            older_spelling = scaling.value("type", "default")
            return scaling, scaling.only("rope_type", *KINDS, default=older_spelling)
    return None, "default"


def _read_kind(config: ConfigFile, scaling: ConfigFile, kind: str, theta: float, interleaved: bool) -> RopeSpec:
    if kind == "default":
        return RopeSpec(kind, theta, interleaved)
    factor = scaling.number("factor")
    max_positions = config.integer("max_position_embeddings")
    if kind == "linear":
        return RopeSpec(kind, theta, interleaved, factor)
    original = scaling.integer("original_max_position_embeddings", max_positions)
    if kind == "dynamic":
        # transformers measures the stretch from max_position_embeddings, whatever the original length says.
        return RopeSpec(kind, theta, interleaved, factor, max_positions)
    if kind == "llama3":
        low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
        if high <= low:
            raise scaling.error("high_freq_factor", f"is {high}, not above low_freq_factor's {low}")
        return RopeSpec(kind, theta, interleaved, factor, original, low_freq_factor=low, high_freq_factor=high)
    mscale, mscale_all = (
        scaling.number("mscale", 0.0, zero=True),
        scaling.number("mscale_all_dim", 0.0, zero=True),
    )
    by_factor = yarn_mscale(factor)
    if mscale and mscale_all:
        by_factor = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all)
    return RopeSpec(
        kind, theta, interleaved, factor, original,
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        truncate=scaling.flag("truncate", True),
        cos_sin_scale=scaling.number("attention_factor", by_factor),
    )  # fmt: skip


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """How much YaRN (arXiv 2309.00071, section 3.4) strengthens the scores for a stretch by `factor`."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def latent_softmax_scale(config: ConfigFile, head_dim: int) -> float:
    """DeepSeek's scale of the scores: 1 / sqrt(head_dim), times mscale_all_dim's strengthening squared under YaRN."""
    scale = head_dim**-0.5
    scaling, kind = _scaling(config)
    if scaling is None:
        return scale
    mscale_all = scaling.number("mscale_all_dim", 0.0, zero=True)
    if kind == "default" or not mscale_all:
        return scale
    return scale * yarn_mscale(scaling.number("factor"), mscale_all) ** 2
