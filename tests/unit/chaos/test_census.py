"""The census sees what is held: a descriptor, a process that goes on, shared memory without a process."""

import os
import signal
import subprocess
import time

from tests.chaos.census import Family, abandoned_shared_memory, holdings

DEADLINE_S = 20.0


def test_an_open_descriptor_is_seen():
    before = holdings(os.getpid()).descriptors
    ends = os.pipe()
    try:
        assert holdings(os.getpid()).descriptors["pipe"] == before["pipe"] + 2
    finally:
        for end in ends:
            os.close(end)
    assert holdings(os.getpid()).descriptors["pipe"] == before["pipe"]


def test_a_grandchild_that_outlives_its_family_is_seen():
    shell = subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
    orphan = int(shell.stdout.readline())
    try:
        family = Family(shell.pid)
        family.look()
        shell.kill()
        shell.wait(DEADLINE_S)
        assert [survivor.split()[0] for survivor in family.survivors(0.1)] == [str(orphan)]
    finally:
        os.kill(orphan, signal.SIGKILL)
        shell.stdout.close()
    assert family.survivors(DEADLINE_S) == []


def test_shared_memory_is_abandoned_when_nobody_has_it_open():
    name = f"afd-census-{os.getpid()}"
    since = time.time() - 1
    path = f"/dev/shm/{name}"
    with open(path, "wb") as file:
        file.write(b"x")
        file.flush()
        assert name not in abandoned_shared_memory(since)
    try:
        assert name in abandoned_shared_memory(since)
        assert name not in abandoned_shared_memory(time.time() + 60)
    finally:
        os.unlink(path)
