"""What the requests of a run ask for: prompts and numbers of tokens. Nothing here knows a server or a clock.

    random            words drawn at random, of a given length
    sharegpt          the first question of each conversation of a ShareGPT file, and the length of its answer
    custom            one JSON object to a line: "prompt", and "output_tokens" if one likes
    azure, burstgpt   times and lengths of a trace (afd_server/traffic.py), words drawn at random

A text is made to a number of tokens by a tokenizer, or, where there is none, by what the server has counted for two texts of
known numbers of words (Words).
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from afd_server.errors import ConfigError
from afd_server.traffic import length_between, read_trace

WORDS = (
    "stone", "river", "light", "seven", "market", "green", "paper", "window", "cloud", "engine", "north", "silver",
)  # fmt: skip
TRACES = ("azure", "burstgpt")
NAMES = ("random", "sharegpt", "custom", *TRACES)
# What vLLM's benchmark leaves out of ShareGPT: exchanges that are too short or too long to say much.
LEAST_TOKENS, MOST_PROMPT_TOKENS, MOST_TOKENS = 4, 1024, 2048
MAX_TRIMS = 8


@dataclass(frozen=True, slots=True)
class Prompt:
    """What one request says, and how many tokens it asks for. at_s: when a trace sends it."""

    text: str
    output_tokens: int
    at_s: float = 0.0


class Counts(Protocol):
    """What a tokenizer of afd_server/text does."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...


def words(count: int, generator: random.Random) -> str:
    return " ".join(generator.choices(WORDS, k=count))


@dataclass(frozen=True)
class Words:
    """Texts of about a number of tokens. tokens_per_word, overhead_tokens: as the server counts."""

    tokens_per_word: float = 1.0
    overhead_tokens: float = 0.0

    @classmethod
    def counted(cls, few: tuple[int, int], many: tuple[int, int]) -> Words:
        """From two texts' numbers of words and of tokens."""
        tokens_per_word = (many[1] - few[1]) / (many[0] - few[0])
        if tokens_per_word <= 0:
            raise ValueError(f"{few[0]} words are {few[1]} tokens, and {many[0]} words {many[1]}")
        return cls(tokens_per_word, few[1] - tokens_per_word * few[0])

    def text(self, tokens: int, generator: random.Random, prefix: str = "") -> str:
        count = round((tokens - self.overhead_tokens) / self.tokens_per_word) - len(prefix.split())
        return prefix + words(max(1, count), generator)


@dataclass(frozen=True)
class TokenizedWords:
    """Texts of exactly a number of tokens where the tokenizer allows it, else the nearest that some trims find."""

    tokenizer: Counts

    def text(self, tokens: int, generator: random.Random, prefix: str = "") -> str:
        text = prefix + words(tokens, generator)
        for _ in range(MAX_TRIMS):
            token_ids = self.tokenizer.encode(text)
            if len(token_ids) <= tokens:
                break
            text = self.tokenizer.decode(token_ids[:tokens])
        return text


Texts = Words | TokenizedWords


@dataclass(frozen=True)
class DatasetSettings:
    """The options of the command line that are about datasets, under their names there."""

    dataset_name: str = "random"
    dataset_path: Path | None = None
    random_input_len: int = 1024
    random_output_len: int = 128
    random_range_ratio: float = 0.0
    random_prefix_len: int = 0  # words that all prompts begin with, about as many tokens
    sharegpt_output_len: int | None = None
    custom_output_len: int = 256
    no_oversample: bool = False
    disable_shuffle: bool = False

    def __post_init__(self) -> None:
        if self.dataset_name not in NAMES:
            raise ConfigError("--dataset-name", f"{self.dataset_name!r} is none of {', '.join(NAMES)}")
        if self.dataset_name != "random" and self.dataset_path is None:
            raise ConfigError("--dataset-path", f"--dataset-name {self.dataset_name} needs a file")
        for name in ("random_input_len", "random_output_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')}", "must be at least 1")
        if self.random_prefix_len < 0:
            raise ConfigError("--random-prefix-len", "must be at least 0")
        if self.custom_output_len < 1 and self.custom_output_len != -1:
            raise ConfigError("--custom-output-len", "must be at least 1, or -1")
        if not 0 <= self.random_range_ratio < 1:
            raise ConfigError("--random-range-ratio", "must be at least 0 and less than 1")

    @property
    def needs_texts(self) -> bool:
        """Whether prompts are made to a length."""
        return self.dataset_name in ("random", *TRACES)


