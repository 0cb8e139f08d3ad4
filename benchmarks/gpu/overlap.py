"""Both parts of a layer on one device at once: as two streams of this process, and as two processes that share memory.

What lives here: the driver of both, which is the attention side. What does not: the other process (ffn_process.py).
Micro-batches are called a and b; a's FFN step runs while b is in attention.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from step3 import AttentionPart, FFNStep, Shapes
from timing import capture

LAYERS = 61
START_S, ANSWER_S = 180.0, 30.0  # how long the other process may take to be ready, and to answer a call


def two_streams_s(attention: Sequence[AttentionPart], ffn: FFNStep) -> dict[str, float]:
    """Seconds per layer and micro-batch: each part alone, one after the other, and two micro-batches in turns."""
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    attend = [capture(part.forward, streams[0]) for part in attention]
    compute = capture(ffn.forward, streams[1])

    def run(micro_batches: int, *, attends: bool = True, computes: bool = True) -> float:
        answered = [torch.cuda.Event() for _ in range(micro_batches)]
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(LAYERS):
            for index in range(micro_batches):
                with torch.cuda.stream(streams[0]):
                    streams[0].wait_event(answered[index])
                    if attends:
                        attend[index].replay()
                    sent = streams[0].record_event()
                with torch.cuda.stream(streams[1]):
                    streams[1].wait_event(sent)
                    if computes:
                        compute.replay()
                    answered[index].record(streams[1])
        torch.cuda.synchronize()
        return (time.perf_counter() - started) / LAYERS / micro_batches

    run(2)
    return {
        "attention_alone_s": run(1, computes=False), "ffn_alone_s": run(1, attends=False),
        "one_micro_batch_s": run(1), "two_micro_batches_s": run(2),
    }  # fmt: skip


def two_processes_s(
    attention: Sequence[AttentionPart], ffn: FFNStep, shapes: Shapes, *, fp8: bool
) -> dict[str, float]:
    """Seconds per layer and micro-batch, with one micro-batch and with two; and of a call alone, out and back.

    The other process maps this one's memory (CUDA IPC), reads each call there and writes its answer there: nothing is copied.
    A doorbell of one byte says that the event behind which the device must wait has been recorded.
    """
    shared = SharedCalls(ffn, len(attention))
    peer = Peer({"shapes": asdict(shapes), "fp8": fp8, **shared.description()})
    stream = torch.cuda.Stream()
    attend = [capture(part.forward, stream) for part in attention]

    def run(micro_batches: int, *, attends: bool) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        for step in range(LAYERS + 1):
            for index in range(micro_batches):
                with torch.cuda.stream(stream):
                    if step:
                        peer.wait(index)
                        stream.wait_event(shared.answered[index])
                    if step == LAYERS:
                        continue
                    if attends:
                        attend[index].replay()
                    shared.sent[index].record(stream)
                peer.ring(index)
        torch.cuda.synchronize()
        return (time.perf_counter() - started) / LAYERS / micro_batches

    try:
        run(len(attention), attends=True)
        shared.forget_answers()
        times = {
            "call_alone_s": run(1, attends=False),
            "one_micro_batch_s": run(1, attends=True),
            "two_micro_batches_s": run(2, attends=True),
        }
        expected = ffn.forward()
        error = max(float((answer - expected).norm() / expected.norm()) for answer in shared.answers)
    finally:
        peer.close()
    if not error < 1e-3:
        raise RuntimeError(f"the other process's answers are {error:.3g} away from this one's")
    return times


class SharedCalls:
    """Calls and answers of every micro-batch in memory that another process can map, and events that it can wait for."""

    def __init__(self, ffn: FFNStep, micro_batches: int) -> None:
        self.rows = len(ffn.x)
        calls = ffn.x.numel() * ffn.x.element_size()
        answers = ffn.answer.numel() * ffn.answer.element_size()
        self._memory = torch.empty(micro_batches * (calls + answers), dtype=torch.uint8, device=ffn.x.device)
        self.answers = []
        for index in range(micro_batches):
            start = index * (calls + answers)
            self._memory[start : start + calls].view(ffn.x.dtype).view(ffn.x.shape).copy_(ffn.x)
            answer = self._memory[start + calls : start + calls + answers]
            self.answers.append(answer.view(torch.float32).view(ffn.answer.shape))
        self.sent, self.answered = (
            [torch.cuda.Event(interprocess=True) for _ in range(micro_batches)] for _ in range(2)
        )
        for event in (*self.sent, *self.answered):
            event.record()
        torch.cuda.synchronize()

    def forget_answers(self) -> None:
        for answer in self.answers:
            answer.fill_(float("nan"))

    def description(self) -> dict[str, Any]:
        """For ffn_process.py, in what JSON can say: bytes as hexadecimal digits."""
        handle = self._memory.untyped_storage()._share_cuda_()
        return {
            "memory": [part.hex() if isinstance(part, bytes) else part for part in handle],
            "is_bytes": [isinstance(part, bytes) for part in handle],
            "rows": self.rows,
            "sent": [event.ipc_handle().hex() for event in self.sent],
            "answered": [event.ipc_handle().hex() for event in self.answered],
        }


class Peer:
    """The FFN's process. Bytes to it are calls, bytes from it answers: the micro-batch's number each."""

    def __init__(self, description: dict[str, Any]) -> None:
        script = Path(__file__).with_name("ffn_process.py")
        self._process = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        self._to.write(json.dumps(description).encode() + b"\n")
        try:
            self._read(START_S)
        except BaseException:
            self.close()
            raise

    def ring(self, micro_batch: int) -> None:
        self._to.write(bytes([micro_batch]))

    def wait(self, micro_batch: int) -> None:
        answered = self._read(ANSWER_S)
        if answered != micro_batch:
            raise RuntimeError(f"the FFN process answered micro-batch {answered}, not {micro_batch}")

    def _read(self, timeout_s: float) -> int:
        if not select.select([self._from], [], [], timeout_s)[0]:
            raise TimeoutError(f"the FFN process said nothing for {timeout_s:.0f} s")
        byte = self._from.read(1)
        if not byte:
            raise RuntimeError(f"the FFN process has ended with code {self._process.wait(10)}")
        return byte[0]

    def close(self) -> None:
        """End of file ends it; a process that hangs is killed."""
        self._to.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
