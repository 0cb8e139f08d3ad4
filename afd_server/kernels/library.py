"""The C++ kernels as a loaded library: compiled on first use for this machine's instruction set, kept in the cache.

What lives here: the choice of the instruction set, the compiler's call and the signatures. What does not: the kernels
(native/) and the tensors (matmul.py, experts.py, attention.py, rows.py). A compiler is all that is needed, no headers of
torch: a kernel takes pointers, and ctypes lets other threads run while it computes.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from ctypes import c_double as DOUBLE
from ctypes import c_float as FLOAT
from ctypes import c_long as LONG
from ctypes import c_void_p as POINTER
from pathlib import Path

SOURCES = Path(__file__).parent / "native"
COMMON_FLAGS = ("-std=c++20", "-O3", "-fno-math-errno", "-pthread", "-shared", "-fPIC", "-Wno-psabi")

# By preference: the CPU flags that an instruction set needs, as the kernel names them, and the compiler's for it. The last
# one is what every machine of the architecture has.
INSTRUCTION_SETS = {
    "avx512": (
        ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "fma"),
        ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx2", "-mfma"),
    ),
    "avx2": (("avx2", "fma"), ("-mavx2", "-mfma")),
    "portable": ((), ()),
}
COMPILE_TIMEOUT_S = 300

SIGNATURES: dict[str, tuple[object, ...]] = {
    "afd_packed_bytes": (LONG,) * 4,
    "afd_pack": (LONG, POINTER, LONG, LONG, LONG, POINTER),
    "afd_linear": (LONG, POINTER, LONG, LONG, LONG, POINTER, POINTER, LONG, POINTER, LONG, LONG),
    "afd_experts": (
        LONG, POINTER, LONG, LONG, LONG, POINTER, POINTER, POINTER, POINTER, LONG, LONG, LONG, POINTER, LONG,
    ),
    "afd_add_rms_norm": (POINTER, POINTER, POINTER, FLOAT, POINTER, LONG, LONG, LONG),
    "afd_rotate_and_write": (
        POINTER, LONG, LONG, POINTER, POINTER, POINTER, LONG, LONG, POINTER, LONG, LONG, POINTER, POINTER, LONG, FLOAT,
        POINTER, LONG, POINTER, LONG,
    ),
    "afd_paged_attention": (
        POINTER, LONG, LONG, LONG, LONG, LONG, POINTER, LONG, POINTER, LONG, POINTER, POINTER, POINTER, LONG, FLOAT,
        POINTER, LONG,
    ),
    "afd_route": (POINTER, LONG, LONG, LONG, LONG, LONG, FLOAT, POINTER, POINTER, POINTER, LONG),
    "afd_attention_side": (
        POINTER, LONG, POINTER, POINTER, POINTER, POINTER, POINTER, POINTER, POINTER, LONG, POINTER, LONG, POINTER,
        POINTER, POINTER, LONG, POINTER, LONG, POINTER, LONG,
    ),
    "afd_run_layers": (
        POINTER, LONG, POINTER, POINTER, POINTER, POINTER, POINTER, POINTER, POINTER, LONG, POINTER, LONG, POINTER, POINTER,
        POINTER, LONG, LONG, POINTER, LONG,
    ),
    "afd_serve_calls": (POINTER, DOUBLE),
    "afd_rows_of_packed": (LONG, POINTER, POINTER, LONG, LONG, POINTER, LONG),
}  # fmt: skip


logger = logging.getLogger(__name__)


class KernelBuildError(RuntimeError):
    """The kernels cannot be compiled here; the message says why in one line."""


@functools.cache
def library(instruction_set: str | None = None) -> ctypes.CDLL:
    """The kernels, compiled if need be (a few seconds, once on a machine). Default: the best set that this CPU has.

    Raises KernelBuildError: there is no compiler, or it fails.
    """
    built = ctypes.CDLL(str(build(instruction_set or best_instruction_set())))
    for name, arguments in SIGNATURES.items():
        function = getattr(built, name)
        function.argtypes = arguments
        function.restype = LONG if name == "afd_packed_bytes" else None
    return built


def best_instruction_set() -> str:
    """The first of INSTRUCTION_SETS whose CPU flags are all there."""
    return next(name for name, (needed, _) in INSTRUCTION_SETS.items() if set(needed) <= _cpu_flags())


def usable_instruction_sets() -> list[str]:
    """All that this CPU can run."""
    return [name for name, (needed, _) in INSTRUCTION_SETS.items() if set(needed) <= _cpu_flags()]


def build(instruction_set: str, source: Path = SOURCES / "exports.cpp") -> Path:
    """The library's file: compiled unless one of these sources, flags and compiler is there already.

    Two processes may do so at once: each moves its own finished file into place.
    """
    compiler = _compiler()
    flags = (*COMMON_FLAGS, *INSTRUCTION_SETS[instruction_set][1])
    name = f"{source.stem}-{instruction_set}-{_fingerprint(compiler, flags, source)}.so"
    target = _cache_directory() / name
    if target.exists():
        return target
    logger.info("compiling the CPU kernels, once on this machine")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as directory:
            output = Path(directory) / "kernels.so"
            command = [compiler, *flags, str(source), "-o", str(output)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
            if done.returncode:
                reason = next(
                    (line for line in done.stderr.splitlines() if "error" in line), done.stderr[-300:]
                )
                raise KernelBuildError(f"{compiler} cannot compile the CPU kernels: {reason}")
            output.replace(target)
    except OSError as error:
        raise KernelBuildError(f"the CPU kernels cannot be kept in {target.parent}: {error}") from None
    except subprocess.TimeoutExpired:
        raise KernelBuildError(f"{compiler} took more than {COMPILE_TIMEOUT_S} s for the CPU kernels") from None
    return target


def _compiler() -> str:
    wanted = os.environ.get("CXX") or "c++"
    found = shutil.which(wanted) or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        raise KernelBuildError("there is no C++ compiler for the CPU kernels (on Debian: apt install g++)")
    return found


def _fingerprint(compiler: str, flags: tuple[str, ...], source: Path) -> str:
    """Of all that the machine code depends on."""
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=30).stdout
    parts = [platform.machine().encode(), version, " ".join(flags).encode()]
    parts += [file.read_bytes() for file in (source, *sorted(SOURCES.iterdir())) if file.is_file()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _cache_directory() -> Path:
    return Path(os.environ.get("AFD_HOME") or "~/.cache/afd").expanduser() / "kernels"


@functools.cache
def _cpu_flags() -> frozenset[str]:
    """As Linux lists them; empty elsewhere, which means the portable set."""
    if sys.platform != "linux":
        return frozenset()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()
