"""The paper's tables: costs within 0.001 USD, measured throughput within 10 %."""

import pytest

from afd_server.planner import paper, paper_report


@pytest.mark.parametrize("name", paper.BUNDLED)
def test_the_cost_table(name):
    *attention, ffn = paper.COSTS[name]
    for context, published in zip(paper.CONTEXTS, attention, strict=True):
        ours = paper.costs(name, context)
        assert [ours[card].attention for card in paper.CARDS] == pytest.approx(published, abs=0.001)
        assert [ours[card].ffn for card in paper.CARDS] == pytest.approx(ffn, abs=0.001)


@pytest.mark.parametrize("name", paper.BUNDLED)
def test_the_best_deployment(name):
    ours = [paper.best_deployment(name, context).usd_per_mtok for context in paper.CONTEXTS]
    assert ours == pytest.approx(paper.BEST[name], abs=0.001)


def test_step_3_wants_two_kinds_of_cards():
    best = paper.best_deployment("step-3", 8192)
    assert (best.attention, best.ffn) == ("h20", "h800")


def test_the_smallest_sparsity():
    ours = [paper.sparsity(card) for card in paper.cards().values()]
    assert ours == pytest.approx([paper.SPARSITY[card] for card in paper.CARDS], abs=0.0005)


def test_what_was_measured_is_predicted_within_a_tenth():
    for row, ours in paper.measured_rows():
        assert ours.tokens_per_s_per_card == pytest.approx(row.tokens_per_s_per_card, rel=0.1), row.name
        assert ours.tpot_s <= paper.TPOT_S
        # The paper's batch is 6144.
        assert 5500 < ours.layout.requests * ours.layout.attention_workers < 6800


def test_the_report_has_every_table():
    text = "\n".join(paper_report.lines())
    for words in ("0.460 / 0.460", "0.129 / 0.129", "0.058 / 0.058", "4039 / "):
        assert words in text
