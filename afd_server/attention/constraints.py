"""What running requests may say next, where a grammar binds them: a matcher for each, and the tokens that it allows.

What lives here: grammars, compiled once; matchers; and the thread that moves them on and finds the tokens of the next step
while the step before goes on: the device runs, and nobody waits. What does not: the text of a grammar
(text/constraints.py) and what becomes of the tokens' logits (sampler.py, the caller). A request is not scheduled before
its grammar is compiled, for which engine/loop.py calls `prepare`.

A bitmask has a bit for each token, the lowest bit of the first word first: R rows, W words of 32 tokens, V tokens.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from numpy.typing import NDArray
from torch import Tensor

from afd_server.errors import ModelError
from afd_server.text.constraints import LIMITS, error_of, load_vocabulary
from afd_server.text.tokenizer import Tokenizer
from afd_server.types import GenerationRequest, StartedRequest

logger = logging.getLogger(__name__)

Bitmask = NDArray[np.uint32]

COMPILING_THREADS = 2
# Compiled grammars that are kept. One that is wanted and no longer here is compiled while its request's step waits.
MAX_COMPILED = 256
# llguidance bounds its work to less than a second of computing; this is for a machine that does not come to it.
MATCHING_TIMEOUT_S = 60.0


@dataclass(slots=True)
class Constrained:
    """One running request's matcher, and once it is `found` which tokens may come next, or why none can."""

    found: Future[None] = field(default_factory=Future)
    matcher: LLMatcher | None = None
    bitmask_W: Bitmask = field(default_factory=lambda: np.empty(0, np.uint32))
    error: str = ""

    def failure(self) -> str:
        """Waits for the tokens; says why there are none, or "" when `bitmask_W` has them."""
        try:
            raised = self.found.exception(MATCHING_TIMEOUT_S)
        except TimeoutError:
            self.error = f"the next tokens were not found within {MATCHING_TIMEOUT_S:g} s"
        else:
            self.error = self.error or _explained(raised)
        return self.error and f"structured output: {self.error}"


