"""The draw as it is defined, one row at a time, with the whole vocabulary sorted: the reference of attention/draw.py."""

import torch


def sorted_draw(logits_V, params, uniform):
    """The token of one row, and the ids of all that its truncations keep."""
    scaled_V = logits_V / torch.tensor([params.temperature])
    probabilities_V = scaled_V.softmax(-1).double()
    if params.min_p:
        likely_V = scaled_V >= scaled_V.max() + torch.tensor(params.min_p).log()
        probabilities_V = probabilities_V.where(likely_V, 0.0)
    order_V = scaled_V.argsort(descending=True, stable=True)
    sorted_V = probabilities_V[order_V]
    if params.top_k:
        sorted_V[params.top_k :] = 0.0
    mass_V = sorted_V.cumsum(0)
    if params.top_p < 1.0:
        whole = mass_V[-1] if params.top_k or params.min_p else 1.0
        beyond_V = mass_V - sorted_V >= params.top_p * whole
        beyond_V[0] = False
        sorted_V[beyond_V] = 0.0
    kept_V = torch.zeros_like(sorted_V).scatter(0, order_V, sorted_V)
    cumulative_V = kept_V.cumsum(0)
    token = torch.searchsorted(cumulative_V, uniform * cumulative_V[-1:], right=True)
    return int(token), set(kept_V.nonzero()[:, 0].tolist())
