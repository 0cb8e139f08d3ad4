"""The safetensors files of a checkpoint: one file, or several with an index, read by memory map.

What lives here: finding the files and slicing tensors out of them. What does not: which tensors are needed and what
for (checkpoint.py, the one caller).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from afd_server.errors import ModelError
from afd_server.models.config_file import read_json_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_OPEN_FILES = 2
DTYPES = ("F32", "BF16", "F16")


class WeightFiles:
    """Name -> tensor over all files of a directory. Raises ModelError for files that are missing or damaged."""

    def __init__(self, directory: Path) -> None:
        self._directory = Path(directory)
        self._open: dict[str, Any] = {}
        if (self._directory / INDEX_FILE).is_file():
            self.where = self._directory / INDEX_FILE
            self._file_of = _read_index(self.where)
        elif (self._directory / SINGLE_FILE).is_file():
            self.where = self._directory / SINGLE_FILE
            self._file_of = dict.fromkeys(self._file(SINGLE_FILE).keys(), SINGLE_FILE)
        else:
            raise ModelError(f"{directory}: there is neither {SINGLE_FILE} nor {INDEX_FILE}")

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def read(self, name: str, shape: tuple[int, ...], slices: tuple[slice, ...] = ()) -> Tensor:
        """A tensor, or the part of it that `slices` cut out: a view of the mapped file, paged in when it is used.

        shape: the whole tensor's. Raises ModelError if the tensor is missing or of another shape.
        """
        stored = self._stored(name, shape)
        try:
            return stored[slices] if slices else stored[:]
        except SafetensorError as error:
            raise self._damaged(name, error) from error

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises ModelError for the first of these tensors, by name, that `read` would not give."""
        for name in sorted(shapes, key=lambda name: self._file_of.get(name, "")):  # each file is opened once
            self._stored(name, shapes[name])

    def _stored(self, name: str, shape: tuple[int, ...]) -> Any:
        """The tensor as its file describes it; nothing of it is read."""
        if name not in self._file_of:
            raise ModelError(f"{self.where}: {name} is missing")
        try:
            stored = self._file(self._file_of[name]).get_slice(name)
            found, dtype = tuple(stored.get_shape()), stored.get_dtype()
        except SafetensorError as error:
            raise self._damaged(name, error) from error
        if found != shape:
            raise ModelError(f"{self.where}: {name} has shape {list(found)}, not {list(shape)}")
        if dtype not in DTYPES:
            raise ModelError(f"{self.where}: {name} is of type {dtype}; served: {', '.join(DTYPES)}")
        return stored

    def _damaged(self, name: str, error: SafetensorError) -> ModelError:
        return ModelError(f"{self._directory / self._file_of[name]}: {name}: {error}")

    def _file(self, file_name: str) -> Any:
        if file_name not in self._open:
            # What was read stays mapped, and in memory, while its file is open: tensors come nearly in the files' order.
            while len(self._open) >= MAX_OPEN_FILES:
                del self._open[next(iter(self._open))]
            path = self._directory / file_name
            try:
                if not path.is_file():  # a pipe, say, would be waited for
                    raise ModelError(f"{path}: cannot be read: there is no such file")
                self._open[file_name] = safe_open(path, framework="pt")
            except (OSError, ValueError, SafetensorError) as error:
                raise ModelError(f"{path}: cannot be read: {error}") from error
        return self._open[file_name]


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name. The files must lie beside the index: a path could point anywhere."""
    try:
        weight_map = read_json_object(path)["weight_map"]
        file_of = {str(name): str(file_name) for name, file_name in weight_map.items()}
    except (KeyError, AttributeError) as error:
        raise ModelError(f"{path}: is not an index of safetensors files: {error}") from error
    for name, file_name in file_of.items():
        if PurePath(file_name).name != file_name or "\\" in file_name or file_name in ("", ".", ".."):
            raise ModelError(f"{path}: {name} is said to be in {file_name!r}, which is not a file beside it")
    return file_of
