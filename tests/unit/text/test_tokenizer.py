import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from afd_server.checkpoints.default_model import afd_home, default_model
from afd_server.errors import ModelError
from afd_server.text.tokenizer import Tokenizer
from tests.unit.text.tiny_tokenizers import KINDS

SAMPLES = [
    "hello world",
    "  two  spaces\n\nand\ttabs",
    "wörld 🌍 你好",
    "12345",
    "a</s>b<s>",
    "",
    "def f(x):\n    return x",
]


def save(directory, kind, **config):
    KINDS[kind]().save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_a_batch_is_encoded_as_each_text_alone(tmp_path):
    tokenizer = Tokenizer.load(save(tmp_path, "byte-level"))
    texts = ["", "one", "two words", "drei W\u00f6rter hier"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def assert_equal_to_transformers(directory, texts):
    ours, theirs = Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
    for text in texts:
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False).input_ids
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "config", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True}]
)
def test_equals_transformers(tmp_path, kind, config):
    assert_equal_to_transformers(save(tmp_path, kind, **config), SAMPLES)


def test_equals_transformers_on_the_default_model():
    directory = default_model(afd_home())
    assert_equal_to_transformers(directory, [*SAMPLES, "<|im_start|>user\nHi<|im_end|>\n"])


def test_special_tokens_may_be_objects(tmp_path):
    save(tmp_path, "byte-level", eos_token={"content": "</s>", "__type": "AddedToken"})
    assert Tokenizer.load(tmp_path).special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)  # a busy machine is no failure
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_the_bytes_of_tokens_are_the_bytes_of_the_text(kind, text):
    tokenizer = Tokenizer(KINDS[kind]())
    spelled = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text, add_special_tokens=False)))
    assert spelled.decode().removeprefix(" " if kind == "sentence-piece" else "") == text


def test_ids_without_a_token_stand_for_nothing():
    tokenizer = Tokenizer(KINDS["byte-level"]())
    beyond = tokenizer.vocab_size + 5
    assert tokenizer.decode([beyond]) == tokenizer.token_text(beyond) == ""
    assert tokenizer.id_to_token(beyond) is None


def test_prompts_are_never_cut_or_filled_up(tmp_path):
    backend = KINDS["byte-level"]()
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.load(tmp_path).encode("hello world")) == len(
        KINDS["byte-level"]().encode("hello world").ids
    )


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_is_named(tmp_path, name):
    PreTrainedTokenizerFast(tokenizer_object=KINDS["byte-level"]()).save_pretrained(tmp_path)
    (tmp_path / name).write_text("{")
    with pytest.raises(ModelError, match=name):
        Tokenizer.load(tmp_path)
