"""A model's tokenizer, read from its directory: text to ids, ids to text, and the bytes behind each id.

What lives here: `tokenizer.json` through the tokenizers library, and the names of special tokens, which only
`tokenizer_config.json` tells. Which tokens stand around every text is tokenizer.json's say alone, as in transformers 5.
What does not live here: text that grows token by token (detokenizer.py), the chat template.
Output is not "cleaned up" (spaces before punctuation stay): a stream could not take back what it has sent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from afd_server.errors import ModelError
from afd_server.models.config_file import read_json_object

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FALLBACK_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """Thread-safe and without state. `special_tokens` is what chat templates may name: "bos_token" -> its text."""

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: dict[str, Any] | None = None) -> None:
        self._backend = backend
        self.special_tokens = special_tokens or {}
        self._added = backend.get_added_tokens_decoder()
        kinds = json.dumps(_state(backend.decoder))
        self._is_byte_level = '"ByteLevel"' in kinds
        self._marks_spaces = "\\u2581" in kinds

    @classmethod
    def load(cls, directory: Path | str) -> Tokenizer:
        """Reads `tokenizer.json` and `tokenizer_config.json`. Raises ModelError naming a missing or damaged file."""
        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{path}: no such file; only models with a tokenizer.json are served")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ModelError(f"{path}: cannot be read as a tokenizer: {error}") from error
        # Some files cut or fill up what they encode; a prompt is taken as it is.
        backend.no_truncation()
        backend.no_padding()
        config = read_tokenizer_config(Path(directory))
        special_tokens: dict[str, Any] = {
            name: text for name in SPECIAL_NAMES if (text := _content(config.get(name))) is not None
        }
        if "additional_special_tokens" in config:
            more = config["additional_special_tokens"] or []
            if not isinstance(more, list):
                raise ModelError(f"{directory}: tokenizer_config.json: additional_special_tokens is no list")
            special_tokens["additional_special_tokens"] = list(map(_content, more))
        for name in SPECIAL_NAMES:
            if not isinstance(special_tokens.get(name, ""), str):
                raise ModelError(f"{directory}: tokenizer_config.json: {name} is no text")
        return cls(backend, special_tokens)

    @property
    def vocab_size(self) -> int:
        """Number of ids it can produce, added tokens included. The model's embedding may have more rows."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def eos_token_id(self) -> int | None:
        """The id of tokenizer_config.json's eos_token. What ends a request is the model's say, not this one's."""
        text = self.special_tokens.get("eos_token")
        return None if text is None else self._backend.token_to_id(text)

    @property
    def added_special_tokens(self) -> list[str]:
        """The text of every token that `skip_special_tokens` skips."""
        return [token.content for token in self._added.values() if token.special]

    def to_json(self) -> str:
        """All of it in the form of `tokenizer.json`."""
        return self._backend.to_str()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Each text's ids. Unlike `encode`, it lets the other threads of this process run meanwhile."""
        encodings = self._backend.encode_batch(texts, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Ids that are no tokens (padding of the model's embedding) stand for no text."""
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def is_added(self, token_id: int) -> bool:
        """Whether the token was added beside the learned vocabulary (special tokens are)."""
        return token_id in self._added

    def is_special(self, token_id: int) -> bool:
        """Whether it is one of those that `skip_special_tokens` skips."""
        return token_id in self._added and self._added[token_id].special

    def special_ids(self, texts: Collection[str]) -> frozenset[int]:
        """Of those of `texts` that are special tokens."""
        return frozenset(
            token_id for token_id, token in self._added.items() if token.special and token.content in texts
        )

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling, or None for an id without a token."""
        return self._backend.id_to_token(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that this token adds to a text, which may be a part of a character. b"" for an id without one."""
        if token_id in self._added:
            return self._added[token_id].content.encode()
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            return b"".join(BYTE_OF.get(character, character.encode()) for character in token)
        fallback = FALLBACK_BYTE.fullmatch(token)
        if fallback:
            return bytes([int(fallback[1], 16)])
        if self._marks_spaces:
            return token.replace("\u2581", " ").encode()
        return self._backend.decode([token_id], skip_special_tokens=False).encode()

    def token_text(self, token_id: int) -> str:
        """The token as a reader sees it, a part of a character as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")


def read_tokenizer_config(directory: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, or {} where there is none. Raises ModelError for a damaged file."""
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return {}
    return read_json_object(path)


def _content(token: Any) -> str | None:
    """A special token is written as its text, or as an object that holds it."""
    return token.get("content") if isinstance(token, dict) else token


def _state(decoder: Any) -> Any:
    return {} if decoder is None else json.loads(decoder.__getstate__())


def _byte_alphabet() -> dict[str, bytes]:
    """Character -> byte of byte-level vocabularies (GPT-2): printable bytes are themselves, the rest follow at 256."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): bytes([byte]) for byte in printable}
    return alphabet | {chr(256 + place): bytes([byte]) for place, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()
