"""What the GPU's operations compute, by torch's own operations, and by none that asks the device: for tests of graphs on a CPU."""

import torch
import torch.nn.functional as F

from afd_server.models.operations import TorchExperts, TorchOperations

NUM_BLOCKS = 16  # of a request, at most


class EveryExpert(TorchExperts):
    """All experts for all rows, most of them with weight 0."""

    def forward(self, x_TH, topk_ids, topk_weights, out=None):
        y_TH = torch.zeros(x_TH.shape)
        for index, (gate_up, down) in enumerate(zip(self._gate_up, self._down, strict=True)):
            weight_T = torch.where(topk_ids == self._first_expert + index, topk_weights, 0.0).sum(1)
            gate, up = F.linear(x_TH, gate_up).chunk(2, dim=-1)
            y_TH += F.linear(F.silu(gate) * up, down).to(torch.float32) * weight_T[:, None]
        return y_TH if out is None else out.copy_(y_TH)


class CapturableOperations(TorchOperations):
    capturable = True

    def attend(self, query_TNK, cache, batch, scale, value_dim):
        if len(batch.lengths) != len(query_TNK):
            return super().attend(query_TNK, cache, batch, scale, value_dim)
        # One width for all, since how many numbers are summed up changes how the sum is rounded.
        tables = F.pad(batch.block_tables, (0, NUM_BLOCKS - batch.block_tables.shape[1]))
        entries = cache[tables.long()].flatten(1, 2)
        keys, values = entries.unbind(2) if cache.dim() == 5 else (entries[:, :, None], entries[:, :, None])
        query_TGMK = query_TNK.unflatten(1, (keys.shape[2], -1))
        scores = torch.einsum("tgmk,tlgk->tgml", query_TGMK, keys) * scale
        seen = torch.arange(keys.shape[1]) < batch.lengths[:, None]
        weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).nan_to_num(0.0)
        return torch.einsum("tgml,tlgv->tgmv", weights, values).flatten(1, 2)[..., :value_dim]

    def experts(self, gate_up, down, first_expert):
        return EveryExpert(gate_up, down, first_expert)
