"""The draw without sorting the vocabulary: token by token what the sorting reference gives, whatever the distribution."""

import random

import pytest
import torch

from afd_server.attention import draw as draw_module
from afd_server.attention.draw import Draw, likeliest
from afd_server.types import SamplingParams
from tests.unit.attention.sorted_draw import sorted_draw

DRAWS = 40
TRUNCATIONS = [
    {},
    {"top_p": 0.9},
    {"top_p": 0.9, "temperature": 0.2},
    {"top_p": 1e-9},
    {"top_p": 0.9999999},
    {"top_k": 1},
    {"top_k": 20, "top_p": 0.8, "temperature": 0.7},
    {"top_k": 700},  # more than there are blocks
    {"top_k": 10**9},  # more than there are tokens
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"min_p": 1e-6, "top_p": 0.95},
    {"min_p": 0.02, "top_k": 50, "top_p": 0.5, "temperature": 1.5},
]


def language_like(vocab_size, generator):
    """A few tokens far above the rest, as a language model's."""
    logits_V = torch.randn(vocab_size, generator=generator) * 2
    likely = torch.randperm(vocab_size, generator=generator)[:30]
    logits_V[likely] += torch.linspace(4, 14, len(likely))
    return logits_V


def tied(vocab_size, generator):
    """Few values, each shared by many tokens: every cut falls between equals."""
    return torch.randint(0, 4, (vocab_size,), generator=generator) * 1.5


def masked(vocab_size, generator):
    logits_V = language_like(vocab_size, generator)
    logits_V[torch.randperm(vocab_size, generator=generator)[: vocab_size - 3]] = -torch.inf
    return logits_V


DISTRIBUTIONS = {
    "language-like": language_like,
    "tied": tied,
    "masked": masked,
    "flat": lambda vocab_size, generator: torch.zeros(vocab_size),
    "nearly flat": lambda vocab_size, generator: torch.randn(vocab_size, generator=generator) * 0.01,
    "one certain": lambda vocab_size, generator: torch.zeros(vocab_size).index_fill(
        0, torch.tensor([5]), 200.0
    ),
}


def draw(logits_NV, params, uniforms):
    return Draw(logits_NV.shape[1], logits_NV.device)(logits_NV, params, uniforms)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("vocab_size", [50, 640, 5000])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_rows_of_any_params_draw_what_the_reference_draws(name, vocab_size):
    """All truncations in one batch, at random numbers from end to end of [0, 1)."""
    params = [SamplingParams(1, **truncation) for truncation in TRUNCATIONS]
    logits_NV = torch.stack([DISTRIBUTIONS[name](vocab_size, seeded(row)) for row in range(len(params))])
    numbers = random.Random(3)
    for number in range(DRAWS):
        uniforms = [(number + numbers.random()) / DRAWS for _ in params]
        expected = [
            sorted_draw(logits_V, each, value)[0]
            for logits_V, each, value in zip(logits_NV, params, uniforms, strict=True)
        ]
        assert draw(logits_NV, params, uniforms).tolist() == expected


@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
def test_rows_of_one_kind_share_a_sort(truncation):
    """As a server's default has it: every row the same truncation, each from a distribution of its own."""
    params = [SamplingParams(1, **truncation)] * len(DISTRIBUTIONS)
    logits_NV = torch.stack([make(4096, seeded(9)) for make in DISTRIBUTIONS.values()])
    for value in (0.0, 0.31, 0.77, 1 - 2**-53):
        expected = [sorted_draw(logits_V, params[0], value)[0] for logits_V in logits_NV]
        assert draw(logits_NV, params, [value] * len(params)).tolist() == expected


def test_the_smallest_and_the_largest_number_reach_the_ends_of_what_is_kept():
    logits_V = language_like(4096, seeded(1))
    for truncation in TRUNCATIONS:
        params = SamplingParams(1, **truncation)
        kept = sorted_draw(logits_V, params, 0.5)[1]
        ends = draw(torch.stack([logits_V] * 2), [params] * 2, [0.0, 1 - 2**-53]).tolist()
        if truncation:
            assert ends == [min(kept), max(kept)]
        assert set(ends) <= kept


@pytest.mark.parametrize("spoiled", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
def test_a_row_that_is_no_distribution_spoils_no_other(truncation, spoiled):
    params = [SamplingParams(1, **truncation)] * 3
    logits_NV = torch.stack([language_like(300, seeded(row)) for row in range(3)])
    expected = draw(logits_NV, params, [0.4] * 3).tolist()
    logits_NV[1] = spoiled
    first, middle, last = draw(logits_NV, params, [0.4] * 3).tolist()
    assert [first, last] == [expected[0], expected[2]]
    assert 0 <= middle < 300


def test_many_rows_are_taken_in_parts(monkeypatch):
    """The memory of one part serves the next one, and the next step."""
    params = [SamplingParams(1, **truncation) for truncation in TRUNCATIONS]
    logits_NV = torch.stack([language_like(300, seeded(row)) for row in range(len(params))])
    expected = draw(logits_NV, params, [0.6] * len(params)).tolist()
    monkeypatch.setattr(draw_module, "SCRATCH_BYTES", 5 * 320 * 4)
    in_parts = Draw(300, torch.device("cpu"))
    for _ in range(2):
        assert in_parts(logits_NV, params, [0.6] * len(params)).tolist() == expected


def test_a_likely_row_is_not_sorted(monkeypatch):
    """What the module is for: of a peaked row only the candidates are ever sorted."""
    widths, descending = [], draw_module._descending

    def noted(logits_GC):
        widths.append(logits_GC.shape[-1])
        return descending(logits_GC)

    monkeypatch.setattr(draw_module, "_descending", noted)
    logits_NV = torch.stack([language_like(49152, seeded(row)) for row in range(8)])
    draw(logits_NV, [SamplingParams(1, temperature=0.2, top_p=0.9)] * 8, [0.5] * 8)
    assert widths
    assert max(widths) < draw_module.FEW_CANDIDATES


def test_the_order_is_that_of_a_stable_sort():
    values = torch.tensor([0.0, -0.0, 1.5, -1.5, torch.inf, -torch.inf, 1e-40, -1e-40, 3e38, -3e38, 1.5, -1.5])
    rows = torch.stack([values, values.flip(0), values[torch.randperm(len(values), generator=seeded(4))]])
    assert torch.equal(draw_module._descending(rows), rows.sort(dim=-1, descending=True, stable=True).indices)


@pytest.mark.parametrize("vocab_size", [64, 100, 49152])
def test_the_likeliest_is_the_first_of_the_largest(vocab_size):
    logits_NV = torch.stack([make(vocab_size, seeded(2)) for make in DISTRIBUTIONS.values()])
    expected = [row.index(max(row)) for row in logits_NV.tolist()]
    assert likeliest(logits_NV).tolist() == expected
    assert likeliest(logits_NV[:1]).tolist() == expected[:1]
