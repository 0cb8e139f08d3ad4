"""From logits to tokens: penalties, temperature, truncation, the draw, and log-probabilities.

What lives here: the sampling state of each running request, and the course from logits to tokens. What does not: how
one of the tokens that are left is drawn (draw.py), and when a request ends (engine/scheduler.py). Each row is computed from its own request alone, so a request's tokens
do not depend on what else is in the batch. The order of the stages is vLLM's: allowed tokens, bad words, minimum length and bias, penalties,
temperature, min_p, top_k, top_p. A constraint comes before the temperature, and where the rules before it leave nothing of what it
allows, they yield. Log-probabilities are of the model's own distribution, before all of these.

Shapes: N rows (one per sampled request), V vocabulary entries.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from afd_server.attention.constraints import Constrained, Constraints, forbidden
from afd_server.attention.draw import Draw, likeliest
from afd_server.attention.random_numbers import uniform
from afd_server.types import SampledToken, SamplingParams, StartedRequest, TokenLogprobs

GREEDY_TEMPERATURE = 1e-5  # below it the distribution is a point, and dividing by it would overflow


@dataclass(slots=True)
class SamplingState:
    """What must be remembered of a request between two of its tokens.

    prompt_mask_V (bool) and output_counts_V are kept only when a penalty asks for them, forbidden_V (bool) where not every
    token is allowed, the last output tokens, as many as a bad word has before its last, where there are bad words, and
    constrained while a grammar says what may come next.
    """

    params: SamplingParams
    num_outputs: int
    forbidden_V: Tensor | None = None
    last_token_ids: deque[int] | None = None
    prompt_mask_V: Tensor | None = None
    output_counts_V: Tensor | None = None
    constrained: Constrained | None = None

    def note(self, token_id: int) -> None:
        """The next token is this one."""
        self.num_outputs += 1
        if self.output_counts_V is not None:
            self.output_counts_V[token_id] += 1
        if self.last_token_ids is not None:
            self.last_token_ids.append(token_id)


class Sampler:
    """The sampling state of all running requests, and the choice of their next tokens.

    constraints: None where no request has any.
    """

    def __init__(
        self,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        device: torch.device,
        constraints: Constraints | None = None,
    ) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._device = device
        self._constraints = constraints
        self._draw = Draw(vocab_size, device)
        self._states: dict[str, SamplingState] = {}

    def start(self, request: StartedRequest) -> None:
        """Creates the state of a request that begins, or comes back with some of its output known."""
        state = SamplingState(request.sampling, num_outputs=len(request.output_token_ids))
        params = request.sampling
        if (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1.0, 0.0, 0.0):
            counts = [torch.tensor(ids, dtype=torch.int64, device=self._device).bincount(minlength=self._vocab_size)
                      for ids in (request.prompt_token_ids, request.output_token_ids)]  # fmt: skip
            state.prompt_mask_V, state.output_counts_V = counts[0] > 0, counts[1]
        if params.allowed_token_ids is not None:
            state.forbidden_V = torch.ones(self._vocab_size, dtype=torch.bool, device=self._device)
            state.forbidden_V[list(params.allowed_token_ids)] = False
        if params.bad_words:
            longest = max(map(len, params.bad_words)) - 1
            state.last_token_ids = deque(request.output_token_ids, maxlen=longest)
        if params.constraint is not None and not self._is_free(params, request.output_token_ids):
            assert self._constraints is not None
            state.constrained = self._constraints.start(request)
        self._states[request.request_id] = state

    def forget(self, request_id: str) -> None:
        """Drops a request's state; harmless when there is none."""
        self._states.pop(request_id, None)

    def sample(self, request_ids: Sequence[str], logits_NV: Tensor) -> list[SampledToken]:
        """The next token of each request, in order. logits_NV: float32, row i belongs to request_ids[i]."""
        with _one_thread():
            return self._sample(request_ids, logits_NV)

    def _sample(self, request_ids: Sequence[str], logits_NV: Tensor) -> list[SampledToken]:
        states = [self._states[request_id] for request_id in request_ids]
        logprobs = _log_probabilities(states, logits_NV)
        failures = [state.constrained.failure() if state.constrained else "" for state in states]
        chosen = self._choose(states, self._shape(states, logits_NV))
        tokens, moved = [], []
        for row, (request_id, token_id) in enumerate(zip(request_ids, chosen, strict=True)):
            state = states[row]
            if failures[row]:
                tokens.append(SampledToken(request_id, token_id, error=failures[row]))
                continue
            state.note(token_id)
            if state.constrained is not None:
                if self._is_free(state.params, (token_id,)):
                    state.constrained = None
                else:
                    moved.append((state.constrained, token_id))
            tokens.append(SampledToken(request_id, token_id, _report(state, logprobs.get(row), token_id)))
        if moved:
            assert self._constraints is not None
            self._constraints.advance(moved)
        return tokens

    def _is_free(self, params: SamplingParams, output_token_ids: Sequence[int]) -> bool:
        """Whether the output goes on behind what its constraint has ended. vLLM lets it be whatever it will."""
        return params.ignore_eos and not set(self._eos_token_ids).isdisjoint(output_token_ids)

    def _shape(self, states: list[SamplingState], logits_NV: Tensor) -> Tensor:
        """Logits with all applied that comes before the temperature: rows that ask for nothing are left alone."""
        given_NV, shaped = logits_NV, False
        for row, state in enumerate(states):
            params = state.params
            held_back = state.num_outputs < params.min_tokens
            rules = held_back or params.logit_bias or params.bad_words
            if not rules and state.output_counts_V is None and state.forbidden_V is None:
                continue
            if not shaped:  # the caller's logits stay as they are
                logits_NV, shaped = logits_NV.clone(), True
            if state.forbidden_V is not None:
                logits_NV[row].masked_fill_(state.forbidden_V, -torch.inf)
            if state.last_token_ids is not None:
                logits_NV[row, _completing(params.bad_words, [*state.last_token_ids])] = -torch.inf
            if held_back:
                logits_NV[row, [*self._eos_token_ids, *params.stop_token_ids]] = -torch.inf
            if params.logit_bias:
                biased = torch.tensor(list(params.logit_bias), device=logits_NV.device)
                logits_NV[row, biased] += torch.tensor(
                    list(params.logit_bias.values()), device=logits_NV.device
                )
            if state.output_counts_V is not None:
                logits_NV[row] = _penalised(state, logits_NV[row])
            if state.forbidden_V is not None and logits_NV[row].max() == -torch.inf:
                # The other rules leave nothing of what is allowed: they yield.
                logits_NV[row].masked_fill_(~state.forbidden_V, 0.0)
        rows = [row for row, state in enumerate(states) if state.constrained and not state.constrained.error]
        return self._bound(states, rows, logits_NV, given_NV) if rows else logits_NV

    def _bound(
        self, states: Sequence[SamplingState], rows: list[int], logits_NV: Tensor, given_NV: Tensor
    ) -> Tensor:
        """Logits in which these rows have only what their constraints allow; where the other rules leave nothing of it, of
        the given ones."""
        bitmasks = [bound.bitmask_W for row in rows if (bound := states[row].constrained)]
        forbidden_RV = forbidden(bitmasks, self._vocab_size, logits_NV.device)
        is_all = len(rows) == len(states)
        bound_RV = (logits_NV if is_all else logits_NV[rows]).masked_fill(forbidden_RV, -torch.inf)
        if logits_NV is not given_NV:
            stuck_R = bound_RV.amax(dim=-1) == -torch.inf
            if bool(stuck_R.any()):
                bound_RV[stuck_R] = given_NV[rows][stuck_R].masked_fill(forbidden_RV[stuck_R], -torch.inf)
        if is_all:
            return bound_RV
        logits_NV = logits_NV.clone() if logits_NV is given_NV else logits_NV
        logits_NV[rows] = bound_RV
        return logits_NV

    def _choose(self, states: list[SamplingState], logits_NV: Tensor) -> list[int]:
        """The token of each row: the likeliest, or where the temperature asks for it a drawn one."""
        drawn = [row for row, state in enumerate(states) if state.params.temperature >= GREEDY_TEMPERATURE]
        if not drawn:
            return likeliest(logits_NV).tolist()
        params = [states[row].params for row in drawn]
        uniforms = [uniform(states[row].params.seed, states[row].num_outputs) for row in drawn]
        if len(drawn) == len(states):
            return self._draw(logits_NV, params, uniforms).tolist()
        chosen_N = likeliest(logits_NV)
        chosen_N[drawn] = self._draw(logits_NV[drawn], params, uniforms)
        return chosen_N.tolist()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small operations, one after the other, while this machine's other processes send the last step's tokens on: a
    thread that finds its core taken holds up each of them for longer than it could save. Costs below a microsecond.

    The number is each thread's own, but a thread that computes for the first time meanwhile begins with one.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _completing(bad_words: Sequence[Sequence[int]], last_token_ids: list[int]) -> list[int]:
    """The tokens that would complete one of the words."""
    known = len(last_token_ids)
    return [
        last
        for *before, last in bad_words
        if len(before) <= known and last_token_ids[known - len(before) :] == before
    ]


