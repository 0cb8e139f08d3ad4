"""The table of cards: every number has a source, a user's file adds to it, and what is wrong is named."""

import pytest
import yaml

from afd_server.errors import ConfigError
from afd_server.planner.hardware import NUMBERS, choose, read_hardware

CARD = {
    "usd_per_hour": 1,
    "flops": {"bfloat16": 1e14},
    "bytes_per_s": 1e12,
    "memory_bytes": 8e10,
    "network_gbps": 100,
}


def test_every_number_has_a_source():
    cards = read_hardware()
    assert {
        "h800",
        "h20",
        "a800",
        "910b",
        "h100",
        "h200",
        "b200",
        "l20",
        "l40s",
        "rtx-4090",
        "rtx-5090",
        "mi300x",
    } < set(cards)
    for card in cards.values():
        assert set(card.sources) == {*NUMBERS, "flops"}, card.name


def test_a_type_that_a_card_lacks_is_computed_in_the_next_larger_one():
    cards = read_hardware()
    assert cards["a800"].flop_per_s("fp8") == cards["a800"].flops["bfloat16"]
    assert cards["h800"].flop_per_s("fp8") == 1.98e15


def test_a_users_file_adds_and_replaces(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"Mine": CARD, "h20": {**CARD, "usd_per_hour": 9}}))
    cards = read_hardware(path, network_gbps=50)
    assert cards["mine"].usd_per_hour == 1
    assert cards["h20"].usd_per_hour == 9
    assert {card.network_gbps for card in cards.values()} == {50}


def test_names_are_found_however_they_are_written():
    assert list(choose(read_hardware(), ["RTX 4090", "H800"])) == ["rtx-4090", "h800"]
    with pytest.raises(ConfigError, match=r"unknown card 'h8000' \(did you mean h800\?"):
        choose(read_hardware(), ["h8000"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda card: card.pop("bytes_per_s"), "bytes_per_s is missing"),
        (lambda card: card.update(price=1), "price is unknown"),
        (lambda card: card.update(usd_per_hour=0), "usd_per_hour: is 0"),
        (lambda card: card.update(usd_per_hour="free"), "usd_per_hour: is 'free'"),
        (lambda card: card.update(flops={"int3": 1}), "flops is"),
        (lambda card: card.update(flops={}), "flops is"),
    ],
)
def test_what_is_wrong_with_a_card_is_named(tmp_path, change, says):
    card = dict(CARD)
    change(card)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"mine": card}))
    with pytest.raises(ConfigError, match=f"mine.*{says}"):
        read_hardware(path)


@pytest.mark.parametrize("content", ["", "[]", "a: [1", "mine: 3"])
def test_what_is_no_table_is_refused(tmp_path, content):
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        read_hardware(tmp_path / "mine.yaml")
