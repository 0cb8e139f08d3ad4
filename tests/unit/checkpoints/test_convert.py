"""A GGUF file and the directory made of it are the same model and the same tokenizer."""

import json
import stat

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from afd_server.checkpoints.convert import convert, log
from afd_server.errors import ConfigError, ModelError
from tests.unit.checkpoints.gguf_file import vocabulary, write_gguf


def logits(model):
    with torch.no_grad():
        return model(torch.arange(100, 140)[None]).logits


@pytest.mark.parametrize("tied", [True, False])
def test_the_directory_holds_the_model_of_the_file(tmp_path, tied):
    original = write_gguf(tmp_path / "tiny.gguf", tied=tied)
    convert(tmp_path / "tiny.gguf", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja",
    }  # fmt: skip
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.config.tie_word_embeddings is tied
    torch.testing.assert_close(logits(model), logits(original), rtol=1e-5, atol=1e-5)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_bfloat16_is_written_on_request(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    convert(tmp_path, tmp_path / "out", dtype="bfloat16")  # a directory with a single .gguf file will do
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_text_is_cut_at_every_digit_as_smollm_wants_it(tmp_path):
    """Two spaces before a digit are one token: the digit is cut off first. Without that rule, " 5" would be."""
    write_gguf(tmp_path / "tiny.gguf")
    convert(tmp_path / "tiny.gguf", tmp_path / "out")
    tokens = vocabulary()
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    ids = tokenizer.encode("<|im_start|>cd  5 ab<|im_end|>").ids
    assert [tokens[i] for i in ids] == ["<|im_start|>", "cd", "ĠĠ", "5", "Ġab", "<|im_end|>"]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("<|im_start|>cd  5 ab<|im_end|>").input_ids == ids
    assert theirs.decode(ids) == "<|im_start|>cd  5 ab<|im_end|>"
    assert theirs.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == (
        "<|im_start|>ab<|im_end|>"
    )


def test_a_plain_gpt2_rule_is_left_as_it_is(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", pre="gpt-2")
    convert(tmp_path / "tiny.gguf", tmp_path / "out")
    tokens = vocabulary()
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert [tokens[i] for i in tokenizer.encode("cd  5").ids] == ["cd", "Ġ", "Ġ", "5"]


@pytest.mark.parametrize(("rule", "warned"), [("qwen2", True), ("smollm", False), ("gpt-2", False)])
def test_an_unknown_rule_is_told_on_the_terminal(tmp_path, monkeypatch, capsys, rule, warned):
    monkeypatch.setattr(log, "propagate", False)  # as in the command, where nothing has set logging up
    write_gguf(tmp_path / "tiny.gguf", pre=rule)
    convert(tmp_path / "tiny.gguf", tmp_path / "out")
    assert (f"pre-tokenizer '{rule}'" in capsys.readouterr().err) is warned


@pytest.mark.parametrize(("end_of_turn", "ids"), [(None, 2), (2, 2), (3, [2, 3])])
def test_the_end_of_a_turn_ends_an_answer_too(tmp_path, end_of_turn, ids):
    write_gguf(tmp_path / "tiny.gguf", end_of_turn=end_of_turn)
    convert(tmp_path / "tiny.gguf", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == ids


def test_the_directory_can_be_read_by_others(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    convert(tmp_path / "tiny.gguf", tmp_path / "out")
    others = (tmp_path / "tiny.gguf").stat().st_mode & stat.S_IROTH
    assert {path.stat().st_mode & stat.S_IROTH for path in (tmp_path / "out").iterdir()} == {others}


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"nothing\.gguf: no such file"):
        convert(tmp_path / "nothing.gguf", tmp_path / "out")


def test_several_files_in_a_directory_are_not_guessed_between(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"2 \.gguf files"):
        convert(tmp_path, tmp_path / "out")


def test_another_kind_of_file_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04 a zip file")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        convert(tmp_path / "model.gguf", tmp_path / "out")


def test_a_damaged_file_leaves_nothing_behind(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    whole = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"tiny\.gguf: cannot be read"):
        convert(tmp_path / "tiny.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_what_is_in_out_is_not_touched(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    write_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(ConfigError, match=r"OUT.*not empty"):
        convert(tmp_path / "tiny.gguf", tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_an_unknown_dtype_is_refused_by_its_flag(tmp_path):
    with pytest.raises(ConfigError, match="--dtype"):
        convert(tmp_path / "tiny.gguf", tmp_path / "out", dtype="float16")
