"""What `afd plan` and `afd simulate` are both told: a model, cards, and how they compute.

What lives here: those flags, and reading what they name. What does not: flags of one of the two (command.py, simulator/flags.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afd_server.command_line import positive
from afd_server.errors import ModelError
from afd_server.planner import paper
from afd_server.planner.hardware import Hardware, choose, read_hardware
from afd_server.planner.layout import Workload
from afd_server.planner.model_config import CountedModel, read_counted_model
from afd_server.planner.profile_file import read_profile
from afd_server.planner.roofline import DTYPE_BYTES, Precision

MODELS = f"a Hugging Face directory, a config.json, or one of {', '.join(paper.BUNDLED)}"


def add_workload_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--hardware-file", type=Path, metavar="FILE", help="YAML with more cards, in the format of planner/data/hardware.yaml")  # fmt: skip
    add("--network-gbps", type=positive, metavar="GBPS", help="of a card's NIC, in place of each card's own")
    add("--dtype", choices=tuple(DTYPE_BYTES), default="bfloat16", help="of weights and caches. Default: %(default)s")  # fmt: skip
    add("--profile", type=Path, metavar="FILE", help="times that `afd profile` measured, in place of rooflines")


def read_model(name: str) -> tuple[Path, CountedModel]:
    """And where it is. Raises ModelError when it is neither a bundled model, nor a file or directory."""
    if name in paper.BUNDLED:
        return paper.MODELS / f"{name}.json", paper.bundled_model(name)
    if name in ("default", "default-moe"):
        from afd_server.checkpoints.find import find_model

        path = find_model(name)
    else:
        path = Path(name).expanduser()
        if not path.exists():
            raise ModelError(f"{name}: no such file or directory, and none of {', '.join(paper.BUNDLED)}")
    return path, read_counted_model(path)


def read_cards(given: Any, names: Sequence[str]) -> dict[str, Hardware]:
    """Those of these names; without any, all that are known. Raises ConfigError."""
    return choose(read_hardware(given.hardware_file, given.network_gbps), names)


def read_workload(given: Any, model: CountedModel, context: int, cards: dict[str, Hardware]) -> Workload:
    """Raises ConfigError for a profile that cannot be read, or is another model's."""
    profile = read_profile(given.profile, model.num_layers) if given.profile else None
    return Workload(model, context, cards, Precision.all(given.dtype), profile=profile)
