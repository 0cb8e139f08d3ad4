"""Prompts of every dataset: their lengths, their order, and files that are none."""

import json
import random
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd_server.bench.dataset import DatasetSettings, TokenizedWords, Words, endless, prompts
from afd_server.errors import ConfigError


class Letters:
    """A tokenizer with a token for each letter and one before the text; spaces have none."""

    def encode(self, text):
        return [0, *(ord(letter) for letter in text if letter != " ")]

    def decode(self, token_ids):
        return "".join(map(chr, token_ids[1:]))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 12), st.integers(0, 40), st.integers(50, 900))
def test_two_counted_texts_tell_how_long_a_third_has_to_be(tokens_per_word, overhead, wanted):
    few, many = (8, 8 * tokens_per_word + overhead), (136, 136 * tokens_per_word + overhead)
    text = Words.counted(few, many).text(wanted, random.Random(0))
    assert abs(len(text.split()) * tokens_per_word + overhead - wanted) <= tokens_per_word


def test_a_server_that_counts_nothing_is_noticed():
    with pytest.raises(ValueError, match="8 words are 5 tokens"):
        Words.counted((8, 5), (136, 5))


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 300))
def test_with_a_tokenizer_lengths_are_exact(wanted):
    text = TokenizedWords(Letters()).text(wanted, random.Random(0))
    assert len(Letters().encode(text)) == wanted


def test_random_prompts_differ_have_their_lengths_and_come_again_by_seed():
    chosen = DatasetSettings(random_input_len=40, random_output_len=10, random_range_ratio=0.5)
    found = prompts(chosen, 200, 7, Words())
    assert found == prompts(chosen, 200, 7, Words())
    assert found != prompts(chosen, 200, 8, Words())
    assert len({prompt.text for prompt in found}) == 200
    lengths = {len(prompt.text.split()) for prompt in found}
    assert min(lengths) >= 20
    assert max(lengths) <= 60
    assert len(lengths) > 10
    assert all(5 <= prompt.output_tokens <= 15 for prompt in found)


@pytest.mark.parametrize("texts", [Words(), TokenizedWords(Letters())])
def test_a_prefix_is_shared_and_counted(texts):
    chosen = DatasetSettings(random_prefix_len=3, random_input_len=20, random_output_len=1)
    first, second = prompts(chosen, 2, 0, texts)
    shared = "".join(first.text.split())[:9]
    assert "".join(second.text.split()).startswith(shared)
    assert first.text != second.text
    if isinstance(texts, Words):
        assert len(first.text.split()) == 23


def written(tmp_path, content):
    file = tmp_path / "data.json"
    file.write_text(content)
    return file


def conversation(*turns):
    return {"conversations": [{"from": "human", "value": turn} for turn in turns]}


def test_sharegpt_asks_the_first_question_for_as_much_as_was_answered(tmp_path):
    content = [
        conversation("one two three", "four five"),
        conversation("alone"),
        {},
        conversation("ab", "short is left out"),
    ]
    chosen = DatasetSettings("sharegpt", written(tmp_path, json.dumps(content)))
    found = prompts(chosen, 3, 0, Words(), Letters())
    assert [(prompt.text, prompt.output_tokens) for prompt in found] == [
        ("one two three", 9)
    ] * 3  # oversampled


def test_sharegpt_needs_a_tokenizer_or_a_length(tmp_path):
    file = written(tmp_path, json.dumps([conversation("what is it", "nothing")]))
    with pytest.raises(ConfigError, match="--sharegpt-output-len"):
        prompts(DatasetSettings("sharegpt", file), 1, 0, Words())
    assert (
        prompts(DatasetSettings("sharegpt", file, sharegpt_output_len=5), 1, 0, Words())[0].output_tokens == 5
    )


def test_custom_lines_in_their_order_or_shuffled(tmp_path):
    lines = "\n".join(json.dumps({"prompt": str(number), "output_tokens": number + 1}) for number in range(30))
    file = written(tmp_path, lines + "\n\n")
    kept = prompts(DatasetSettings("custom", file, custom_output_len=-1, disable_shuffle=True), 40, 0, Words())
    assert [prompt.text for prompt in kept] == [str(number % 30) for number in range(40)]
    assert kept[4].output_tokens == 5
    shuffled = prompts(DatasetSettings("custom", file, no_oversample=True), 40, 0, Words())
    assert [prompt.text for prompt in shuffled] != [str(number) for number in range(30)]
    assert sorted(prompt.text for prompt in shuffled) == sorted(str(number) for number in range(30))
    assert {prompt.output_tokens for prompt in shuffled} == {256}


def test_a_trace_gives_times_and_lengths(tmp_path):
    file = written(tmp_path, "Timestamp,Request tokens,Response tokens\n10,5,2\n12,7,3\n")
    chosen = DatasetSettings("burstgpt", file)
    found = prompts(chosen, 10, 0, Words())
    assert [(prompt.at_s, len(prompt.text.split()), prompt.output_tokens) for prompt in found] == [
        (0, 5, 2),
        (2, 7, 3),
    ]
    assert len(list(islice(endless(chosen, 0, Words()), 5))) == 2


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("sharegpt", "{", "is not JSON"),
        ("sharegpt", "[]", "no conversation"),
        ("custom", "nonsense", "line 1: is not JSON"),
        ("custom", '{"prompt": 3}', 'line 1 has no "prompt"'),
        ("custom", "[]", 'line 1 has no "prompt"'),
        ("custom", "\n", "is empty"),
        ("azure", "a,b\n", "has neither"),
    ],
)
def test_a_file_that_is_no_such_dataset_is_named(tmp_path, name, content, words):
    with pytest.raises(ConfigError, match=r"data\.json: .*" + words):
        prompts(DatasetSettings(name, written(tmp_path, content)), 1, 0, Words(), Letters())


def test_a_line_without_a_length_is_named_where_it_is_asked_for(tmp_path):
    file = written(tmp_path, '{"prompt": "a", "output_tokens": 1}\n{"prompt": "b"}')
    with pytest.raises(ConfigError, match='line 2 has no "output_tokens"'):
        prompts(DatasetSettings("custom", file, custom_output_len=-1), 1, 0, Words())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dataset_name": "sonnet"}, "--dataset-name: 'sonnet' is none of random, sharegpt"),
        ({"dataset_name": "azure"}, "--dataset-path"),
        ({"random_input_len": 0}, "--random-input-len"),
        ({"random_output_len": 0}, "--random-output-len"),
        ({"random_range_ratio": 1.0}, "--random-range-ratio"),
    ],
)
def test_settings_that_contradict_are_named(options, words):
    with pytest.raises(ConfigError, match=words):
        DatasetSettings(**options)
