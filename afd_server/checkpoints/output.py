"""Writing a model directory so that nobody ever sees half of one.

Called by `convert` and `upcycle`. What goes into the directory is their business.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from afd_server.errors import ConfigError


def check_output(out: Path) -> None:
    """Refuse to write over something. An empty directory is fine. ConfigError names OUT."""
    if out.is_dir():
        if any(out.iterdir()):
            raise ConfigError("OUT", f"{out} exists and is not empty", "remove it, or name another directory")
    elif out.exists() or out.is_symlink():
        raise ConfigError("OUT", f"{out} exists and is not a directory", "name another one")


@contextmanager
def staged_directory(out: Path) -> Iterator[Path]:
    """A temporary sibling of `out` to write into; it takes out's name when the block ends, and vanishes if it fails.

    A sibling, because a rename is atomic within one file system only.
    """
    check_output(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    except OSError as error:
        raise ConfigError("OUT", f"cannot write {out}: {error.strerror or error}") from error
    try:
        yield staging
        _use_common_permissions(staging)
        check_output(out)
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _use_common_permissions(directory: Path) -> None:
    """mkdtemp and safetensors make private files; a model may be served by another user than the one who made it."""
    mask = os.umask(0)
    os.umask(mask)
    directory.chmod(0o777 & ~mask)
    for file in directory.iterdir():
        file.chmod(0o666 & ~mask)
