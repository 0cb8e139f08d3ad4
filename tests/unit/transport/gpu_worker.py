"""What the processes of test_device_memory_on_gpu.py do: an FFN worker, and an attention worker that is killed."""

from __future__ import annotations

import contextlib
import os
import signal
from multiprocessing.connection import Connection

import torch

from afd_server.errors import WorkerDiedError
from afd_server.models.ffn_call import FFNCall
from afd_server.transport.base import CallTag, Endpoint, LinkShape
from afd_server.transport.connect import connect
from afd_server.transport.listener import SocketListener

SECRET = b"the cluster's secret"
DEADLINE_S = 60.0
UNANSWERED_LAYER = 9


def serve_doubled(pipe: Connection, device: torch.device) -> None:
    """Answers each call with 2 x + the sum of its experts' ids and weights, until the pipe says or ends otherwise."""
    listener = SocketListener("ffn-0", "node", SECRET, device=device)
    pipe.send(listener.endpoint)
    with torch.inference_mode():
        while not pipe.poll():
            for incoming in listener.wait(0.02):
                call = incoming.call
                if call.layer == UNANSWERED_LAYER:
                    continue
                y_TH = call.x.to(device, torch.float32) * 2
                if call.topk_ids is not None:
                    y_TH += (call.topk_ids * call.topk_weights).sum(dim=1, keepdim=True).to(device)
                incoming.answer_buffer().copy_(y_TH)
                with contextlib.suppress(WorkerDiedError):  # the one that is killed
                    incoming.answer(1, len(y_TH))
    listener.close()


def call_and_be_killed(pipe: Connection, device: torch.device, endpoint: Endpoint, shape: LinkShape) -> None:
    """Has a call answered, sends another, and is gone."""
    link = connect(endpoint, shape, 1, SECRET, "shm", DEADLINE_S, device)
    call = FFNCall(0, torch.ones(shape.max_rows, shape.hidden_size, device=device), None, None)
    link.send(CallTag(1, 1, 0, 0), call)
    y_TH = link.receive(CallTag(1, 1, 0, 0), DEADLINE_S).y
    link.send(CallTag(1, 2, 0, 0), call)
    pipe.send((link._slots.on_host, float(y_TH.float().mean())))
    os.kill(os.getpid(), signal.SIGKILL)
