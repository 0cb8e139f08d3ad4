"""The random numbers of sampling: a function of (seed, output position), with no state to keep, move or lose.

That is what lets a seeded request be preempted, resubmitted to another replica or batched with others and still get
the same tokens. Source: SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for the token at `position` of a request with `seed`. Any integers are welcome."""
    mixed = _mix((_mix(seed & _MASK) + (position + 1) * _GOLDEN_GAMMA) & _MASK)
    return (mixed >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
