"""The YAML file that `afd profile` writes: times of a model measured on a machine, and where they were measured.

What lives here: the format, both ways. What does not: measuring (profiling/) and using (times.py, by the layout search, the
simulator and the scheduler).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from afd_server.errors import ConfigError
from afd_server.planner.times import AttentionTimes, FFNTimes, LayerTimes, LinearTimes
from afd_server.planner.yaml_file import read_yaml

VERSION = 2
PARTS = {"attention": AttentionTimes, "ffn": FFNTimes, "wire": LinearTimes, "overhead": LinearTimes}

Part = TypeVar("Part", AttentionTimes, FFNTimes, LinearTimes)


@dataclass(frozen=True, slots=True)
class Profile:
    """model, machine, measured_at: for people. mean_error: of the fit on its own measurements, a share."""

    model: str
    machine: str
    measured_at: str
    mean_error: float
    times: LayerTimes


def write_profile(profile: Profile, path: Path) -> None:
    """Raises ConfigError when the file cannot be written."""
    times = profile.times
    content: dict[str, Any] = {
        "afd_profile": VERSION,
        "model": profile.model,
        "machine": profile.machine,
        "measured_at": profile.measured_at,
        "mean_error": round(profile.mean_error, 4),
        "num_layers": times.num_layers,
    }
    for name in PARTS:
        part = dataclasses.asdict(getattr(times, name))
        content[name] = {key: float(f"{value:.6g}") for key, value in part.items()}
    try:
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise ConfigError(str(path), f"cannot be written: {error.strerror}") from error


def read_profile(path: Path, layers: int | None = None) -> Profile:
    """Raises ConfigError, naming the file and the key, for what is missing, unknown or not a time, and for a profile of a model that
    has not so many layers."""
    values = read_yaml(path)
    if not isinstance(values, Mapping) or values.get("afd_profile") != VERSION:
        raise ConfigError(str(path), f"is no profile of version {VERSION}", "make one with afd profile")
    num_layers = values.get("num_layers")
    if type(num_layers) is not int or num_layers < 1:
        raise ConfigError(str(path), f"num_layers is {num_layers!r}, not a number of layers")
    times = LayerTimes(
        num_layers,
        _part(values, "attention", AttentionTimes, path),
        _part(values, "ffn", FFNTimes, path),
        _part(values, "wire", LinearTimes, path),
        _part(values, "overhead", LinearTimes, path),
    )
    model, machine, measured_at = (
        str(values.get(key, "unknown")) for key in ("model", "machine", "measured_at")
    )
    if layers is not None and num_layers != layers:
        raise ConfigError("--profile", f"is of {model}, which has {num_layers} layers and not {layers}")
    error = _number(values.get("mean_error", 0.0), "mean_error", path)
    return Profile(model, machine, measured_at, error, times)


def _part(values: Mapping[str, Any], name: str, kind: type[Part], path: Path) -> Part:
    given = values.get(name)
    if not isinstance(given, Mapping):
        raise ConfigError(str(path), f"{name} is missing")
    known = {field.name for field in fields(kind)}
    if set(given) != known:
        odd = sorted(map(str, set(given) ^ known))
        raise ConfigError(str(path), f"{name}: {odd[0]} is {'unknown' if odd[0] in given else 'missing'}")
    return kind(**{key: _number(value, f"{name}.{key}", path) for key, value in given.items()})


def _number(value: Any, key: str, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ConfigError(str(path), f"{key} is {value!r}, not a number from 0 up")
    return float(value)