class Constraints:
    """All grammars and matchers of one replica. `prepare` is called from any thread, the rest from the engine's.

    vocabulary: None where outputs cannot be constrained, for this reason. threads: how many of the processor's find tokens.
    """

    def __init__(
        self, vocabulary: LLTokenizer | None, vocab_size: int, *, reason: str = "", threads: int = 1
    ) -> None:
        self._vocabulary, self._reason = vocabulary, reason
        self._num_words = -(-max(vocab_size, vocabulary.vocab_size if vocabulary else 0) // 32)
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()
        self._compiling = ThreadPoolExecutor(COMPILING_THREADS, thread_name_prefix="compile-grammar")
        self._matching = ThreadPoolExecutor(1, thread_name_prefix="match-grammar")
        self._executor = LLExecutor(threads)

    @classmethod
    def load(
        cls, directory: Path, vocab_size: int, eos_token_ids: Sequence[int], *, threads: int
    ) -> Constraints:
        """Those of a model. One whose tokenizer does not allow any still serves all other requests."""
        try:
            vocabulary = load_vocabulary(Tokenizer.load(directory), vocab_size, eos_token_ids)
        except ModelError as error:
            logger.warning("structured outputs are not served: %s", error)
            return cls(None, vocab_size, reason=str(error))
        return cls(vocabulary, vocab_size, threads=threads)

    def prepare(self, request: GenerationRequest, then: Callable[[str], None]) -> None:
        """Compiles the request's grammar, then calls `then` with what is wrong with it, or "": at once when it is compiled
        already, else on another thread. Any thread may call."""
        constraint = request.sampling.constraint
        assert constraint is not None
        if self._vocabulary is None:
            then(f"structured outputs are not served: {self._reason}")
        elif constraint in self._compiled:
            then("")
        else:
            self._compiling.submit(self._prepare, constraint, then)

    def start(self, request: StartedRequest) -> Constrained:
        """A request begins, or comes back with some of its output known: finds its next tokens on the side."""
        constrained = Constrained()
        constrained.found = self._matching.submit(self._begin, constrained, request)
        return constrained

    def advance(self, moved: Sequence[tuple[Constrained, int]]) -> None:
        """These requests have got these tokens: finds the next ones on the side."""
        found: Future[None] = self._matching.submit(self._advance, moved)
        for constrained, _ in moved:
            constrained.found = found

    def close(self) -> None:
        """Ends the threads after what they are at."""
        self._compiling.shutdown(wait=False, cancel_futures=True)
        self._matching.shutdown(wait=False, cancel_futures=True)

    def _prepare(self, constraint: str, then: Callable[[str], None]) -> None:
        try:
            problem = error_of(self._compile(constraint))
        except BaseException as error:  # a panic of llguidance's is no Exception
            problem = _explained(error)
        then(problem and f"structured output: {problem}")

    def _compile(self, constraint: str) -> LLMatcher:
        """The matcher at its beginning, of which each request has a copy."""
        matcher = self._compiled.get(constraint)
        if matcher is None:
            assert self._vocabulary is not None
            matcher = LLMatcher(self._vocabulary, constraint, log_level=0, limits=LIMITS)
        if not matcher.is_error():
            with self._lock:
                self._compiled[constraint] = matcher
                self._compiled.move_to_end(constraint)
                while len(self._compiled) > MAX_COMPILED:
                    self._compiled.popitem(last=False)
        return matcher

    def _begin(self, constrained: Constrained, request: StartedRequest) -> None:
        assert request.sampling.constraint is not None
        matcher = constrained.matcher = self._compile(request.sampling.constraint).deep_copy()
        matcher.consume_tokens(list(request.output_token_ids))
        self._find([constrained])

    def _advance(self, moved: Sequence[tuple[Constrained, int]]) -> None:
        self._executor.consume_token_par([(_matcher(each), token_id) for each, token_id in moved])
        self._find([each for each, _ in moved])

    def _find(self, requests: Sequence[Constrained]) -> None:
        """The next tokens of each."""
        bitmask_RW = np.empty((len(requests), self._num_words), np.uint32)
        matchers = [(_matcher(each), row) for row, each in enumerate(requests)]
        self._executor.unsafe_compute_mask_ptr(
            matchers, bitmask_RW.ctypes.data, bitmask_RW.strides[0], len(requests)
        )
        for (matcher, row), each in zip(matchers, requests, strict=True):
            each.bitmask_W, each.error = bitmask_RW[row], error_of(matcher)


def _explained(error: BaseException | None) -> str:
    if error is None:
        return ""
    logger.error("a constraint cannot be followed; this is a bug of this server", exc_info=error)
    return f"internal error: {type(error).__name__}: {error}"


def _matcher(constrained: Constrained) -> LLMatcher:
    assert constrained.matcher is not None, "a request is started before it moves on"
    return constrained.matcher


def forbidden(bitmasks: Sequence[Bitmask], vocab_size: int, device: torch.device) -> Tensor:
    """[R, V] bool: the tokens whose bit is 0."""
    bitmask_RW = np.stack(bitmasks)
    if device.type == "cpu":
        bits_RV = np.unpackbits((~bitmask_RW).view(np.uint8), axis=1, count=vocab_size, bitorder="little")
        return torch.from_numpy(bits_RV).view(torch.bool)
    return forbidden_on_device(torch.from_numpy(bitmask_RW.view(np.int32)).to(device), vocab_size)


def forbidden_on_device(bitmask_RW: Tensor, vocab_size: int) -> Tensor:
    """The same where the bits, [R, W] int32, are on a device already: an eighth of a byte a token was copied."""
    place_32 = torch.arange(32, dtype=torch.int32, device=bitmask_RW.device)
    bits_RV = (bitmask_RW[:, :, None] >> place_32 & 1).flatten(1)[:, :vocab_size]
    return bits_RV == 0
