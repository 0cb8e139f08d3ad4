"""Rotary position embedding: cosines and sines for a batch's positions, and the rotation of query and key heads.

What lives here: the mathematics of every kind in RopeSpec. What does not: reading them (rope_config.py). The
attention half computes one table per forward pass; all layers share it.

Shapes: T rows, N heads, D rotated dimensions of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from afd_server.models.spec import RopeSpec


@dataclass(frozen=True, slots=True)
class RopeTable:
    """Cosines and sines of T positions, [T, D / 2] each, in the activations' dtype."""

    cos: Tensor
    sin: Tensor
    interleaved: bool

    def rotate(self, x_TND: Tensor) -> Tensor:
        """Every head of row t turned by the angles of its position. Same shape and dtype.

        Interleaved pairs (2i, 2i + 1) come out as (i, i + D / 2): the order within a head does not change a product
        of a query and a key as long as both have it.
        """
        cos, sin = self.cos[:, None], self.sin[:, None]
        if self.interleaved:
            first, second = x_TND[..., 0::2], x_TND[..., 1::2]
        else:
            first, second = x_TND.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Rope:
    """The angles of one RopeSpec for heads of `dim` rotated dimensions."""

    def __init__(self, spec: RopeSpec, dim: int, device: torch.device) -> None:
        self._spec = spec
        self._exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
        self._frequencies = _frequencies(spec, dim, self._exponents)
        self._dim = dim

    def table(self, positions_T: Tensor, dtype: torch.dtype) -> RopeTable:
        """For rows at these positions. Angles are float32 and only cosines and sines are rounded to `dtype`."""
        positions = positions_T.to(torch.float32)[:, None]
        angles = positions * (self._stretched(positions) if self._spec.kind == "dynamic" else self._frequencies)
        scale = self._spec.cos_sin_scale
        return RopeTable(
            (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype), self._spec.interleaved
        )

    def _stretched(self, positions_T1: Tensor) -> Tensor:
        """Dynamic NTK: the base grows with the length up to and including the row's own token.

        transformers takes the length of the whole forward call instead. Both agree when tokens come one by one, and
        this way a row's angles do not depend on how its prompt was cut, nor on what else is in the batch.
        """
        spec = self._spec
        original = spec.original_max_position_embeddings
        length = (positions_T1 + 1).clamp(min=original)
        growth = spec.factor * length / original - (spec.factor - 1)
        return (spec.theta * growth ** (self._dim / (self._dim - 2))) ** -self._exponents


def _frequencies(spec: RopeSpec, dim: int, exponents: Tensor) -> Tensor:
    """Radians per position of each pair, [D / 2]."""
    frequencies = 1.0 / spec.theta**exponents
    if spec.kind == "linear":
        return frequencies / spec.factor
    if spec.kind == "yarn":
        return _yarn(spec, dim, frequencies)
    if spec.kind == "llama3":
        return _llama3(spec, frequencies)
    assert spec.kind in ("default", "dynamic"), spec.kind
    return frequencies


def _yarn(spec: RopeSpec, dim: int, frequencies: Tensor) -> Tensor:
    """YaRN (arXiv 2309.00071): pairs that turn often are kept, those that turn rarely stretched, a ramp between."""

    def pair_that_turns(times: float) -> float:
        wavelength = spec.original_max_position_embeddings / (times * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(spec.theta))

    low, high = pair_that_turns(spec.beta_fast), pair_that_turns(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    pairs = torch.arange(dim // 2, dtype=torch.float32, device=frequencies.device)
    stretched_share = ((pairs - low) / (high - low)).clamp(0, 1)
    return frequencies / spec.factor * stretched_share + frequencies * (1 - stretched_share)


def _llama3(spec: RopeSpec, frequencies: Tensor) -> Tensor:
    """Llama 3.1: wavelengths beyond the trained length are stretched, short ones kept, those between interpolated."""
    turns = spec.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept_share = (turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    kept_share = kept_share.clamp(0, 1)
    return frequencies / spec.factor * (1 - kept_share) + frequencies * kept_share
