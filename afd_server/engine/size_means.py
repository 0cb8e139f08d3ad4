"""Means of measured steps by their size: a step of few tokens takes the time of reading the weights, one of many grows.

What lives here: the running means, one for each power of two of tokens, and the line between them. What does not: what
is measured and what follows from it (micro_batches.py and step_time.py, the callers).
"""

from __future__ import annotations

from collections.abc import Sequence

# A measurement, or a mean of some: its tokens first, then whatever belongs to it.
Point = tuple[float, ...]
# What a mean's weight is multiplied by at each measurement of any size: of two that contradict each other the later counts.
FADING = 0.998


def size_of(num_tokens: float) -> int:
    """The power-of-two bucket of a number of tokens: 1, 2, 3-4, 5-8, ..."""
    return (int(num_tokens) - 1).bit_length()


def mixed(point: Point, other: Point, share: float) -> Point:
    """`share` of the other, the rest of this one."""
    return tuple((1 - share) * mine + share * theirs for mine, theirs in zip(point, other, strict=True))


def at(points: Sequence[Point], tokens: float) -> Point:
    """The values at a number of tokens, on the line between the points around it; points are sorted by tokens.

    Below the first it is the first's: reading the weights takes its time even for one token. Above the last one it is in
    proportion, which is never too fast.
    """
    if tokens <= points[0][0]:
        return points[0]
    last = points[-1]
    if tokens >= last[0]:
        return tuple(value * tokens / last[0] for value in last)
    above = next(index for index, point in enumerate(points) if point[0] >= tokens)
    low, high = points[above - 1], points[above]
    return mixed(low, high, (tokens - low[0]) / (high[0] - low[0]))


class SizeMeans:
    """The running means. smoothing: the share of a new measurement in the mean of many."""

    def __init__(self, smoothing: float) -> None:
        self._smoothing = smoothing
        self._means: dict[int, Point] = {}
        self._weights: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._means)

    def covers(self, num_tokens: int) -> bool:
        """Whether a step of this size or of a larger one was measured."""
        return bool(self._means) and size_of(num_tokens) <= max(self._means)

    def observe(self, point: Point) -> None:
        """Takes a measurement in; the first ones of a size count alike."""
        size = size_of(point[0])
        for other in self._weights:
            self._weights[other] *= FADING
        weight = self._weights[size] = self._weights.get(size, 0.0) + 1.0
        known = self._means.get(size)
        self._means[size] = point if known is None else mixed(known, point, max(1 / weight, self._smoothing))

    def points(self) -> list[Point]:
        """Sorted by tokens."""
        return sorted(self._means.values())

    def weights(self) -> list[float]:
        """How much is behind each of the points, in their order: the number of measurements, late ones above all."""
        return [self._weights[size] for size in sorted(self._means)]
