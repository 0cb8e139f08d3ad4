"""What the workers' memory holds: weights, KV cache and the rest, against what it must hold.

    .venv/bin/python benchmarks/memory.py /tmp/small --concurrency 8

Starts the server on the checkpoint, puts load.py's load on it, and adds up for each role, over its workers: the weights, as the
workers themselves say; the entries of the KV cache that the load's requests wrote; the slots through which the two sides
exchange activations; and the baseline, a process that has only imported what a worker imports (torch, Ray). Beside that
stands what the workers have:

    own         memory that no file backs, shared with others in proportion, after the load. What is not in the sum is left over:
                Ray's connection, activations, what the C library's allocator keeps of memory that was freed
    huge        that part of own which lies in huge pages; a touched part of one is the whole of it in own
    own peak    the most that was seen of it at any time, sampled: more than own is what loading or the load needed in between
    peak RSS    the kernel's own mark (VmHWM); it counts mapped files too
    files       the most of mapped files that was seen: libraries, and the checkpoint as far as it was read and not yet unmapped.
                These pages are the system's cache: it takes them back when it needs them

All in megabytes of 10^6 bytes. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from load import Load, Result, measure
from results import commit, machine
from servers import running, server

from afd_server.config import ServeConfig
from afd_server.kvcache.storage import ELEMENT_BYTES
from afd_server.models.families import read_model_spec
from afd_server.models.spec import ModelSpec

# How Ray calls the processes of the workers.
ROLES = {"ray::AttentionActor": "attention", "ray::FFNActor": "ffn"}
LOOK_S, SAMPLE_S = 0.2, 0.02  # between two looks for new workers, and between two samples of known ones
LOG_TIMEOUT_S = 20.0
# A line that a worker writes when it has loaded, as Ray hands it on.
LOADED = re.compile(r"pid=(\d+)\).* ([\d.]+) MB of weights")
# Names of mappings that no file on a disk backs: Python's and torch's memory, shared or not, and the slots of the links.
SLOTS, OWN = "/memfd:afd-link", re.compile(r"^(|\[.*|/dev/zero.*|/memfd:.*)$")
BASELINE = "import afd_server.cluster.actors, sys; print(flush=True); sys.stdin.read()"


@dataclass
class Peaks:
    """The most that samples of one process have shown, in bytes."""

    role: str
    own: int = 0
    files: int = 0

    def sample(self, pid: int) -> None:
        found = status(pid)
        self.own = max(self.own, found["RssAnon"] + found["RssShmem"])
        self.files = max(self.files, found["RssFile"])


@dataclass(frozen=True)
class Role:
    """Bytes over all workers of one role: what it must hold, and what it has."""

    role: str
    workers: int
    weights: int
    kv_cache: int
    slots: int
    baseline: int
    own: int
    huge: int
    own_peak: int
    files_peak: int
    rss_peak: int

    @property
    def must(self) -> int:
        return self.weights + self.kv_cache + self.slots + self.baseline

    @property
    def unexplained(self) -> int:
        return self.own - self.must


def status(pid: int) -> dict[str, int]:
    """Bytes by the names of /proc/PID/status. Raises OSError when the process is gone."""
    lines = re.findall(r"^(\w+):\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return defaultdict(int, {name: int(kilobytes) * 1024 for name, kilobytes in lines})


def proportional(smaps: str) -> dict[str, int]:
    """Bytes by the name of the mapping ("" for memory without one); a page that n processes map counts as 1/n of one."""
    found: dict[str, int] = defaultdict(int)
    name = ""
    for line in smaps.splitlines():
        if header := re.match(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+\s*(.*)", line):
            name = header[1].removesuffix(" (deleted)")
        elif line.startswith("Pss:"):
            found[name] += int(line.split()[1]) * 1024
    return found


def own_and_slots(pid: int) -> tuple[int, int]:
    """Bytes of one process that no file backs, and those of them that are slots of links."""
    found = proportional(Path(f"/proc/{pid}/smaps").read_text())
    return sum(size for name, size in found.items() if OWN.match(name)), found.get(SLOTS, 0)


def huge_bytes(pid: int) -> int:
    """Of memory in huge pages, private or shared."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(
        int(size) * 1024
        for size in re.findall(r"^(?:AnonHugePages|ShmemPmdMapped):\s+(\d+)", rollup, re.MULTILINE)
    )


