"""How a decode step's time grows: with context, batch, experts and attention replicas, beside what the roofline says.

    .venv/bin/python benchmarks/growth.py           # under 6 minutes; writes benchmarks/plots/*.png
    .venv/bin/python benchmarks/growth.py --quick   # a look at fewer layers and points, in a minute or two; no plots

Context, batch and experts: both halves of a random model called one after the other in this process, so that nothing but
the step is measured: no wire, no scheduler, no sampling. The layers are those of checkpoints.py's "small", few of them:
depth only multiplies. Each request decodes one token. Tokens are random in every step, so that experts are; cached keys and
values are random too, since untouched memory is not read at all. A point is the mean of some steps, in the fastest sweep.
Experts are added at the same width, 4 of them for each token whatever their number: the model grows, the work does not.

Replicas: the server itself on "tiny", the same number of clients for each replica, times to the next token as clients see
them. All replicas share this machine's cores and memory, so their attention adds up. What the one FFN worker does adds up as
well unless it finds calls of several replicas waiting for the same layer: "merged" is the model where it always does, "apart" where
it never does.

The model is roofline.py's step, on the limits that machine.py measures after each point of a plot, the best of them. Its share
of the measured time is printed: where it stays the same along a curve, the step grows as the model says. Where the limits
lie far apart, others used the machine, and the points are worth little. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from checkpoints import SHAPES, Shape, config, write_tokenizer, write_weights
from load import Load, measure
from machine import fastest_s, flop_per_s, read_bytes_per_s
from plots.draw import Curve, Plot, draw, table
from results import commit, machine
from roofline import Limits, step_s
from servers import running, server

from afd_server.kvcache.storage import allocate_cache
from afd_server.models.batch import AttentionBatch
from afd_server.models.checkpoint import load_attention_half, load_ffn_half, operations_for
from afd_server.models.families import read_model_spec
from afd_server.models.halves import FFNShard
from afd_server.models.spec import DenseSpec, ModelSpec
from afd_server.types import ScheduledRequest

PLOTS = Path(__file__).parent / "plots"
CPU = torch.device("cpu")
BLOCK_SIZE = 16
ELEMENT_BYTES = 4  # float32
SWEEPS = 5  # the fastest counts: others may use the machine


@dataclass(frozen=True)
class Sizes:
    """What is measured: contexts at each of context_batches, batches at each of batch_contexts, and so on."""

    layers: Shape
    contexts: tuple[int, ...]
    context_batches: tuple[int, ...]
    batches: tuple[int, ...]
    batch_contexts: tuple[int, ...]
    experts: tuple[int, ...]
    expert_layers: int
    expert_batches: tuple[int, ...]
    replicas: tuple[int, ...]
    steps: int  # of a sweep
    load: Load


FULL = Sizes(
    layers=replace(SHAPES["small"], layers=4),
    contexts=(1, 4, 16, 64, 256, 1024, 4096, 8192),
    context_batches=(1, 8),
    batches=(1, 2, 4, 8, 16, 32, 64, 128),
    batch_contexts=(64, 512),
    experts=(8, 16, 32, 64, 128),
    expert_layers=2,
    expert_batches=(1, 8, 32),
    replicas=(1, 2, 3, 4),
    steps=6,
    load=Load(rounds=1, input_words=32, output_tokens=64),
)
QUICK = replace(
    FULL,
    layers=replace(SHAPES["small"], layers=1, vocab=8192),
    contexts=(1, 64, 1024),
    batches=(1, 8, 64),
    batch_contexts=(64,),
    experts=(8, 32),
    expert_layers=1,
    expert_batches=(8,),
    replicas=(1, 2),
    steps=3,
    load=Load(rounds=1, input_words=32, output_tokens=32),
)
REPLICA_CLIENTS = 8  # of each replica
ROOFLINE, MERGED, APART = "roofline", "roofline, merged", "roofline, apart"
EXPERT_CONTEXT = 64


# --- the halves in this process ------------------------------------------------------------------------------------------


class Halves:
    """Both halves of a random model with a filled cache, called in turn as the two workers would be."""

    def __init__(self, directory: Path, cache_tokens: int) -> None:
        self.spec = read_model_spec(directory)
        where = {"device": CPU, "dtype": torch.float32, "gate_on": "attention",
                 "operations": operations_for(CPU, torch.float32, "native")}  # fmt: skip
        self._attention = load_attention_half(directory, self.spec, **where)  # type: ignore[arg-type]
        self._ffn = load_ffn_half(directory, self.spec, FFNShard(), **where)  # type: ignore[arg-type]
        self.num_blocks = -(-cache_tokens // BLOCK_SIZE)
        self._cache = allocate_cache(self.spec, self.num_blocks, BLOCK_SIZE, CPU, torch.float32)
        for layer in self._cache:
            layer.normal_()

    @torch.inference_mode()
    def step(self, requests: Sequence[ScheduledRequest], chosen: list[torch.Tensor]) -> torch.Tensor:
        """Logits of the requests; chosen grows by the experts' ids of each layer, [T, K]."""
        forward_pass = self._attention.forward(AttentionBatch.build(requests, BLOCK_SIZE, CPU), self._cache)
        answer = None
        while True:
            try:
                call = forward_pass.send(answer)  # type: ignore[arg-type]  # a generator starts with None
            except StopIteration as end:
                return self._attention.logits(end.value)
            chosen.append(call.topk_ids)
            answer = self._ffn.forward(call)

    def mean_step_s(self, steps: Sequence[Sequence[ScheduledRequest]]) -> tuple[float, float]:
        """Seconds of a step in the fastest sweep through them, and the different experts that a layer had to read."""
        chosen: list[torch.Tensor] = []

        def sweep() -> None:
            chosen.clear()
            for requests in steps:
                self.step(requests, chosen)

        seconds = fastest_s(sweep, SWEEPS) / len(steps)
        return seconds, sum(len(ids.unique()) for ids in chosen) / len(chosen)


