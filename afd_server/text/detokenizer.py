"""Text that grows token by token: characters are whole when they leave, and stop strings end it at any border.

What lives here: the incremental decoding of one output, and the search for its stop strings. What does not: whether
the request ends by a token or by its length (engine/). Called by api/, once per new token; the cost of a token does
not grow with the output.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from afd_server.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that are no character, or not yet one
CONTINUATION_BYTES = {bytes([byte]) for byte in range(0x80, 0xC0)}  # UTF-8: never the first of a character
# A character has at most four bytes, so a tail that is still broken after this many tokens stays broken.
MAX_HELD_TOKENS = 16
# How much of the prompt the first token is decoded with: decoders drop a leading space at the very beginning only.
PROMPT_TAIL_TOKENS = 6


class Detokenizer:
    """Turns one output's tokens into text. Each call gives only what is new, and never a part of a character.

    Held are the tokens of the last text given out, which the next ones are decoded with, and those after them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        kept_special: Collection[int] = (),
    ) -> None:
        """kept_special: special tokens that are not skipped."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._kept_special = kept_special
        self._spaces_between_special_tokens = spaces_between_special_tokens or skip_special_tokens
        self._ids = self._prompt_tail(prompt_token_ids)
        self._num_held = 0
        # A prompt of token ids may end inside a character, which the output then completes.
        self._context = self._decode(self._ids).rstrip(REPLACEMENT)

    def add(self, token_id: int) -> str:
        """The text that this token completes; "" while a character is incomplete."""
        is_special = self._skip_special_tokens and self._tokenizer.is_special(token_id)
        is_skipped = is_special and token_id not in self._kept_special
        if is_skipped or self._tokenizer.id_to_token(token_id) is None:
            return ""  # never held: a stream of ignored end tokens, or of ids without one, must not grow the window
        after_added = bool(self._ids) and self._tokenizer.is_added(self._ids[-1])
        self._ids.append(token_id)
        self._num_held += 1
        text = self._decode(self._ids)
        if text.endswith(REPLACEMENT) and self._num_held < MAX_HELD_TOKENS:
            return ""
        new = self._release(text)
        if not self._spaces_between_special_tokens and after_added and self._tokenizer.is_added(token_id):
            return new.removeprefix(" ")
        return new

    def flush(self) -> str:
        """What is left at the end of the output: the beginning of a character that never came, as U+FFFD."""
        return self._release(self._decode(self._ids)) if self._num_held else ""

    def _release(self, text: str) -> str:
        new = text[len(self._context) :]
        if not new:  # the context stays: a space dropped at the very beginning shows with the next token
            return new
        ids = self._ids[-self._num_held :]
        context = self._decode(ids)
        if context.startswith(REPLACEMENT) and not new.startswith(REPLACEMENT):
            # They begin inside a character, which the prompt began: alone they would spoil what follows.
            ids, context = self._ids, text
        self._ids, self._context, self._num_held = ids, context, 0
        return new

    def _decode(self, token_ids: Sequence[int]) -> str:
        skip = self._skip_special_tokens and not self._kept_special  # those to skip are not among them
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip)

    def _prompt_tail(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The last tokens of the prompt, a few more where the cut would fall inside a character."""
        start = max(0, len(prompt_token_ids) - PROMPT_TAIL_TOKENS)
        least = max(0, start - 3)
        while start > least and self._tokenizer.token_bytes(prompt_token_ids[start])[:1] in CONTINUATION_BYTES:
            start -= 1
        return list(prompt_token_ids[start:])


class StopStrings:
    """Looks for stop strings in a text that comes in pieces, and holds back what may become one.

    The string that is complete first wins, of two that end together the longer one: so the outcome depends on the text
    alone, not on how it was cut into pieces. `found` is that string. A character costs the same whatever the strings are,
    which a client chooses: a search that went back for each of them would hold up every stream.
    """

    def __init__(self, stop: Sequence[str], *, include: bool = False) -> None:
        self._stop = [_PartOfStop(string) for string in stop]
        self._include = include
        self._held = ""
        self.found: str | None = None

    def feed(self, piece: str, *, may_stop: bool = True) -> str:
        """The text that is safe to give out. may_stop False: a string that ends within this piece does not count."""
        assert self.found is None, "the text has ended"
        text, old = self._held + piece, len(self._held)
        for end, character in enumerate(piece, old + 1):
            complete = [part.stop for part in self._stop if part.take(character)]
            if complete and may_stop:
                self.found = max(complete, key=len)
                self._held = ""
                return text[: end if self._include else end - len(self.found)]
        kept = max((part.length for part in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def flush(self) -> str:
        """What was held back, when the output ends without having become a stop string."""
        held, self._held = self._held, ""
        return held


class _PartOfStop:
    """How much of one stop string the text ends with: Knuth, Morris and Pratt's search (SIAM J. Comput. 6, 1977).

    length: of the longest end of the text that is a beginning of `stop`, but not all of it.
    """

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.length = 0
        # [i]: the same for stop[: i + 1] as the text; made as far as a text has come.
        self._borders = [0]

    def take(self, character: str) -> bool:
        """Whether the text, longer by this character, now ends with the whole string."""
        self.length = self._extended(self.length, character)
        if self.length == len(self.stop):
            self.length = self._border(self.length)
            return True
        return False

    def _extended(self, length: int, character: str) -> int:
        while length and self.stop[length] != character:
            length = self._border(length)
        return length + 1 if self.stop[length] == character else 0

    def _border(self, length: int) -> int:
        while len(self._borders) < length:
            self._borders.append(self._extended(self._borders[-1], self.stop[len(self._borders)]))
        return self._borders[length - 1]
