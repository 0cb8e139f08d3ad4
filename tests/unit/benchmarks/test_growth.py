"""The lines of growth.py and what memory.py reads of processes: the parts that need no measurement."""

import json
import os
from pathlib import Path

import pytest
import torch
from checkpoints import SHAPES, config
from growth import APART, MERGED, best, decode_s, decoding, replicas_s
from load import Result
from memory import kv_bytes, own_and_slots, proportional, status
from plots.draw import Curve, Plot, draw, table
from roofline import Limits

from afd_server.kernels.memory import allocate
from afd_server.models.families import read_model_spec

LIMITS = Limits(bytes_per_s=2e10, flop_per_s=2e11)


@pytest.fixture
def spec(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config(SHAPES["tiny"])))
    return read_model_spec(tmp_path)


def test_one_replica_is_one_step_of_the_roofline(spec):
    lines = replicas_s(spec, LIMITS, 1, 8, 64)
    assert lines == pytest.approx({name: decode_s(spec, LIMITS, 8, 64) for name in (MERGED, APART)})


def test_replicas_share_the_machine_and_merged_calls_read_an_expert_once(spec):
    one, three = replicas_s(spec, LIMITS, 1, 8, 64), replicas_s(spec, LIMITS, 3, 8, 64)
    assert three[APART] == pytest.approx(3 * one[APART])
    assert one[APART] < three[MERGED] < three[APART]


def test_a_step_grows_with_the_context_by_the_bytes_of_the_cache(spec):
    """8 layers, 2 x 2 heads of 64 floats a token, at a batch that reads rather than computes."""
    entry_bytes = 8 * 2 * 2 * 64 * 4
    grown_s = decode_s(spec, LIMITS, 4, 4096) - decode_s(spec, LIMITS, 4, 1024)
    assert grown_s == pytest.approx(4 * 3072 * entry_bytes / LIMITS.bytes_per_s)


def test_the_best_limit_is_taken_of_each_kind():
    assert best([Limits(1.0, 4.0), Limits(2.0, 3.0), Limits(1.5, 1.0)]) == Limits(2.0, 4.0)


@pytest.mark.parametrize("context", [1, 16, 17])
def test_a_decode_step_has_one_row_a_request_in_blocks_of_its_own(context):
    requests = decoding(5, context, 100, 12, torch.Generator().manual_seed(0))
    blocks = [block for request in requests for block in request.block_table]
    assert len(blocks) == len(set(blocks)) == 5 * (1 if context <= 16 else 2)
    assert max(blocks) < 12
    assert {(request.start_position, len(request.token_ids)) for request in requests} == {(context - 1, 1)}


def test_a_plot_is_a_small_picture_and_a_row_a_point(tmp_path):
    pytest.importorskip("matplotlib")
    curve = Curve("batch 1", [1, 64, 8192], [0.010, 0.012, 0.04], {"roofline": [0.008, 0.009, 0.01]})
    plot = Plot("context", "context, tokens", "4 layers", 2e10, 2e11, [curve])
    file = draw(plot, "here", tmp_path / "plots")
    assert file.read_bytes().startswith(b"\x89PNG")
    assert file.stat().st_size < 100_000
    rows = table(plot).splitlines()
    assert len(rows) == 2 + 3
    assert rows[-1].split()[-4:] == ["40.00", "roofline", "10.00", "25%"]


SMAPS = """\
55d0c0000000-55d0c0021000 rw-p 00000000 00:00 0                          [heap]
Rss:                 100 kB
Pss:                 100 kB
7f0000000000-7f0000400000 rw-s 00000000 00:01 2055                       /dev/zero (deleted)
Pss:                4096 kB
7f0000400000-7f0000500000 rw-s 00000000 00:01 2057                       /memfd:afd-link (deleted)
Rss:                1024 kB
Pss:                 512 kB
7f0000500000-7f0000600000 rw-p 00000000 00:00 0
Pss:                   8 kB
7f0000600000-7f0000700000 rw-p 00000000 00:00 0
Pss:                   4 kB
7f0000700000-7f0000800000 r--p 00000000 fe:00 77                         /models/a b/model.safetensors
Pss:                 900 kB
"""


def test_mappings_are_added_up_by_their_name():
    kilobytes = {name: size // 1024 for name, size in proportional(SMAPS).items()}
    assert kilobytes == {
        "[heap]": 100, "/dev/zero": 4096, "/memfd:afd-link": 512, "": 12, "/models/a b/model.safetensors": 900,
    }  # fmt: skip


def test_own_memory_is_what_no_file_backs():
    """On this process: a written tensor counts, and all of it together is no more than what the process has."""
    before, slots_before = own_and_slots(os.getpid())
    written = allocate(32 << 20).fill_(1)  # malloc might have as much left of something freed
    after, slots = own_and_slots(os.getpid())
    assert after - before > 24 << 20
    assert slots <= slots_before  # of other tests' links, until they are collected
    assert after <= status(os.getpid())["VmHWM"]
    del written


def test_a_request_fills_blocks_with_all_but_its_last_token(spec):
    """17 tokens of prompt and 16 of output are 32 entries, two blocks; one more is a third."""
    block_bytes = 16 * 8 * 2 * 2 * 64 * 4
    for output, blocks in ((16, 2), (17, 3)):
        result = Result(4, 4, 4 * 17, 4 * output, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
        assert kv_bytes(spec, result) == 4 * blocks * block_bytes


def test_the_status_of_a_process_is_in_bytes():
    kilobytes = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    assert status(os.getpid())["VmHWM"] >= kilobytes * 1024
