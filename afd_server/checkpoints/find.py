"""From the MODEL that a person types to a directory: the models that are made here by name, or any other.

Called by every command that opens a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from afd_server.checkpoints.default_model import afd_home, default_model, default_moe
from afd_server.checkpoints.locate import locate_model

MADE_HERE: dict[str, Callable[[Path], Path]] = {"default": default_model, "default-moe": default_moe}


def find_model(name: str) -> Path:
    """A directory, made or downloaded first where it must be. Raises ModelError with the remedy."""
    return MADE_HERE[name](afd_home()) if name in MADE_HERE else locate_model(name)
