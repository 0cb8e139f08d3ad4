"""A server made ready for measuring: its model's name found, texts made to length, a warm-up; then any number of runs.

Called by the three commands and by the scripts of benchmarks/. What is measured of a run is statistics.py's business.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from afd_server.bench import dataset, generator
from afd_server.bench.client import BenchError, Client, Target
from afd_server.bench.dataset import DatasetSettings, Prompt, TokenizedWords, Words
from afd_server.bench.outcome import Outcome
from afd_server.errors import ConfigError, ModelError

# Two texts by whose tokens the server tells how it counts words.
FEW_WORDS, MANY_WORDS = 8, 136
WARM_UP_SEED = "warm-up"

Result = TypeVar("Result")


@dataclass(frozen=True)
class Session:
    """An open client, and what its prompts are made with."""

    client: Client
    settings: DatasetSettings
    texts: dataset.Texts
    tokenizer: dataset.Counts | None

    def prompts(self, count: int, seed: int | str) -> list[Prompt]:
        return dataset.prompts(self.settings, count, seed, self.texts, self.tokenizer)

    async def warm_up(self, count: int, max_concurrency: int | None = None) -> None:
        """Some requests that are not measured: the first ones pay for first touches. Raises BenchError when all fail."""
        timed = [(0.0, prompt) for prompt in self.prompts(count, WARM_UP_SEED)]
        run = await generator.run(self.client, timed, generator.Limits(max_concurrency))
        if timed and not any(outcome.is_complete for outcome in run.outcomes):
            raise failure(self.client.target, run.outcomes[0])


def failure(target: Target, outcome: Outcome) -> BenchError:
    return BenchError(f"{target.url}{target.endpoint}: {outcome.error}: {outcome.message}")


@asynccontextmanager
async def opened(target: Target, settings: DatasetSettings, tokenizer: str | None) -> AsyncIterator[Session]:
    """A session with a server. tokenizer: a directory; without one the server is asked to count. Raises BenchError."""
    counts = load_tokenizer(tokenizer)
    async with Client(target) as client:
        if not target.model:
            client.target = replace(target, model=await client.first_model())
        texts: dataset.Texts = Words()
        if counts is not None:
            texts = TokenizedWords(counts)
        elif settings.needs_texts:
            texts = await _count_words(client)
        yield Session(client, settings, texts, counts)


def load_tokenizer(directory: str | None) -> dataset.Counts | None:
    """Raises ConfigError."""
    if directory is None:
        return None
    from afd_server.text.tokenizer import Tokenizer

    try:
        return Tokenizer.load(Path(directory))
    except ModelError as error:
        raise ConfigError("--tokenizer", str(error)) from error


async def _count_words(client: Client) -> Words:
    """Asks the server how many tokens a word is, and how many it adds to a text."""
    counted = []
    for count in (FEW_WORDS, MANY_WORDS):
        prompt = Prompt(dataset.words(count, random.Random(count)), output_tokens=1)
        outcome = await client.send(prompt, 0.0, lambda: 0.0)
        if not outcome.is_complete:
            raise failure(client.target, outcome)
        counted.append((count, outcome.input_tokens))
    try:
        return Words.counted(*counted)
    except ValueError as error:
        raise BenchError(f"{client.target.url} does not count tokens: {error}; give --tokenizer") from None


def run_to_end(work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    """On the event loop that takes the least of the processor."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work())
