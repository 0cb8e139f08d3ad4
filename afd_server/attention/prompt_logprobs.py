"""The log-probabilities of a prompt's own tokens, each given those before it.

What lives here: from the last layer's rows to what is reported of them. What does not: which tokens those are (engine/), and
the log-probabilities of sampled tokens (sampler.py).

Shapes: M rows before the tokens, C of them at once, H hidden, V vocabulary, K most likely tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from afd_server.models.halves import AttentionHalf
from afd_server.types import PromptReport, TokenLogprobs

# A prompt's logits all at once would be gigabytes. These are 32 MiB.
MAX_LOGITS = 2**23


def prompt_logprobs(report: PromptReport, x_MH: Tensor, half: AttentionHalf) -> tuple[TokenLogprobs, ...]:
    """An entry for each token of the report. x_MH: the residual stream, as it ends, of the tokens before them."""
    entries: list[TokenLogprobs] = []
    num_rows = max(1, MAX_LOGITS // half.spec.vocab_size)
    for start in range(0, len(x_MH), num_rows):
        logits_CV = half.logits(x_MH[start : start + num_rows])
        entries += _entries(logits_CV, report.token_ids[start : start + num_rows], report.num_top)
    return tuple(entries)


def _entries(logits_CV: Tensor, token_ids: tuple[int, ...], num_top: int) -> list[TokenLogprobs]:
    logprobs_CV = logits_CV.log_softmax(dim=-1)
    own_C1 = logprobs_CV.gather(1, torch.tensor(token_ids, device=logits_CV.device)[:, None])
    ranks_C = 1 + (logprobs_CV > own_C1).sum(dim=-1)
    top_values_CK, top_ids_CK = logprobs_CV.topk(min(num_top, logprobs_CV.shape[1]))
    rows = zip(
        own_C1[:, 0].tolist(), top_ids_CK.tolist(), top_values_CK.tolist(), ranks_C.tolist(), strict=True
    )
    return [TokenLogprobs(own, tuple(zip(ids, values, strict=True)), rank) for own, ids, values, rank in rows]
