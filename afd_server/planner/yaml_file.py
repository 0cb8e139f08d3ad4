"""The planner's YAML files, cards and profiles, as plain values. What is in them is for whoever reads them to check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from afd_server.errors import ConfigError

MAX_BYTES = 1 << 20


def read_yaml(path: Path) -> Any:
    """Raises ConfigError, naming the file, when it cannot be read, is larger than MAX_BYTES, or is not YAML."""
    try:
        content = path.read_bytes()
        if len(content) > MAX_BYTES:
            raise ConfigError(str(path), f"is larger than {MAX_BYTES} bytes")
        return yaml.safe_load(content)
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(str(path), f"is not YAML: {error}") from error
