"""One token per row: the likeliest, or one drawn from what min_p, top_k and top_p leave, without sorting the vocabulary.

What lives here: exact choices from logits that are shaped already. What does not: penalties, seeds and log-probabilities
(sampler.py, the only caller).

What a truncation keeps begins with the likeliest token and has no gaps. So it is enough to look at the tokens above some
bound, as long as the bound is low enough: for min_p it is the rule itself; for top_k the k-th largest of the largest
tokens of each block, since k tokens are not below it; for top_p a first guess, then a bound below which all of the
vocabulary together cannot hold the missing mass, each taken where the mass above it reaches top_p. Most blocks lie
below the bound with all their tokens. Those that do not are few, and only their candidates are sorted.

Shapes: N rows, V vocabulary entries, in B blocks of W (the last one filled up with minus infinity), C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afd_server.types import SamplingParams

BLOCK_TOKENS = 64
# The first guess for top_p: the tokens not below the 32nd likeliest block's best one.
GUESSED_BLOCKS = 32
# Rows with at most so many candidates are sorted together, as wide as the widest; each of the others by itself.
FEW_CANDIDATES = 512
# Rows are taken in parts whose tensors are no larger: fresh memory costs more than the pass over it.
SCRATCH_BYTES = 8 << 20
UNLIMITED = 2**62  # top_k of a row without one


def likeliest(logits_NV: Tensor) -> Tensor:
    """The first of the largest values of each row, [N] int64: argmax, but the pass over the vocabulary is a maximum."""
    num_rows, vocab_size = logits_NV.shape
    if vocab_size % BLOCK_TOKENS or logits_NV.device.type != "cpu":
        return logits_NV.argmax(dim=-1)
    logits_NBW = logits_NV.reshape(num_rows, -1, BLOCK_TOKENS)
    block_N = logits_NBW.amax(dim=-1).argmax(dim=-1)
    within_N = logits_NBW[torch.arange(num_rows), block_N].argmax(dim=-1)
    return block_N * BLOCK_TOKENS + within_N


def draw(logits_NV: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    """One token per row, [N] int64, by inverting the cumulative distribution, in order of token ids, at uniforms[row].

    Each row by its own params: temperature, min_p, top_k, top_p, in this order. Temperatures are above 0. Masses are those
    of the float32 softmax, added up in float64. Of equally likely tokens those with smaller ids are kept first.
    """
    num_rows, vocab_size = logits_NV.shape
    at_once = max(1, SCRATCH_BYTES // (4 * vocab_size))
    tokens = [
        _draw(logits_NV[rows], params[rows], uniforms[rows])
        for rows in (slice(start, start + at_once) for start in range(0, num_rows, at_once))
    ]
    # From logits that are no numbers any token comes, but a token.
    return torch.cat(tokens).clamp_(max=vocab_size - 1)


def _draw(logits_NV: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    """Some rows of `draw`."""
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
    logits_NBW = _in_blocks(logits_NV, temperature_N1.float())
    probabilities_NBW = logits_NBW.flatten(1).softmax(dim=-1).view_as(logits_NBW)
    cut = [row for row, each in enumerate(params) if each.top_k or each.min_p or each.top_p < 1.0]
    if not cut:
        return _draw_from_all(probabilities_NBW, uniform_N1)
    peak_NB = logits_NBW.amax(dim=-1)
    rows = _Rows(
        logits_NBW,
        probabilities_NBW,
        peak_NB,
        peak_NB.amax(dim=-1, keepdim=True),
        logits_NV.shape[1],
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
    for bound in (rows.first_bound, rows.safe_bound, rows.no_bound):
        pending_N = rows.draw_above(bound(), pending_N, tokens_N)
        if not len(pending_N):
            break
    return tokens_N


def _in_blocks(logits_NV: Tensor, temperature_N1: Tensor) -> Tensor:
    """[N, B, W], divided by the temperature."""
    num_rows, vocab_size = logits_NV.shape
    num_blocks = -(-vocab_size // BLOCK_TOKENS)
    scaled = logits_NV.new_empty(num_rows, num_blocks * BLOCK_TOKENS)
    torch.div(logits_NV, temperature_N1, out=scaled[:, :vocab_size])
    scaled[:, vocab_size:] = -torch.inf
    return scaled.view(num_rows, num_blocks, BLOCK_TOKENS)


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

    def first_bound(self) -> Tensor:
        """Exact for rows with top_k or min_p; a guess for those with top_p alone."""
        num_blocks = self.peak_NB.shape[1]
        has_top_k_N1 = self.top_k_N1 < UNLIMITED
        wanted_N1 = self.top_k_N1.where(has_top_k_N1, min(GUESSED_BLOCKS, num_blocks))
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

    def no_bound(self) -> Tensor:
        """What rounding has kept from the goal so far, and what is no number, ends here."""
        return torch.full_like(self.peak_N1, -torch.inf)

    def draw_above(self, bound_N1: Tensor, pending_P: Tensor, tokens_N: Tensor) -> Tensor:
        """Draws for the pending rows from the tokens not below the bound, into tokens_N. Gives the rows, ascending like
        the pending ones, for which that was not enough."""
        line_M, block_M = (self.peak_NB[pending_P] >= bound_N1[pending_P]).nonzero(as_tuple=True)
        row_M = pending_P[line_M]
        touched_F, place_F = (self.logits_NBW[row_M, block_M] >= bound_N1[row_M]).nonzero(as_tuple=True)
        row_F, block_F = row_M[touched_F], block_M[touched_F]  # in order of rows, then of tokens
        counts_P = line_M[touched_F].bincount(minlength=len(pending_P))
        is_few_P = counts_P <= FEW_CANDIDATES
        if bool(is_few_P.all()):
            enough_P = self._draw_from(pending_P, counts_P, (row_F, block_F, place_F), tokens_N)
            return pending_P[~enough_P]
        enough_P = torch.empty_like(is_few_P)
        if bool(is_few_P.any()):
            of_few_F = is_few_P[line_M[touched_F]]
            found = (row_F[of_few_F], block_F[of_few_F], place_F[of_few_F])
            enough_P[is_few_P] = self._draw_from(pending_P[is_few_P], counts_P[is_few_P], found, tokens_N)
        ends = counts_P.cumsum(0).tolist()
        for line in (~is_few_P).nonzero()[:, 0].tolist():
            one, own = slice(line, line + 1), slice(ends[line] - int(counts_P[line]), ends[line])
            found = (row_F[own], block_F[own], place_F[own])
            enough_P[one] = self._draw_from(pending_P[one], counts_P[one], found, tokens_N)
        return pending_P[~enough_P]

    def _draw_from(
        self, rows_G: Tensor, counts_G: Tensor, found: tuple[Tensor, Tensor, Tensor], tokens_N: Tensor
    ) -> Tensor:
        """Draws for these rows from their candidates: row, block and place of each, in order, counts_G of them for each
        row. Gives for which rows they were enough."""
        _, block_F, place_F = found
        width = max(1, int(counts_G.max()))
        # Where there are fewer candidates than that, what follows them has no mass and sorts behind them.
        filled_GC = torch.arange(width, device=counts_G.device) < counts_G[:, None]
        logits_GC = self.peak_N1.new_full(filled_GC.shape, -torch.inf)
        logits_GC[filled_GC] = self.logits_NBW[found]
        masses_GC = torch.zeros_like(logits_GC, dtype=torch.float64)
        masses_GC[filled_GC] = self.probabilities_NBW[found].double()
        ids_GC = torch.zeros_like(filled_GC, dtype=torch.int64)
        ids_GC[filled_GC] = block_F * BLOCK_TOKENS + place_F
        top_p_G1, relative_G1 = self.top_p_N1[rows_G], self.is_relative(rows_G)
        kept_GC, reached_G1 = _truncated(logits_GC, masses_GC, self.top_k_N1[rows_G], top_p_G1, relative_G1)
        picked_G1 = _invert(kept_GC.cumsum(dim=-1), self.uniform_N1[rows_G])
        tokens_N[rows_G] = ids_GC.gather(1, picked_G1)[:, 0]
        return (relative_G1 | (reached_G1 >= top_p_G1) | (counts_G[:, None] >= self.vocab_size))[:, 0]


def _truncated(
    logits_GC: Tensor, masses_GC: Tensor, top_k_G1: Tensor, top_p_G1: Tensor, relative_G1: Tensor
) -> tuple[Tensor, Tensor]:
    """The masses with all but the top_k likeliest, then all beyond the top_p mass, at 0; and the mass before the latter.

    relative: top_p is a share of the mass that top_k leaves, else of 1.
    """
    order_GC = logits_GC.sort(dim=-1, descending=True, stable=True).indices
    sorted_GC = masses_GC.gather(1, order_GC)
    sorted_GC.masked_fill_(torch.arange(sorted_GC.shape[1], device=sorted_GC.device) >= top_k_G1, 0.0)
    mass_GC = sorted_GC.cumsum(dim=-1)
    reached_G1 = mass_GC[:, -1:].clone()
    goal_G1 = torch.where(relative_G1, top_p_G1 * reached_G1, top_p_G1)
    # A token stays while the mass before it is below the goal; so the likeliest always stays.
    beyond_GC = (mass_GC.sub_(sorted_GC) >= goal_G1) & (top_p_G1 < 1.0)
    beyond_GC[:, 0] = False
    return torch.empty_like(sorted_GC).scatter_(1, order_GC, sorted_GC.masked_fill_(beyond_GC, 0.0)), reached_G1


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
