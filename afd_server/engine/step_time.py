"""How long a step takes, learnt from the steps that ran: what a promise of time per token is kept by.

What lives here: the description of a step's work, and the model fitted to it. What does not: measuring (engine.py) and
what is done about it (pace.py).

    seconds(work) = base(tokens) + slopes . (context_tokens, chunk_pairs, samples)

base is piecewise linear between the means of each power of two of tokens (size_means.py): flat where reading the weights
of both sides and the wire take the time, rising where arithmetic does, and with experts something between. The slopes are
what attention and the LM head add: keys that decoding requests read, query-key pairs inside prompts, rows of logits. They
are fitted to how steps differ from the mean of their size, so that neither a size's cost is taken for the context's nor the
other way round. The whole step is fitted, not attention, FFN and wire each: they overlap, and the promise is about their sum.

On a shared machine steps are noisy. A step is never taken for more than OUTLIER times what was expected, old steps are
forgotten slowly, slopes are held back until there is evidence for them, and more work never makes a prediction smaller.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from itertools import chain

from afd_server.engine.size_means import Point, SizeMeans, at
from afd_server.types import StepPlan

SMOOTHING = 0.1
# A step that took longer than this many times what was expected was held up by something else.
OUTLIER = 3.0
# So much of what is known of the slopes is left after each further step.
MEMORY = 0.998
# How far a slope may be from what it was at first: at its most, its quantity's difference makes up about this share of a step.
PRIOR_SHARE = 0.5
NOISE_SMOOTHING = 0.02
# Rounds of solving for one slope after the other; each step starts where the one before ended.
ROUNDS = 4


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step has to do, as far as its time depends on it.

    tokens: rows through every layer. context_tokens: keys that requests with one token read. chunk_pairs: query-key pairs of
    requests with several. samples: rows of logits; there are more of them than tokens sampled where a prompt is reported.
    """

    tokens: float = 0
    context_tokens: float = 0
    chunk_pairs: float = 0
    samples: float = 0

    @classmethod
    def of(cls, plan: StepPlan) -> StepWork:
        work = cls()
        for part in chain.from_iterable(plan.micro_batches):
            work += cls.part(part.start_position, len(part.token_ids), part.num_logits)
        return work

    @classmethod
    def part(cls, start: int, tokens: int, samples: int) -> StepWork:
        """One request's share: `tokens` tokens after `start` that are in the KV cache."""
        if tokens == 1:
            return cls(1, start + 1, 0, samples)
        return cls(tokens, 0, tokens * start + tokens * (tokens + 1) / 2, samples)

    def __add__(self, other: StepWork) -> StepWork:
        return StepWork(
            self.tokens + other.tokens,
            self.context_tokens + other.context_tokens,
            self.chunk_pairs + other.chunk_pairs,
            self.samples + other.samples,
        )

    @property
    def beyond_tokens(self) -> tuple[float, float, float]:
        """What the slopes are of."""
        return self.context_tokens, self.chunk_pairs, self.samples


class StepTimeModel:
    """The model of one replica. Used by one thread.

    slopes, steps: what is believed before anything was observed, in seconds (profiled.py has it from a file).
    """

    def __init__(
        self, slopes: Sequence[float] = (0.0, 0.0, 0.0), steps: Iterable[tuple[StepWork, float]] = ()
    ) -> None:
        self._means = SizeMeans(SMOOTHING)  # of (tokens, context_tokens, chunk_pairs, samples, seconds)
        self._slopes = Slopes(slopes)
        self._base: list[Point] = []  # (tokens, seconds), rising
        for work, seconds in steps:
            self._means.observe((*astuple(work), seconds))
        self._fit_base()

    @property
    def is_fitted(self) -> bool:
        return bool(self._base)

    def predict_s(self, work: StepWork) -> float:
        """Seconds that a step of this work takes; 0 before anything was observed."""
        if not self._base:
            return 0.0
        return at(self._base, work.tokens)[1] + self._slopes.value(work.beyond_tokens)

    def observe(self, work: StepWork, seconds: float) -> None:
        """Takes in what a step took."""
        assert work.tokens >= 1
        if self._base:
            seconds = min(seconds, OUTLIER * self.predict_s(work))
            _, *usual, usual_s = at(self._means.points(), work.tokens)
            self._slopes.observe(work.beyond_tokens, usual, seconds, max(usual_s, 1e-9))
        self._means.observe((*astuple(work), seconds))
        self._fit_base()

    def _fit_base(self) -> None:
        points = self._means.points()
        base_s = [max(0.0, point[-1] - self._slopes.value(point[1:-1])) for point in points]
        rising = rising_mean(base_s, self._means.weights())
        self._base = [(point[0], seconds) for point, seconds in zip(points, rising, strict=True)]


class Slopes:
    """Seconds per unit of each of several quantities, none negative: least squares over the differences from the usual.

    Differences are taken in shares of the usual time, since long steps are also disturbed for longer, and the fit is a
    ridge regression whose prior grows with the noise: that a slope differs from what it was at first by about as much as makes up
    PRIOR_SHARE of a step at the most of its quantity that was seen.
    """

    def __init__(self, first: Sequence[float]) -> None:
        count = len(first)
        self._first = first
        self._slopes = list(first)
        self._products = [[0.0] * count for _ in range(count)]  # of differences with each other
        self._moments = [0.0] * count  # of differences with the time's
        self._squares = [0.0] * count  # of the largest quantities
        self._noise = 1.0  # mean square of what is not explained

    def value(self, quantities: Sequence[float]) -> float:
        return sum(slope * quantity for slope, quantity in zip(self._slopes, quantities, strict=True))

    def observe(
        self, quantities: Sequence[float], usual: Sequence[float], seconds: float, usual_s: float
    ) -> None:
        """A step of these quantities took this long, where `usual` were usual for its tokens, the time too."""
        difference = seconds / usual_s - 1
        differences = [(mine - theirs) / usual_s for mine, theirs in zip(quantities, usual, strict=True)]
        unexplained = difference - self.value(differences)
        self._noise += NOISE_SMOOTHING * (unexplained**2 - self._noise)
        for row, own in enumerate(differences):
            self._moments[row] = MEMORY * self._moments[row] + own * difference
            largest = max(quantities[row], usual[row]) / usual_s
            self._squares[row] = max(MEMORY * self._squares[row], largest**2)
            for column, other in enumerate(differences):
                self._products[row][column] = MEMORY * self._products[row][column] + own * other
        for _ in range(ROUNDS):
            for row in range(len(self._slopes)):
                self._solve(row)

    def _solve(self, row: int) -> None:
        """The best slope of one quantity, the others as they are."""
        products = self._products[row]
        prior = self._noise / PRIOR_SHARE**2 * self._squares[row]
        own = products[row] + prior
        others = sum(product * slope for product, slope in zip(products, self._slopes, strict=True))
        others -= products[row] * self._slopes[row]
        wanted = self._moments[row] - others + prior * self._first[row]
        self._slopes[row] = max(0.0, wanted / own) if own > 0 else self._first[row]


def rising_mean(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The nearest sequence that never falls: neighbours that contradict the order share their weighted mean."""
    blocks: list[tuple[float, float, int]] = []  # mean, weight, how many
    for value, weight in zip(values, weights, strict=True):
        block = (value, weight, 1)
        while blocks and blocks[-1][0] > block[0]:
            mean, weight, count = blocks.pop()
            total = weight + block[1]
            block = ((mean * weight + block[0] * block[1]) / total, total, count + block[2])
        blocks.append(block)
    return [mean for mean, _, count in blocks for _ in range(count)]