def _penalised(state: SamplingState, logits_V: Tensor) -> Tensor:
    """Repetition penalty (arXiv 1909.05858) over prompt and output, then OpenAI's two over the output."""
    params, counts_V, prompt_mask_V = state.params, state.output_counts_V, state.prompt_mask_V
    assert counts_V is not None and prompt_mask_V is not None
    scale_V = torch.where(logits_V > 0, 1.0 / params.repetition_penalty, params.repetition_penalty)
    logits_V = torch.where(prompt_mask_V | (counts_V > 0), logits_V * scale_V, logits_V)
    return logits_V - params.frequency_penalty * counts_V - params.presence_penalty * (counts_V > 0)


def _log_probabilities(states: list[SamplingState], logits_NV: Tensor) -> dict[int, Tensor]:
    """Row -> its log-probabilities [V], for the rows whose requests report them."""
    rows = [row for row, state in enumerate(states) if state.params.logprobs is not None]
    return dict(zip(rows, logits_NV[rows].log_softmax(dim=-1), strict=True)) if rows else {}


def _report(state: SamplingState, logprobs_V: Tensor | None, token_id: int) -> TokenLogprobs | None:
    if logprobs_V is None:
        return None
    top: tuple[tuple[int, float], ...] = ()
    if state.params.logprobs:
        values, ids = logprobs_V.topk(min(state.params.logprobs, len(logprobs_V)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(float(logprobs_V[token_id]), top)
