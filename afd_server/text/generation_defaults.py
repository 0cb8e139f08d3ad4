"""The sampling that a model's makers recommend: generation_config.json, as far as it is sampling.

Used for what a request leaves open, before OpenAI's defaults. Which ids end a request is read elsewhere (models/).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from afd_server.errors import ModelError
from afd_server.models.config_file import read_json_object

# Key of the file -> (name in a request, least value, greatest value). The names and the choice are vLLM's.
KEYS: dict[str, tuple[str, float, float]] = {
    "temperature": ("temperature", 0.0, math.inf),
    "top_p": ("top_p", 0.0, 1.0),
    "top_k": ("top_k", -1, 2**31 - 1),
    "min_p": ("min_p", 0.0, 1.0),
    "repetition_penalty": ("repetition_penalty", 1e-3, 1e3),
    "max_new_tokens": ("max_tokens", 1, math.inf),
}
WHOLE_NUMBERS = ("top_k", "max_new_tokens")


def read_generation_defaults(directory: Path | str) -> dict[str, float]:
    """Request field -> default, for the fields that the file sets; {} where there is no file.

    Raises ModelError for a damaged file and for a value out of range, by name.
    """
    path = Path(directory) / "generation_config.json"
    if not path.is_file():
        return {}
    config = read_json_object(path)
    defaults = {}
    for key, (name, least, greatest) in KEYS.items():
        value: Any = config.get(key)
        if value is None:
            continue
        kinds = int if key in WHOLE_NUMBERS else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= greatest:
            raise ModelError(f"{path}: {key} is {value!r}")
        defaults[name] = value
    return defaults
