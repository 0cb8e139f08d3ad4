"""A checkpoint's config.json, read key by key: types are checked, and what nobody read is refused.

What lives here: the file and the rules for its keys that hold for every architecture. What does not: which keys one
architecture has (families.py). Called by spec.py and families.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afd_server.errors import ModelError

# Keys that say nothing about the result of a forward pass without dropout, or that other files of the checkpoint
# (generation_config.json, the tokenizer's) speak for.
HARMLESS = frozenset((
    "architectures", "attention_dropout", "auto_map", "aux_loss_alpha", "bos_token_id", "chunk_size_feed_forward",
    "dtype", "eos_token_id", "ep_size", "id2label", "initializer_range", "is_llama_config", "label2id",
    "max_window_layers", "model_type", "name_or_path", "num_nextn_predict_layers", "output_router_logits",
    "pad_token_id", "pretraining_tp", "return_dict", "router_aux_loss_coef", "router_jitter_noise", "seq_aux",
    "torch_dtype", "transformers.js_config", "transformers_version", "unk_token_id", "unsloth_fixed",
    "unsloth_version", "use_cache",
))  # fmt: skip

REQUIRED: Any = object()
# Far beyond any model; near enough that what a wild number asks for can be refused by name and not by a lack of memory.
MAX_INTEGER = 2**31 - 1
MAX_NUMBER = 1e15
MAX_LAYERS = 4096
MAX_JSON_BYTES = 64 * 2**20  # the index of the largest checkpoints has 10 MB


class ConfigFile:
    """One JSON object of config.json, and which of its keys were read. `where` names it in messages."""

    def __init__(
        self, values: Mapping[str, Any], where: str, generation: Mapping[str, Any] | None = None
    ) -> None:
        self._values = dict(values)
        self._generation = generation or {}
        self._read: set[str] = set()
        self._parts: dict[str, ConfigFile] = {}
        self.where = where

    @classmethod
    def open(cls, directory: Path) -> ConfigFile:
        """Reads config.json and, where there is one, generation_config.json. Raises ModelError."""
        path = directory / "config.json"
        if not path.is_file():
            raise ModelError(f"{directory}: there is no config.json; is this a Hugging Face model directory?")
        generation = directory / "generation_config.json"
        return cls(
            read_json_object(path), str(path), read_json_object(generation) if generation.is_file() else None
        )

    @property
    def architecture(self) -> str:
        names = self._values.get("architectures")
        if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
            raise ModelError(f"{self.where}: architectures is {names!r}, not a list of one name")
        return names[0]

    def has(self, key: str) -> bool:
        return self._values.get(key) is not None

    def integer(self, key: str, default: Any = REQUIRED, least: int = 1) -> int:
        value = self.value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(key, f"is {value!r}, not a whole number from {least} up")
        most = MAX_LAYERS if key == "num_hidden_layers" else MAX_INTEGER
        if value > most:
            raise self.error(key, f"is beyond {most}")
        return value

    def integers(self, key: str) -> list[int]:
        """A list of whole numbers, empty where the file has none."""
        value = self.value(key, [])
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self.error(key, f"is {value!r}, not a list of whole numbers")
        return value

    def number(self, key: str, default: Any = REQUIRED, *, zero: bool = False) -> float:
        """A finite number above 0; zero: or 0 itself."""
        value = self.value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, f"is {value!r}, not a number")
        if not 0 <= value < math.inf or (value == 0 and not zero):
            raise self.error(key, f"is {value!r}, not a finite number {'from' if zero else 'above'} 0")
        if value > MAX_NUMBER:
            raise self.error(key, f"is beyond {MAX_NUMBER:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.value(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"is {value!r}, not true or false")
        return value

    def value(self, key: str, default: Any = REQUIRED) -> Any:
        """The value as it is. null counts as absent. Raises ModelError when it is absent and there is no default."""
        self._read.add(key)
        value = self._values.get(key)
        if value is None:
            if default is REQUIRED:
                raise self.error(key, "is missing")
            return default
        return value

    def only(self, key: str, *served: Any, default: Any = REQUIRED) -> Any:
        """The value, which must be one of `served`: the others change the result and are not implemented."""
        value = self.value(key, default)
        if value not in served:
            raise self.error(key, f"is {value!r}; served: {', '.join(map(repr, served))}")
        return value

    def part(self, key: str, inherit: tuple[str, ...] = ()) -> ConfigFile:
        """A nested object, the same at every call. inherit: keys it has from here where it does not have them itself."""
        value = self.value(key)
        if not isinstance(value, dict):
            raise self.error(key, f"is {value!r}, not an object")
        if key not in self._parts:
            handed_down = {name: self._values[name] for name in inherit if name in self._values}
            self._parts[key] = ConfigFile(handed_down | value, f"{self.where}: {key}", self._generation)
        return self._parts[key]

    def rename(self, older: str, key: str) -> None:
        """Lets `older` be read as `key`, where the file has no such key itself."""
        if older in self._values:
            self._values.setdefault(key, self._values.pop(older))

    def set_aside(self, *keys: str) -> None:
        """Known keys of a part of the model that is not served."""
        self._read.update(keys)

    def eos_token_ids(self) -> tuple[int, ...]:
        """generation_config.json's word first, since chat models add their end-of-turn token there."""
        self._read.add("eos_token_id")
        value = self._generation.get("eos_token_id")
        if value is None:
            value = self._values.get("eos_token_id")
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(token_id) is int and abs(token_id) <= MAX_INTEGER for token_id in ids):
            raise self.error("eos_token_id", f"is {value!r}, not token ids")
        return tuple(ids)

    def dtype(self) -> str:
        """Of the weights; `torch_dtype` until transformers 5, `dtype` since. float32 where it says nothing."""
        value = self.value("dtype", None) or self.value("torch_dtype", "float32")
        if value not in ("float32", "bfloat16", "float16"):
            raise self.error("dtype", f"is {value!r}; served: float32, bfloat16 and float16")
        return value

    def refuse_what_was_not_read(self) -> None:
        """Raises ModelError for a key that may change the result and that nobody asked for. Off (null, false) is off."""
        if self.has("quantization_config"):
            raise self.error("quantization_config", "is set; quantized checkpoints are not served")
        for part in self._parts.values():
            part.refuse_what_was_not_read()
        unknown = [
            key
            for key, value in self._values.items()
            if key not in self._read
            and key not in HARMLESS
            and not key.startswith("_")
            and value not in (None, False, [], {})
        ]
        if unknown:
            raise self.error(
                unknown[0],
                f"is {self._values[unknown[0]]!r}, a key that is not known; remove it if it does not change the result",
            )

    def error(self, key: str, problem: str) -> ModelError:
        return ModelError(f"{self.where}: {key} {problem}")


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file of a checkpoint. Raises ModelError, naming the file, when it cannot be read or holds something else."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
        if len(content) > MAX_JSON_BYTES:
            raise ModelError(f"{path}: is larger than {MAX_JSON_BYTES} bytes")
        value = json.loads(content.decode())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: is not a JSON object")
    return value
