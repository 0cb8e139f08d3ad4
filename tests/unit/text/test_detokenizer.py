import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd_server.text.detokenizer import REPLACEMENT, Detokenizer, StopStrings
from afd_server.text.tokenizer import Tokenizer
from tests.unit.text.tiny_tokenizers import KINDS, byte_level, sentence_piece

TOKENIZERS = {kind: Tokenizer(make()) for kind, make in KINDS.items()}
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581" + REPLACEMENT), min_size=1)


def streamed(tokenizer, ids, prompt=(), **options):
    detokenizer = Detokenizer(tokenizer, prompt, **options)
    return [*(detokenizer.add(token_id) for token_id in ids), detokenizer.flush()]


def random_cut(text, rng):
    """Token ids of the byte-level tokenizer that spell `text`, cut at random: tokens need not be those of `encode`."""
    tokenizer, ids, rest = TOKENIZERS["byte-level"], [], text.encode()
    spelled = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size) if not tokenizer.is_added(i)}
    while rest:
        fitting = [piece for piece in spelled if rest.startswith(piece)]
        piece = rng.choice(fitting)
        ids.append(spelled[piece])
        rest = rest[len(piece) :]
    return ids


@settings(deadline=None)  # a busy machine is no failure
@given(TEXTS, st.randoms(use_true_random=False))
def test_any_cut_of_any_text_streams_to_the_same_text(text, rng):
    pieces = streamed(TOKENIZERS["byte-level"], random_cut(text, rng))
    assert "".join(pieces) == text
    assert not any(REPLACEMENT in piece for piece in pieces)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(deadline=None)  # a busy machine is no failure
@given(text=TEXTS, prompt=TEXTS)
def test_a_stream_is_what_decoding_all_at_once_gives(kind, text, prompt):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)
    before = tokenizer.encode(prompt)
    assert (
        "".join(streamed(tokenizer, ids, before))
        == tokenizer.decode([*before, *ids])[len(tokenizer.decode(before)) :]
    )


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(deadline=None)  # a busy machine is no failure
@given(text=TEXTS, data=st.data())
def test_a_character_that_the_prompt_began_is_completed(kind, text, data):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)
    cut = data.draw(st.integers(0, len(ids)))
    output = "".join(streamed(tokenizer, ids[cut:], ids[:cut]))
    assert REPLACEMENT not in output
    assert tokenizer.decode(ids).endswith(output)
    if kind == "byte-level":  # the other kind spoils whole words around a broken character
        assert tokenizer.decode(ids[:cut]).rstrip(REPLACEMENT) + output == tokenizer.decode(ids)


def test_the_first_word_keeps_its_space():
    tokenizer = Tokenizer(sentence_piece())
    ids = tokenizer.encode("h w", add_special_tokens=False)
    assert streamed(tokenizer, ids[1:], ids[:1]) == [" w", ""]


def test_a_broken_end_is_shown_when_there_is_no_more():
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer.encode("a🌍")
    assert streamed(tokenizer, ids[:-1])[-1] == REPLACEMENT


def test_the_window_stays_small_whatever_comes():
    """Broken bytes, ignored end tokens without text, ids of a padded embedding: none may make later tokens slower."""
    tokenizer = TOKENIZERS["byte-level"]
    broken, end = tokenizer.encode("🌍")[-1], tokenizer.encode("</s>")[0]
    lengths = []

    class Watched:
        is_special, is_added, id_to_token = tokenizer.is_special, tokenizer.is_added, tokenizer.id_to_token

        def decode(self, ids, skip_special_tokens):
            lengths.append(len(ids))
            return tokenizer.decode(ids, skip_special_tokens)

    text = "".join(streamed(Watched(), [broken] * 500 + [end] * 500 + [tokenizer.vocab_size] * 500))
    assert text == REPLACEMENT * 500
    assert max(lengths) <= 32


def test_special_tokens_are_skipped_or_shown():
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer.encode("hello</s> world")
    assert "".join(streamed(tokenizer, ids)) == "hello world"
    assert "".join(streamed(tokenizer, ids, skip_special_tokens=False)) == "hello</s> world"


def test_spaces_between_special_tokens():
    backend = byte_level()
    backend.decoder = None  # then tokens are joined by spaces
    tokenizer = Tokenizer(backend)
    ids = tokenizer.encode("<s></s>")
    shown = [
        "".join(streamed(tokenizer, ids, skip_special_tokens=False, spaces_between_special_tokens=spaces))
        for spaces in (True, False)
    ]
    assert shown == ["<s> </s>", "<s></s>"]


# --- stop strings --------------------------------------------------------------------------------------------------


def first_complete(text, stops):
    """(text before the stop string that is complete first, that string), letter by letter."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


def cut_at_random(text, seed):
    rng = random.Random(seed)
    while text:
        length = rng.randint(1, len(text))
        yield text[:length]
        text = text[length:]


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.text("ab", max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.integers(),
    st.booleans(),
)
def test_stop_strings_at_any_border(text, stops, seed, include):
    stop, given_out = StopStrings(stops, include=include), ""
    for piece in cut_at_random(text, seed):
        given_out += stop.feed(piece)
        if stop.found is not None:
            break
    else:
        given_out += stop.flush()
    before, found = first_complete(text, stops)
    assert stop.found == found
    assert given_out == before + (found if include and found else "")


def test_only_what_may_become_a_stop_string_is_held_back():
    stop = StopStrings(["END", "\n\n"])
    assert [stop.feed(piece) for piece in ["a\n", "bE", "N", "x", "E"]] == ["a", "\nb", "", "ENx", ""]
    assert stop.flush() == "E"


def test_a_stop_string_before_the_minimum_does_not_count():
    stop = StopStrings(["ab"])
    text = stop.feed("xab", may_stop=False) + stop.feed("a", may_stop=False) + stop.feed("b")
    assert (text, stop.found) == ("xab", "ab")


def test_what_did_not_count_does_not_count_later():
    stop = StopStrings(["abab", "b"])
    text = stop.feed("a", may_stop=False) + stop.feed("b", may_stop=False) + stop.feed("x") + stop.flush()
    assert (text, stop.found) == ("abx", None)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_special_tokens_that_are_kept(kind):
    """A mark that is a special token shows; other special tokens do not, nor does the prompt's."""
    backend = KINDS[kind]()
    backend.add_special_tokens(["[CALL]"])
    tokenizer = Tokenizer(backend)
    kept = tokenizer.special_ids(["[CALL]", "no token"])
    assert kept == {tokenizer.vocab_size - 1}
    ids = tokenizer.encode("ab[CALL]c</s>", add_special_tokens=False)
    prompt = tokenizer.encode("<s>hi [CALL]", add_special_tokens=False)
    assert "".join(streamed(tokenizer, ids, prompt)).replace(" ", "") == "abc"
    assert "".join(streamed(tokenizer, ids, prompt, kept_special=kept)).replace(" ", "") == "ab[CALL]c"
