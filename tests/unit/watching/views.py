"""A server in the middle of its work, as it tells of itself."""

import dataclasses
import json

from afd_server.telemetry.metrics import Metrics
from afd_server.telemetry.stragglers import straggler_report
from afd_server.types import LayerTotal, ReplicaStats, StepTiming, WaitTotal, WorkerState, WorkerTotals
from afd_server.watching.frame import View
from afd_server.watching.samples import Samples

TOTALS = [
    WorkerTotals("attention-0", "attention", (LayerTotal(0.2, 100, 800),) * 2, (WaitTotal("ffn-0", 200, 0.8, 0.1, 1.0),)),
    WorkerTotals("ffn-0", "ffn", (LayerTotal(0.4, 100, 800),) * 2, (), 0, ((900, 100), (500, 500))),
    WorkerTotals("ffn-1", "ffn", (LayerTotal(1.2, 100, 800),) * 2, (), 2, ((300, 300), (500, 500))),
]  # fmt: skip
STATES = [
    dataclasses.asdict(state)
    for state in (
        WorkerState("attention-0", "attention", "serving", 4000.0, "node", 17, 0),
        WorkerState("ffn-0", "ffn", "serving", 130.0, "node", 18, 2),
        WorkerState("ffn-1", "ffn", "down", 3.0, None, None, 1, "has not answered for 10 s"),
    )
]
# As JSON gives it back.
REPORT = json.loads(json.dumps(dataclasses.asdict(straggler_report(TOTALS, 50.0))))


def exposition():
    metrics = Metrics("tiny-model")
    metrics.observe_prompt(64)
    for since_s in (0.2, 0.02, 0.02, 0.03):
        metrics.observe_tokens(1, since_s, first=since_s == 0.2)
    timing = StepTiming(0.02, 0.008, 0.006, 0.002, 0.008, num_hops=4, num_micro_batches=2, ffn_rows=32)
    metrics.observe_step("attention-0", ReplicaStats(8, 3, 100, 42, timing=timing))
    metrics.stragglers.observe(TOTALS, straggler_report(TOTALS, None))
    return metrics.exposition()


def view(**changes):
    samples = Samples.parse(exposition().decode())
    values = {
        "url": "http://127.0.0.1:8000", "clock": "12:00:00", "now": samples, "recent": samples, "seconds": 10.0,
        "workers": STATES, "change": None, "report": REPORT,
    }  # fmt: skip
    return View(**values | changes)
