"""One token per row: the likeliest, or one drawn from what min_p, top_k and top_p leave, without sorting the vocabulary.

What lives here: exact choices from logits that are shaped already. What does not: penalties, seeds and log-probabilities
(sampler.py, the only caller).

What a truncation keeps begins with the likeliest token and has no gaps. So it is enough to look at the tokens above some
bound, as long as the bound is low enough: for min_p it is the rule itself; for top_k the k-th largest of the largest
tokens of each block, since k tokens are not below it; for top_p two guesses, then a bound below which all of the
vocabulary together cannot hold the missing mass, each taken where the mass above it reaches top_p. Most blocks lie
below the bound with all their tokens. Those that do not are few, and only their candidates are sorted.

Shapes: N rows, V vocabulary entries, in B blocks of W (the last one filled up with minus infinity), C candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afd_server.types import SamplingParams

BLOCK_TOKENS = 64
# The guesses for top_p: the tokens not below the best one of the 32nd likeliest block, then of the 256th.
GUESSED_BLOCKS = (32, 256)
# Rows with at most so many candidates are sorted together, as wide as the widest; each of the others by itself.
FEW_CANDIDATES = 512
# Rows are taken in parts whose logits are no larger.
SCRATCH_BYTES = 8 << 20
UNLIMITED = 2**62  # top_k of a row without one


def likeliest(logits_NV: Tensor) -> Tensor:
    """The first of the largest values of each row, [N] int64. On a CPU numpy's argmax is 4 to 12 times faster than torch's."""
    if logits_NV.device.type != "cpu":
        return logits_NV.argmax(dim=-1)
    return torch.from_numpy(logits_NV.numpy().argmax(axis=-1))


class Draw:
    """Draws one token per row. It keeps the memory that it works in: fresh memory costs more than the pass over it."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._num_blocks = -(-vocab_size // BLOCK_TOKENS)
        self._at_once = max(1, SCRATCH_BYTES // (4 * self._num_blocks * BLOCK_TOKENS))
        self._scratch = torch.empty(0, device=device)

    def __call__(
        self, logits_NV: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]
    ) -> Tensor:
        """One token per row, [N] int64, by inverting the cumulative distribution, in order of ids, at uniforms[row].

        Each row by its own params: temperature, min_p, top_k, top_p, in this order. Temperatures are above 0. Masses are
        those of the float32 softmax, added up in float64. Of equally likely tokens those with smaller ids are kept first.
        """
        starts = range(0, len(params), self._at_once)
        parts = [slice(start, start + self._at_once) for start in starts]
        tokens = [self._draw(logits_NV[part], params[part], uniforms[part]) for part in parts]
        # From logits that are no numbers any token comes, but a token.
        return torch.cat(tokens).clamp_(max=self._vocab_size - 1)

    def _draw(self, logits_NV: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
        """Some rows, at most as many as are taken at once."""
        # Sums of masses are float64, and so is what is compared with them.
        settings_N4 = torch.tensor(
            [
                (each.temperature, each.top_p, each.min_p, value)
                for each, value in zip(params, uniforms, strict=True)
            ],
            dtype=torch.float64,
            device=logits_NV.device,
        )
        temperature_N1, top_p_N1, min_p_N1, uniform_N1 = settings_N4.split(1, dim=1)
        logits_NBW, probabilities_NBW = self._in_blocks(logits_NV, temperature_N1.float())
        cut = [row for row, each in enumerate(params) if each.top_k or each.min_p or each.top_p < 1.0]
        if not cut:
            return _draw_from_all(probabilities_NBW, uniform_N1)
        peak_NB = logits_NBW.amax(dim=-1)
        rows = _Rows(
            logits_NBW,
            probabilities_NBW,
            peak_NB,
            peak_NB.amax(dim=-1, keepdim=True),
            self._vocab_size,
            torch.tensor([each.top_k or UNLIMITED for each in params], device=logits_NV.device)[:, None],
            top_p_N1,
            min_p_N1.float(),
            uniform_N1,
        )
        tokens_N = torch.empty(len(params), dtype=torch.int64, device=logits_NV.device)
        if len(cut) < len(params):
            whole = sorted(set(range(len(params))).difference(cut))
            tokens_N[whole] = _draw_from_all(probabilities_NBW[whole], uniform_N1[whole])
        pending_N = torch.tensor(cut, device=logits_NV.device)
        for bound_N1 in rows.bounds():
            pending_N = rows.draw_above(bound_N1, pending_N, tokens_N)
            if not len(pending_N):
                break
        return tokens_N

    def _in_blocks(self, logits_NV: Tensor, temperature_N1: Tensor) -> tuple[Tensor, Tensor]:
        """The logits divided by the temperature, and their softmax, [N, B, W] each, in memory of this object."""
        num_rows, width = len(logits_NV), self._num_blocks * BLOCK_TOKENS
        if self._scratch.numel() < 2 * num_rows * width:
            self._scratch = self._scratch.new_empty(2 * num_rows * width)
        logits, probabilities = self._scratch[: 2 * num_rows * width].view(2, num_rows, width)
        torch.div(logits_NV, temperature_N1, out=logits[:, : self._vocab_size])
        logits[:, self._vocab_size :] = -torch.inf
        torch.softmax(logits, dim=-1, out=probabilities)
        blocks = (num_rows, self._num_blocks, BLOCK_TOKENS)
        return logits.view(blocks), probabilities.view(blocks)


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of one draw. logits: divided by temperature. peak: the largest of a block, or of the row.

    A bound, [N, 1], says which tokens of a row are looked at: those not below it. With top_k or min_p it must be exact,
    since top_p is a share of what they leave then.
    """

    logits_NBW: Tensor
    probabilities_NBW: Tensor
    peak_NB: Tensor
    peak_N1: Tensor
    vocab_size: int
    top_k_N1: Tensor
    top_p_N1: Tensor
    min_p_N1: Tensor
    uniform_N1: Tensor

    def is_relative(self, rows: Tensor) -> Tensor:
        """[rows, 1]: whether top_k or min_p comes before top_p."""
        return (self.top_k_N1[rows] < UNLIMITED) | (self.min_p_N1[rows] > 0)

    def bounds(self) -> Iterator[Tensor]:
        """From high to low. The last one leaves nothing out: rounding may have kept a row from its goal."""
        for num_blocks in GUESSED_BLOCKS:
            yield self.guessed_bound(num_blocks)
        yield self.safe_bound()
        yield torch.full_like(self.peak_N1, -torch.inf)

    def guessed_bound(self, guessed_blocks: int) -> Tensor:
        """A guess for rows with top_p alone; exact for those with top_k or min_p."""
        num_blocks = self.peak_NB.shape[1]
        has_top_k_N1 = self.top_k_N1 < UNLIMITED
        wanted_N1 = self.top_k_N1.where(has_top_k_N1, min(guessed_blocks, num_blocks))
        searched_N1 = wanted_N1.clamp(max=num_blocks)
        peaks = self.peak_NB.topk(int(searched_N1.max()), dim=-1).values
        unbound_N1 = (wanted_N1 > num_blocks) | (~has_top_k_N1 & (self.min_p_N1 > 0))
        bound_N1 = peaks.gather(1, searched_N1 - 1).masked_fill(unbound_N1, -torch.inf)
        # p < min_p * max(p)  <=>  logit < max(logit) + log(min_p)
        return torch.maximum(bound_N1, self.peak_N1 + self.min_p_N1.log())

    def safe_bound(self) -> Tensor:
        """For top_p alone: below it all tokens of a vocabulary together hold half of 1 - top_p at most."""
        least_N1 = (1.0 - self.top_p_N1) / (2 * self.vocab_size)
        likeliest_N1 = self.probabilities_NBW.flatten(1).amax(dim=-1, keepdim=True)
        return self.peak_N1 + (least_N1 / likeliest_N1).log().to(self.peak_N1.dtype)

    def draw_above(self, bound_N1: Tensor, pending_P: Tensor, tokens_N: Tensor) -> Tensor:
        """Draws for the pending rows from the tokens not below the bound, into tokens_N. Gives the rows, ascending like
        the pending ones, for which that was not enough."""
        # Tokens that are forbidden, mostly nearly all of them or none, are no candidates below any bound.
        bound_N1 = bound_N1.clamp(min=torch.finfo(bound_N1.dtype).min)
        line_M, block_M = (self.peak_NB[pending_P] >= bound_N1[pending_P]).nonzero(as_tuple=True)
        row_M = pending_P[line_M]
        touched_F, place_F = (self.logits_NBW[row_M, block_M] >= bound_N1[row_M]).nonzero(as_tuple=True)
        # Where the candidates lie among the logits of all rows: in order of rows, then of tokens.
        found_F = ((row_M * self.peak_NB.shape[1] + block_M) * BLOCK_TOKENS)[touched_F] + place_F
        line_F = line_M[touched_F]
        counts_P = line_F.bincount(minlength=len(pending_P))
        is_few_P = counts_P <= FEW_CANDIDATES
        if bool(is_few_P.all()):
            return pending_P[~self._draw_from(pending_P, counts_P, found_F, tokens_N)]
        enough_P = torch.empty_like(is_few_P)
        if bool(is_few_P.any()):
            found_of_few = found_F[is_few_P[line_F]]
            enough_P[is_few_P] = self._draw_from(
                pending_P[is_few_P], counts_P[is_few_P], found_of_few, tokens_N
            )
        ends = counts_P.cumsum(0).tolist()
        for line in (~is_few_P).nonzero()[:, 0].tolist():
            one, own = slice(line, line + 1), slice(ends[line] - int(counts_P[line]), ends[line])
            enough_P[one] = self._draw_from(pending_P[one], counts_P[one], found_F[own], tokens_N)
        return pending_P[~enough_P]

    def _draw_from(self, rows_G: Tensor, counts_G: Tensor, found_F: Tensor, tokens_N: Tensor) -> Tensor:
        """Draws for these rows from their candidates, counts_G of them for each row. Gives for which rows they were enough."""
        num_rows, width = len(rows_G), max(1, int(counts_G.max()))
        first_G1 = (rows_G * (self.peak_NB.shape[1] * BLOCK_TOKENS))[:, None]
        # Where a row has fewer candidates than that, what follows them has no mass and sorts behind them.
        is_full = len(found_F) == num_rows * width
        if is_full:
            found_GC = found_F.view(num_rows, width)
        else:
            filled_GC = torch.arange(width, device=counts_G.device) < counts_G[:, None]
            found_GC = first_G1.repeat(1, width).masked_scatter_(filled_GC, found_F)
        logits_GC = self.logits_NBW.take(found_GC)
        masses_GC = self.probabilities_NBW.take(found_GC).double()
        if not is_full:
            logits_GC.masked_fill_(~filled_GC, -torch.inf)
            masses_GC.masked_fill_(~filled_GC, 0.0)
        top_p_G1, relative_G1 = self.top_p_N1[rows_G], self.is_relative(rows_G)
        kept_GC, reached_G1 = _truncated(logits_GC, masses_GC, self.top_k_N1[rows_G], top_p_G1, relative_G1)
        picked_G1 = _invert(kept_GC.cumsum(dim=-1), self.uniform_N1[rows_G])
        tokens_N[rows_G] = (found_GC.gather(1, picked_G1) - first_G1)[:, 0]
        return (relative_G1 | (reached_G1 >= top_p_G1) | (counts_G[:, None] >= self.vocab_size))[:, 0]


def _truncated(
    logits_GC: Tensor, masses_GC: Tensor, top_k_G1: Tensor, top_p_G1: Tensor, relative_G1: Tensor
) -> tuple[Tensor, Tensor]:
    """The masses with all but the top_k likeliest, then all beyond the top_p mass, at 0; and the mass before the latter.

    relative: top_p is a share of the mass that top_k leaves, else of 1.
    """
    order_GC = _descending(logits_GC)
    sorted_GC = masses_GC.gather(1, order_GC)
    sorted_GC.masked_fill_(torch.arange(sorted_GC.shape[1], device=sorted_GC.device) >= top_k_G1, 0.0)
    mass_GC = sorted_GC.cumsum(dim=-1)
    reached_G1 = mass_GC[:, -1:].clone()
    goal_G1 = torch.where(relative_G1, top_p_G1 * reached_G1, top_p_G1)
    # A token stays while the mass before it is below the goal; so the likeliest always stays.
    beyond_GC = (mass_GC.sub_(sorted_GC) >= goal_G1) & (top_p_G1 < 1.0)
    beyond_GC[:, 0] = False
    return torch.empty_like(sorted_GC).scatter_(1, order_GC, sorted_GC.masked_fill_(beyond_GC, 0.0)), reached_G1


def _descending(logits_GC: Tensor) -> Tensor:
    """The places of a stable descending sort, [G, C] int64. None of the logits is NaN.

    On a CPU value and place become one number, since numpy sorts numbers many times faster than torch sorts with indices.
    """
    if logits_GC.device.type != "cpu":
        return logits_GC.sort(dim=-1, descending=True, stable=True).indices
    bits_GC = (logits_GC + 0.0).view(torch.int32)  # -0.0 becomes 0.0, its equal
    # As integers, positive floats are in order; of negative ones all bits but the sign are turned around.
    rising_GC = torch.where(bits_GC < 0, bits_GC ^ 0x7FFFFFFF, bits_GC)
    keys_GC = rising_GC.bitwise_not_().to(torch.int64).bitwise_left_shift_(32)
    keys_GC += torch.arange(keys_GC.shape[1])
    keys_GC.numpy().sort(axis=-1)
    return keys_GC.bitwise_and_(0xFFFFFFFF)


def _draw_from_all(probabilities_NBW: Tensor, uniform_N1: Tensor) -> Tensor:
    """[N] tokens of rows that keep the whole vocabulary: first the block, then the token in it."""
    blocks_NB = probabilities_NBW.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    block_N1 = _invert(blocks_NB, uniform_N1)
    chosen_NW = probabilities_NBW[torch.arange(len(blocks_NB), device=blocks_NB.device), block_N1[:, 0]]
    before_N1 = torch.where(block_N1 > 0, blocks_NB.gather(1, (block_N1 - 1).clamp(min=0)), 0.0)
    within_NW = chosen_NW.double().cumsum(dim=-1) + before_N1
    target_N1 = uniform_N1 * blocks_NB[:, -1:]
    return (block_N1 * BLOCK_TOKENS + _first_above(within_NW, target_N1))[:, 0]


def _invert(cumulative_NC: Tensor, uniform_N1: Tensor) -> Tensor:
    """Where each row passes its share of its own total, [N, 1]: rounding cannot push that beyond the last likely token."""
    return _first_above(cumulative_NC, uniform_N1 * cumulative_NC[:, -1:])


def _first_above(cumulative_NC: Tensor, target_N1: Tensor) -> Tensor:
    """The first place above the target, or where there is none the one at which the row reaches its largest value."""
    found_N1 = torch.searchsorted(cumulative_NC, target_N1, right=True)
    last_N1 = torch.searchsorted(cumulative_NC, cumulative_NC[:, -1:].contiguous())
    return torch.minimum(found_N1, last_N1).clamp_(max=cumulative_NC.shape[-1] - 1)