def prompts(
    settings: DatasetSettings, count: int, seed: int | str, texts: Texts, tokenizer: Counts | None = None
) -> list[Prompt]:
    """The prompts of a run; the same seed gives the same ones. Raises ConfigError naming a file that is no such dataset."""
    return list(itertools.islice(endless(settings, seed, texts, tokenizer, most=count), count))


def endless(
    settings: DatasetSettings,
    seed: int | str,
    texts: Texts,
    tokenizer: Counts | None = None,
    most: int | None = None,
) -> Iterator[Prompt]:
    """Prompts for as long as they are asked for. A file is gone through again and again, but for traces and --no-oversample.

    most: a trace's rows beyond are not read. Raises ConfigError at once, not when the first prompt is taken.
    """
    generator = random.Random(seed)
    if settings.dataset_name == "random":
        return _random(settings, generator, texts)
    path = settings.dataset_path
    assert path is not None
    if settings.dataset_name in TRACES:
        arrivals = read_trace(path, most)
        return (Prompt(texts.text(a.prompt_tokens, generator), a.output_tokens, a.at_s) for a in arrivals)
    if settings.dataset_name == "sharegpt":
        found = _sharegpt(path, settings.sharegpt_output_len, tokenizer)
    else:
        found = _custom(path, settings.custom_output_len)
    if not settings.disable_shuffle:
        generator.shuffle(found)
    return iter(found) if settings.no_oversample else itertools.cycle(found)


def _random(settings: DatasetSettings, generator: random.Random, texts: Texts) -> Iterator[Prompt]:
    prefix = f"{words(settings.random_prefix_len, generator)} " if settings.random_prefix_len else ""
    while True:
        ratio = settings.random_range_ratio
        input_tokens = length_between(settings.random_input_len, ratio, generator)
        output_tokens = length_between(settings.random_output_len, ratio, generator)
        yield Prompt(texts.text(settings.random_prefix_len + input_tokens, generator, prefix), output_tokens)


def _sharegpt(path: Path, output_tokens: int | None, tokenizer: Counts | None) -> list[Prompt]:
    if tokenizer is None and output_tokens is None:
        raise ConfigError("--tokenizer", "needed to count the answers of --dataset-name sharegpt",
                          "or give --sharegpt-output-len")  # fmt: skip
    found = []
    for entry in _json(path, _read(path)):
        turns = entry.get("conversations", []) if isinstance(entry, dict) else []
        try:
            question, answer = (str(turn["value"]) for turn in turns[:2])
        except (TypeError, LookupError, ValueError):
            continue
        wanted = output_tokens
        if tokenizer is not None:
            asked = len(tokenizer.encode(question))
            wanted = wanted or len(tokenizer.encode(answer))
            short = asked < LEAST_TOKENS or wanted < LEAST_TOKENS
            if short or asked > MOST_PROMPT_TOKENS or asked + wanted > MOST_TOKENS:
                continue
        assert wanted is not None
        found.append(Prompt(question, wanted))
    if not found:
        raise ConfigError(
            str(path), 'holds no conversation of two turns: [{"conversations": [{"value": ...}, ...]}]'
        )
    return found


def _custom(path: Path, output_tokens: int) -> list[Prompt]:
    """output_tokens: of every request; -1 takes each line's own."""
    found = []
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if not line.strip():
            continue
        entry = _json(f"{path}: line {number}", line)
        own = entry.get("output_tokens") if isinstance(entry, dict) else None
        wanted = own if output_tokens == -1 else output_tokens
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise ConfigError(str(path), f'line {number} has no "prompt"')
        if not isinstance(wanted, int) or wanted < 1:
            raise ConfigError(str(path), f'line {number} has no "output_tokens", and --custom-output-len is -1')
        found.append(Prompt(entry["prompt"], wanted))
    if not found:
        raise ConfigError(str(path), "is empty")
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _json(where: object, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(str(where), f"is not JSON: {error}") from None