class Watch(threading.Thread):
    """Samples the workers below this process from their first moment on, until it is stopped."""

    def __init__(self) -> None:
        super().__init__(name="watch", daemon=True)
        self.workers: dict[int, Peaks] = {}
        self._stopping = threading.Event()

    def run(self) -> None:
        looked = -math.inf
        while not self._stopping.wait(SAMPLE_S):
            if time.monotonic() - looked > LOOK_S:
                self._look()
                looked = time.monotonic()
            for pid, peaks in self.workers.items():
                try:
                    peaks.sample(pid)
                except OSError:  # it has ended; what was seen of it stays
                    continue

    def _look(self) -> None:
        for process in psutil.Process().children(recursive=True):
            try:
                title = process.cmdline()[:1]
            except psutil.Error:
                continue
            role = next((role for name, role in ROLES.items() if title and title[0].startswith(name)), None)
            if role:
                self.workers.setdefault(process.pid, Peaks(role))

    def stop(self) -> None:
        self._stopping.set()
        self.join()


def baseline_bytes() -> int:
    """Own memory of a process that has imported what a worker does."""
    command = [sys.executable, "-c", BASELINE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        process.stdout.readline()
        own, _ = own_and_slots(process.pid)
        process.communicate("")
    return own


def weight_bytes(process: psutil.Process, pids: set[int]) -> dict[int, int]:
    """By pid, from the server's log, which its output goes to. Raises RuntimeError when a worker's line does not come."""
    deadline = time.monotonic() + LOG_TIMEOUT_S
    while time.monotonic() < deadline:
        log = Path(f"/proc/{process.pid}/fd/1").read_text(errors="replace")
        found = {int(pid): int(float(megabytes) * 1e6) for pid, megabytes in LOADED.findall(log)}
        if pids and set(found) >= pids:
            return found
        time.sleep(LOOK_S)
    raise RuntimeError(f"the log does not tell the weights of {sorted(pids)}:\n{log[-2000:]}")


def kv_bytes(spec: ModelSpec, result: Result) -> int:
    """Of the blocks that the requests wrote: freed blocks are the last to be used again, so each request takes new ones.

    The last output token is never written, as no step follows it.
    """
    block_size = ServeConfig.__dataclass_fields__["block_size"].default
    tokens = (result.input_tokens + result.output_tokens) / result.requests - 1
    blocks = result.requests * math.ceil(tokens / block_size)
    entry = math.prod(spec.attention.cache_entry_shape) * ELEMENT_BYTES[spec.dtype]
    return int(blocks * block_size * spec.num_layers * entry)


def roles(watch: Watch, weights: dict[int, int], kv_cache: int, baseline: int) -> list[Role]:
    found = []
    for name in ROLES.values():
        pids = [pid for pid, peaks in watch.workers.items() if peaks.role == name]
        now = [own_and_slots(pid) for pid in pids]
        found.append(Role(
            role=name,
            workers=len(pids),
            weights=sum(weights[pid] for pid in pids),
            kv_cache=kv_cache if name == "attention" else 0,
            slots=sum(slots for _, slots in now),
            baseline=baseline * len(pids),
            own=sum(own for own, _ in now),
            huge=sum(map(huge_bytes, pids)),
            own_peak=sum(watch.workers[pid].own for pid in pids),
            files_peak=sum(watch.workers[pid].files for pid in pids),
            rss_peak=sum(status(pid)["VmHWM"] for pid in pids),
        ))  # fmt: skip
    return found


def measured(model: Path, flags: str, concurrency: int, load: Load) -> list[Role]:
    os.environ["RAY_DEDUP_LOGS"] = "0"  # or it leaves out lines of workers that say much the same
    baseline = baseline_bytes()
    watch = Watch()
    watch.start()
    try:
        with running(server("afd", flags), model, "float32") as (url, process):
            result = measure(url, None, concurrency, load)
            weights = weight_bytes(process, set(watch.workers))
            return roles(watch, weights, kv_bytes(read_model_spec(model), result), baseline)
    finally:
        watch.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory of a checkpoint")
    parser.add_argument("--attention-workers", type=int, default=1)
    parser.add_argument("--ffn-workers", type=int, default=1)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--input-words", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=32)
    arguments = parser.parse_args()
    flags = f"--attention-workers {arguments.attention_workers} --ffn-workers {arguments.ffn_workers}"
    load = Load(rounds=1, input_words=arguments.input_words, output_tokens=arguments.output_tokens)
    found = measured(arguments.model, flags, arguments.concurrency, load)
    columns = ("weights", "kv_cache", "slots", "baseline", "must", "own", "unexplained", "huge", "own_peak", "files_peak", "rss_peak")  # fmt: skip
    print("MB           " + " ".join(f"{name.replace('_', ' '):>11}" for name in columns))
    for role in found:
        cells = " ".join(f"{getattr(role, name) / 1e6:>11.1f}" for name in columns)
        print(f"{role.role:<9} x{role.workers:<2} {cells}")
    print(json.dumps({
        "model": str(arguments.model), "commit": commit(), "machine": machine(), "concurrency": arguments.concurrency,
        "input_words": load.input_words, "output_tokens": load.output_tokens,
        "bytes": [{**asdict(role), "must": role.must, "unexplained": role.unexplained} for role in found],
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
