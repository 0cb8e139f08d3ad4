"""Small tokenizers of the kinds that models come with."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors


def byte_level():
    """GPT-2's kind, with a few merges, so that tokens end inside characters and across words."""
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "w"), ("ð", "Ł"), ("â", "Ĥ"), ("Ã", "¶")]
    for pair in merges:
        vocabulary.setdefault("".join(pair), len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def sentence_piece():
    """Llama's kind: spaces are marked, what is not in the vocabulary falls back to bytes, a first space is dropped."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for token in ["\u2581", *"abcdefghijklmnopqrstuvwxyz", "\u2581h", "\u2581w"]:
        vocabulary[token] = len(vocabulary)
    merges = [("\u2581", "h"), ("\u2581", "w")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


KINDS = {"byte-level": byte_level, "sentence-piece": sentence_piece}
