"""The attention kernel against a softmax written out in float64, request by request."""

import pytest
import torch

from afd_server.kernels.attention import paged_attention


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


BLOCK_SIZE = 4


class Requests:
    """Requests of (rows, length) with their blocks scattered over a cache."""

    def __init__(self, shapes, entry_shape, dtype=torch.float32):
        blocks = [-(-length // BLOCK_SIZE) for _, length in shapes]
        order = torch.randperm(sum(blocks) + 3, generator=torch.Generator().manual_seed(7)).tolist()
        self.shapes = shapes
        self.tables = [[order.pop() for _ in range(count)] for count in blocks]
        self.cache = random(sum(blocks) + 3, BLOCK_SIZE, *entry_shape, seed=1).to(dtype)
        self.num_rows = sum(rows for rows, _ in shapes)

    def tensors(self):
        starts = torch.tensor([0, *[rows for rows, _ in self.shapes]]).cumsum(0).to(torch.int32)
        tables = torch.zeros(len(self.tables), max(map(len, self.tables)), dtype=torch.int32)
        for request, table in enumerate(self.tables):
            tables[request, : len(table)] = torch.tensor(table)
        lengths = torch.tensor([length for _, length in self.shapes], dtype=torch.int32)
        return {"row_starts": starts, "lengths": lengths, "block_tables": tables}

    def entries(self, request):
        """Of one request, in order, in float64."""
        length = self.shapes[request][1]
        return self.cache[self.tables[request]].flatten(0, 1)[:length].double()


def reference(query, requests, scale, value_dim):
    """[T, N, value_dim]: every row over the keys and values up to its own."""
    outputs, start = [], 0
    for index, (rows, length) in enumerate(requests.shapes):
        entries = requests.entries(index)
        for row in range(rows):
            seen = entries[: length - rows + row + 1]
            if seen.dim() == 4:
                shared_by = query.shape[1] // seen.shape[2]
                keys, values = (part.repeat_interleave(shared_by, dim=1) for part in seen.unbind(1))
            else:
                keys = seen[:, None].expand(-1, query.shape[1], -1)
                values = keys[..., :value_dim]
            scores = torch.einsum("nk,lnk->nl", query[start + row].double(), keys) * scale
            outputs.append(torch.einsum("nl,lnk->nk", scores.softmax(-1), values))
        start += rows
    return torch.stack(outputs).float()


SHAPES = [
    pytest.param([(1, 1)], id="one-token"),
    pytest.param([(1, 5), (1, 64), (1, 33), (1, 100)], id="decoding"),
    pytest.param([(7, 7), (40, 90)], id="chunks"),
    pytest.param([(1, 17), (13, 45), (1, 3)], id="both"),
]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize(("heads", "groups", "dim"), [(4, 4, 16), (8, 2, 64), (6, 1, 20), (3, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values(instruction_set, shapes, heads, groups, dim, dtype):
    requests = Requests(shapes, (2, groups, dim), dtype)
    query = random(requests.num_rows, heads, dim)
    output = paged_attention(
        query, requests.cache, **requests.tensors(), scale=0.3, value_dim=dim, instruction_set=instruction_set
    )
    torch.testing.assert_close(output, reference(query, requests, 0.3, dim), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize(("rank", "rope"), [(32, 16), (20, 5)])
def test_latent_entries(instruction_set, shapes, rank, rope):
    requests = Requests(shapes, (rank + rope,))
    query = random(requests.num_rows, 18, rank + rope)
    output = paged_attention(
        query, requests.cache, **requests.tensors(), scale=0.2, value_dim=rank, instruction_set=instruction_set
    )
    torch.testing.assert_close(output, reference(query, requests, 0.2, rank), rtol=1e-4, atol=1e-4)


def test_large_scores_do_not_overflow(instruction_set):
    requests = Requests([(1, 50)], (2, 1, 16))
    query = random(1, 2, 16) * 1e3
    output = paged_attention(
        query, requests.cache, **requests.tensors(), scale=1.0, value_dim=16, instruction_set=instruction_set
    )
    torch.testing.assert_close(output, reference(query, requests, 1.0, 16), rtol=1e-4, atol=1e-4)


def test_a_prompt_cut_into_chunks_gives_the_same_bits(instruction_set):
    whole = Requests([(70, 70)], (2, 2, 32))
    query = random(70, 4, 32)
    expected = paged_attention(
        query, whole.cache, **whole.tensors(), scale=0.2, value_dim=32, instruction_set=instruction_set
    )
    for first, last in ((0, 21), (21, 22), (22, 70)):
        tensors = whole.tensors() | {
            "row_starts": torch.tensor([0, last - first], dtype=torch.int32),
            "lengths": torch.tensor([last], dtype=torch.int32),
        }
        part = paged_attention(
            query[first:last], whole.cache, **tensors, scale=0.2, value_dim=32, instruction_set=instruction_set
        )
        assert torch.equal(part, expected[first:last])


def test_heads_may_be_parts_of_wider_rows(instruction_set):
    requests = Requests([(2, 9)], (2, 1, 16))
    wide = random(2, 5, 16)
    options = {"scale": 0.2, "value_dim": 16, "instruction_set": instruction_set, **requests.tensors()}
    parts = paged_attention(wide[:, :3], requests.cache, **options)
    assert torch.equal(parts, paged_attention(wide[:, :3].contiguous(), requests.cache, **options))
