"""The FFN side of overlap.py as a process of its own: maps the calls' memory, and answers each call by a CUDA graph.

Started by overlap.py. The first line on standard input describes the memory and the weights; then every byte is a call, and
every byte on standard output says that an answer has been enqueued. End of file ends it.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from step3 import FFN_SEED, FFNStep, Shapes, random_on
from timing import capture
from torch import Tensor

READY = b"\xff"


def map_memory(description: dict[str, Any], device: torch.device) -> Tensor:
    """The other process's memory as bytes."""
    handle = [
        bytes.fromhex(part) if is_bytes else part
        for part, is_bytes in zip(description["memory"], description["is_bytes"], strict=True)
    ]
    handle[0] = device.index  # as this process counts devices
    storage = torch.UntypedStorage._new_shared_cuda(*handle)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def steps_over(memory: Tensor, description: dict[str, Any], device: torch.device) -> list[FFNStep]:
    """One for every micro-batch, on the same weights, its call and answer in the shared memory."""
    described = description["shapes"]
    shapes = Shapes(**(described | {"contexts": tuple(described["contexts"])}))
    steps: list[FFNStep] = []
    for index in range(len(description["sent"])):
        step = FFNStep(shapes, random_on(device, FFN_SEED), fp8=description["fp8"])
        if steps:
            step.gate_up, step.down = steps[0].gate_up, steps[0].down
        calls, answers = (
            step.x.numel() * step.x.element_size(),
            step.answer.numel() * step.answer.element_size(),
        )
        start = index * (calls + answers)
        step.x = memory[start : start + calls].view(step.x.dtype).view(step.x.shape)
        step.answer = (
            memory[start + calls : start + calls + answers].view(torch.float32).view(step.answer.shape)
        )
        steps.append(step)
    return steps


def main() -> None:
    said = os.dup(1)
    os.dup2(2, 1)  # whatever else prints does not look like an answer
    description = json.loads(_line())
    device = torch.device("cuda", torch.cuda.current_device())
    memory = map_memory(description, device)
    sent, answered = (
        [torch.cuda.Event.from_ipc_handle(device, bytes.fromhex(handle)) for handle in description[name]]
        for name in ("sent", "answered")
    )
    stream = torch.cuda.Stream()
    graphs = [capture(step.forward, stream) for step in steps_over(memory, description, device)]
    os.write(said, READY)
    while call := os.read(0, 1):
        index = call[0]
        with torch.cuda.stream(stream):
            stream.wait_event(sent[index])
            graphs[index].replay()
            answered[index].record(stream)
        os.write(said, call)
    torch.cuda.synchronize()


def _line() -> bytes:
    """Of standard input, byte by byte: those after it are calls."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            sys.exit("the other process has ended")
        line += byte
    return bytes(line)


if __name__ == "__main__":
    main()