def decoding(
    batch: int, context: int, vocab: int, num_blocks: int, generator: torch.Generator
) -> list[ScheduledRequest]:
    """A step in which each of the requests decodes a random token, the last of `context` ones, in blocks of its own."""
    each = -(-context // BLOCK_SIZE)
    tables = torch.randperm(num_blocks, generator=generator)[: batch * each].view(batch, each).tolist()
    tokens = torch.randint(vocab, (batch,), generator=generator).tolist()
    return [
        ScheduledRequest(str(index), context - 1, (token,), tuple(table), samples=True)
        for index, (token, table) in enumerate(zip(tokens, tables, strict=True))
    ]


def random_checkpoint(shape: Shape, directory: Path) -> Path:
    (directory / "config.json").write_text(json.dumps(config(shape)))
    write_weights(shape, directory, seed=0)
    return directory


# --- the model -------------------------------------------------------------------------------------------------------


def decode_s(spec: ModelSpec, limits: Limits, batch: int, context: float) -> float:
    """Seconds that the roofline gives one decode step."""
    return step_s(
        spec, limits, rows=batch, samples=batch, context=context, kv_reads=batch * context, size=ELEMENT_BYTES
    )


def replicas_s(spec: ModelSpec, limits: Limits, replicas: int, batch: int, context: float) -> dict[str, float]:
    """Seconds in which every replica decodes one step of `batch` rows, FFN calls of all replicas merged, or none."""
    without_ffn = replace(spec, ffn=(DenseSpec(0),) * spec.num_layers)

    def ffn_s(rows: int) -> float:
        return decode_s(spec, limits, rows, context) - decode_s(without_ffn, limits, rows, context)

    attention_s = replicas * decode_s(without_ffn, limits, batch, context)
    return {MERGED: attention_s + ffn_s(replicas * batch), APART: attention_s + replicas * ffn_s(batch)}


def measured_limits() -> Limits:
    threads = torch.get_num_threads()
    return Limits(read_bytes_per_s(threads), flop_per_s(threads))


def best(seen: Sequence[Limits]) -> Limits:
    return Limits(max(each.bytes_per_s for each in seen), max(each.flop_per_s for each in seen))


# --- the four plots --------------------------------------------------------------------------------------------------


def measured_curve(
    name: str, halves: Halves, sizes: Sizes, points: Sequence[tuple[int, int, int]], seen: list[Limits]
) -> Curve:
    """points: (x, batch, context). seen grows by the machine's limits after each."""
    curve = Curve(name)
    generator = torch.Generator().manual_seed(0)
    for x, batch, context in points:
        steps = [
            decoding(batch, context, halves.spec.vocab_size, halves.num_blocks, generator)
            for _ in range(sizes.steps)
        ]
        seconds, experts = halves.mean_step_s(steps)
        curve.xs.append(x)
        curve.measured_s.append(seconds)
        seen.append(measured_limits())
        print(f"  {name}, {x:>4}: {seconds * 1e3:>8.2f} ms, {experts:.1f} experts read in a layer, "
              f"{seen[-1].bytes_per_s / 1e9:.1f} GB/s", flush=True)  # fmt: skip
    return curve


def context_and_batch(sizes: Sizes) -> Iterator[Plot]:
    """Two plots on one model."""
    shape = sizes.layers
    about = f"{shape.layers} x small's layer: hidden {shape.hidden}, {shape.experts} experts of width {shape.expert_width}"
    most = max(max(sizes.contexts) * max(sizes.context_batches), max(sizes.batches) * max(sizes.batch_contexts))
    with tempfile.TemporaryDirectory(prefix="growth-") as directory:
        halves = Halves(random_checkpoint(shape, Path(directory)), most)
    spec = halves.spec

    curves, seen = [], list[Limits]()
    for batch in sizes.context_batches:
        points = [(context, batch, context) for context in sizes.contexts]
        curves.append(measured_curve(f"batch {batch}", halves, sizes, points, seen))
    limits = best(seen)
    for curve, batch in zip(curves, sizes.context_batches, strict=True):
        curve.model_s[ROOFLINE] = [decode_s(spec, limits, batch, context) for context in curve.xs]
    yield Plot("context", "context, tokens", about, limits.bytes_per_s, limits.flop_per_s, curves)

    curves, seen = [], []
    for context in sizes.batch_contexts:
        points = [(batch, batch, context) for batch in sizes.batches]
        curves.append(measured_curve(f"context {context}", halves, sizes, points, seen))
    limits = best(seen)
    for curve, context in zip(curves, sizes.batch_contexts, strict=True):
        curve.model_s[ROOFLINE] = [decode_s(spec, limits, batch, context) for batch in curve.xs]
    yield Plot("batch", "batch, requests", about, limits.bytes_per_s, limits.flop_per_s, curves)


def experts(sizes: Sizes) -> Plot:
    """One model for each number of experts; every batch on each."""
    shape = replace(sizes.layers, layers=sizes.expert_layers, vocab=8192)
    about = f"{shape.layers} x small's layer: hidden {shape.hidden}, width {shape.expert_width}, {shape.top_k} experts a token; context {EXPERT_CONTEXT}"
    curves = {batch: Curve(f"batch {batch}") for batch in sizes.expert_batches}
    specs, seen = [], list[Limits]()
    for count in sizes.experts:
        with tempfile.TemporaryDirectory(prefix="growth-") as directory:
            checkpoint = random_checkpoint(replace(shape, experts=count), Path(directory))
            halves = Halves(checkpoint, max(sizes.expert_batches) * EXPERT_CONTEXT)
        specs.append(halves.spec)
        for batch, curve in curves.items():
            point = measured_curve(curve.name, halves, sizes, [(count, batch, EXPERT_CONTEXT)], seen)
            curve.xs += point.xs
            curve.measured_s += point.measured_s
    limits = best(seen)
    for batch, curve in curves.items():
        curve.model_s[ROOFLINE] = [decode_s(spec, limits, batch, EXPERT_CONTEXT) for spec in specs]
    found = list(curves.values())
    return Plot("experts", "experts in a layer", about, limits.bytes_per_s, limits.flop_per_s, found)


def replicas(sizes: Sizes) -> Plot:
    """The server, started anew for each number of replicas."""
    load = sizes.load
    context = load.input_words + load.output_tokens / 2
    curve = Curve(f"{REPLICA_CLIENTS} clients each", model_s={MERGED: [], APART: []})
    seen: list[Limits] = []
    with tempfile.TemporaryDirectory(prefix="growth-") as directory:
        model = random_checkpoint(SHAPES["tiny"], Path(directory))
        write_tokenizer(SHAPES["tiny"].vocab, model)
        spec = read_model_spec(model)
        for count in sizes.replicas:
            with running(server("afd", f"--attention-workers {count}"), model, "float32") as (url, _):
                clients = REPLICA_CLIENTS * count
                measure(url, None, clients, replace(load, output_tokens=8, seed=load.seed + 1))
                tpot_ms = measure(url, None, clients, load).tpot_p50_ms
            curve.xs.append(count)
            curve.measured_s.append(tpot_ms / 1e3)
            seen.append(measured_limits())
            print(
                f"  {curve.name}, {count}: {tpot_ms:>8.2f} ms, {seen[-1].bytes_per_s / 1e9:.1f} GB/s",
                flush=True,
            )
    limits = best(seen)
    for count in curve.xs:
        for name, seconds in replicas_s(spec, limits, count, REPLICA_CLIENTS, context).items():
            curve.model_s[name].append(seconds)
    return Plot(
        "replicas", "attention replicas on this host", "the server on tiny, 1 FFN worker",
        limits.bytes_per_s, limits.flop_per_s, [curve],
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller shapes and fewer points")
    parser.add_argument(
        "--only", nargs="+", choices=["halves", "experts", "replicas"], help="one part, not all"
    )
    parser.add_argument(
        "--plots", type=Path, help="directory for the plots; default: benchmarks/plots, with --quick none"
    )
    arguments = parser.parse_args()
    directory = arguments.plots or (None if arguments.quick else PLOTS)
    if directory and importlib.util.find_spec("matplotlib") is None:
        parser.error("the plots need matplotlib: pip install -e '.[bench]'")
    sizes = QUICK if arguments.quick else FULL
    parts = arguments.only or ["halves", "experts", "replicas"]
    measured = commit()  # before the plots change the tree
    plots: list[Plot] = []
    if "halves" in parts:
        plots += context_and_batch(sizes)
    if "experts" in parts:
        plots.append(experts(sizes))
    if "replicas" in parts:
        plots.append(replicas(sizes))
    for plot in plots:
        print(table(plot), end="\n\n", flush=True)
        if directory:
            draw(
                plot,
                f"{machine()}, commit {measured}; roofline at {plot.limits}, measured in the same run",
                directory,
            )
    print(json.dumps({
        "commit": measured, "machine": machine(), "quick": arguments.quick,
        "plots": [dataclasses.asdict(plot) for plot in plots],
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
