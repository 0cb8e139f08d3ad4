"""Which worker, layer or expert is slow, told from what the workers have done in the same stretch of time.

Pure functions on totals (types.WorkerTotals). What does not live here: the sums (layer_totals.py, kernels/call_account.py), when they
are read (straggler_watch.py), and what is shown of it.

Alike is compared with alike: a worker with those of its role, layer by layer, for equal numbers of batches and for equal numbers
of rows; a layer with those of its kind; an expert with those of its layer. The measure is the median of the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from afd_server.types import LayerTotal, WaitTotal, WorkerTotals

# From these ratios on something is said to be slow, or hot. Less is within what a busy host does to anybody.
SLOW_WORKER, SLOW_LAYER, HOT_EXPERT = 1.5, 1.5, 2.0
# Of the time that calls to a worker are waited for beyond what it says that they took: over that of its peers, and of all time.
LATE_WORKER, LATE_SHARE = 3.0, 0.05
# Fewer batches tell nothing, and who hardly computes holds up nobody.
MIN_BATCHES, MIN_BUSY_SHARE = 20, 0.01
MIN_CHOICES_PER_EXPERT = 20
NUM_HOTTEST = 8
# Upper bounds of an expert's load over the mean of its layer.
LOAD_BOUNDS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)


@dataclass(frozen=True, slots=True)
class WorkerPace:
    """slowness: of its seconds over what the median of its peers would have needed for its work; None without peers."""

    worker: str
    role: str
    batches: int
    rows: int
    seconds: float
    slowness: float | None


@dataclass(frozen=True, slots=True)
class LayerPace:
    """slowness: of a layer's mean seconds over the median of those of its kind, with or without experts, in the same role."""

    role: str
    layer: int
    batches: int
    mean_s: float
    slowness: float


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """load: how often it was chosen, over the mean of its layer's experts."""

    layer: int
    expert: int
    tokens: int
    load: float


@dataclass(frozen=True, slots=True)
class StragglerReport:
    """findings: sentences, of what stands out. seconds: of the time that is looked at; None: since the workers were loaded.

    waits: by attention worker. load_histogram: experts of all layers by load, [upper bound, number], the last bound None.
    expert_tokens: by layer with experts, in the order of their numbers.
    """

    findings: tuple[str, ...]
    seconds: float | None
    workers: tuple[WorkerPace, ...]
    layers: tuple[LayerPace, ...]
    waits: dict[str, tuple[WaitTotal, ...]]
    hottest_experts: tuple[ExpertLoad, ...]
    load_histogram: tuple[tuple[float | None, int], ...]
    expert_tokens: dict[int, tuple[int, ...]]


def straggler_report(totals: Sequence[WorkerTotals], seconds: float | None) -> StragglerReport:
    """Of what these workers did in so many seconds."""
    tokens = expert_tokens(totals)
    workers = tuple(_pace(each, [peer for peer in totals if _are_peers(each, peer)]) for each in totals)
    layers = tuple(pace for role in ("attention", "ffn") for pace in _layer_paces(role, totals, tokens))
    loads = sorted(_loads(tokens), key=lambda each: -each.load)
    found = (
        *_slow_workers(workers, seconds),
        *_late_workers(totals, seconds),
        *_slow_layers(layers),
        *_hot_experts(loads, tokens),
    )
    nothing = (
        "nothing ran" if not any(each.batches for each in workers) else "no worker, layer or expert stands out"
    )
    return StragglerReport(
        findings=found or (nothing,),
        seconds=seconds,
        workers=workers,
        layers=layers,
        waits={each.worker: each.waits for each in totals if each.waits},
        hottest_experts=tuple(loads[:NUM_HOTTEST]),
        load_histogram=_histogram(loads),
        expert_tokens=tokens,
    )


def done_since(now: WorkerTotals, before: WorkerTotals | None) -> WorkerTotals:
    """What it did between two readings. One that has been loaded again meanwhile counts from 0."""
    if before is None or _was_loaded_again(now, before):
        return now
    known = {each.worker: each for each in before.waits}
    return WorkerTotals(
        now.worker,
        now.role,
        tuple(
            LayerTotal(new.seconds - old.seconds, new.batches - old.batches, new.rows - old.rows)
            for new, old in zip(now.layers, before.layers, strict=True)
        ),
        tuple(_wait_since(each, known.get(each.worker, WaitTotal(each.worker))) for each in now.waits),
        now.first_expert,
        tuple(
            tuple(new - old for new, old in zip(news, olds, strict=True))
            for news, olds in zip(now.expert_tokens, before.expert_tokens, strict=True)
        ),
    )


def expert_tokens(totals: Iterable[WorkerTotals]) -> dict[int, tuple[int, ...]]:
    """How often each expert was chosen, by layer with experts: the sum over replicas."""
    found: dict[int, dict[int, int]] = {}
    for worker in totals:
        for layer, tokens in enumerate(worker.expert_tokens):
            by_expert = found.setdefault(layer, {})
            for expert, count in enumerate(tokens, start=worker.first_expert):
                by_expert[expert] = by_expert.get(expert, 0) + count
    return {
        layer: tuple(by_expert.get(expert, 0) for expert in range(max(by_expert) + 1))
        for layer, by_expert in sorted(found.items())
        if any(by_expert.values())
    }


def most_loaded(tokens: dict[int, tuple[int, ...]]) -> dict[int, float]:
    """By layer, the load of the expert that is chosen most, over the mean."""
    return {layer: max(counts) * len(counts) / sum(counts) for layer, counts in tokens.items()}


# --- workers -------------------------------------------------------------------------------------------------------


def _are_peers(one: WorkerTotals, other: WorkerTotals) -> bool:
    return one.role == other.role and one.worker != other.worker and len(one.layers) == len(other.layers)


def _pace(worker: WorkerTotals, peers: Sequence[WorkerTotals]) -> WorkerPace:
    batches, rows = (sum(getattr(each, name) for each in worker.layers) for name in ("batches", "rows"))
    seconds = sum(each.seconds for each in worker.layers)
    return WorkerPace(worker.worker, worker.role, batches, rows, seconds, _slowness(worker, peers))


def _slowness(worker: WorkerTotals, peers: Sequence[WorkerTotals]) -> float | None:
    """The smaller of two ratios: a batch of more rows may take longer, and a row of a small batch costs more."""
    spent_s = by_batches_s = by_rows_s = 0.0
    for layer, own in enumerate(worker.layers):
        others = [peer.layers[layer] for peer in peers if peer.layers[layer].batches]
        if own.batches and others:
            spent_s += own.seconds
            by_batches_s += own.batches * median(other.seconds / other.batches for other in others)
            by_rows_s += own.rows * median(other.seconds / max(1, other.rows) for other in others)
    expected_s = max(by_batches_s, by_rows_s)
    return spent_s / expected_s if expected_s > 0 else None


def _slow_workers(workers: Sequence[WorkerPace], seconds: float | None) -> Iterable[str]:
    for each in workers:
        if each.slowness is None or each.slowness < SLOW_WORKER or each.batches < MIN_BATCHES:
            continue
        if seconds is not None and each.seconds < MIN_BUSY_SHARE * seconds:
            continue
        peers = [
            peer for peer in workers if peer.role == each.role and peer.worker != each.worker and peer.batches
        ]
        theirs_s = median(peer.seconds / peer.batches for peer in peers)
        rows = median(peer.rows / peer.batches for peer in peers)
        yield (
            f"{each.worker} is slow: it takes {each.slowness:.1f} times as long as the median of its peers for the same work "
            f"({_ms(each.seconds / each.batches)} a batch of {each.rows / each.batches:.1f} rows, "
            f"they {_ms(theirs_s)} of {rows:.1f})"
        )


def _late_workers(totals: Sequence[WorkerTotals], seconds: float | None) -> Iterable[str]:
    """FFN workers whose answers come late although they do not compute for longer, as their callers see it."""
    calls: dict[str, int] = {}
    late_s: dict[str, float] = {}
    for wait in (wait for worker in totals for wait in worker.waits):
        calls[wait.worker] = calls.get(wait.worker, 0) + wait.calls
        beyond_s = max(0.0, wait.waited_s - wait.ffn_s - wait.queue_s)
        late_s[wait.worker] = late_s.get(wait.worker, 0.0) + beyond_s
    mean_s = {worker: late_s[worker] / count for worker, count in calls.items() if count >= MIN_BATCHES}
    for worker, own_s in mean_s.items():
        theirs_s = median([other_s for other, other_s in mean_s.items() if other != worker] or [own_s])
        matters = seconds is not None and late_s[worker] >= LATE_SHARE * seconds
        if own_s > LATE_WORKER * theirs_s and matters:
            yield (
                f"answers of {worker} come late: its callers stand still for {_ms(own_s)} a call beyond what it says that it took, "
                f"for its peers {_ms(theirs_s)} (its host is busy, it has more callers, or the way to it is slow)"
            )


# --- layers --------------------------------------------------------------------------------------------------------


def _layer_paces(
    role: str, totals: Sequence[WorkerTotals], tokens: dict[int, tuple[int, ...]]
) -> Iterable[LayerPace]:
    sums: dict[int, list[LayerTotal]] = {}
    for worker in totals:
        if worker.role == role:
            for layer, total in enumerate(worker.layers):
                sums.setdefault(layer, []).append(total)
    batches = {layer: sum(each.batches for each in parts) for layer, parts in sums.items()}
    means = {
        layer: sum(each.seconds for each in parts) / batches[layer]
        for layer, parts in sums.items()
        if batches[layer]
    }
    for layer, mean_s in means.items():
        like_it = [other_s for other, other_s in means.items() if (other in tokens) == (layer in tokens)]
        usual_s = median(like_it)
        yield LayerPace(role, layer, batches[layer], mean_s, mean_s / usual_s if usual_s > 0 else 1.0)


def _slow_layers(layers: Sequence[LayerPace]) -> Iterable[str]:
    for each in layers:
        if each.layer == 0:
            continue  # the embedding is in its time, and the caches hold other things when it begins
        if each.slowness >= SLOW_LAYER and each.batches >= MIN_BATCHES:
            yield (
                f"layer {each.layer} is slow in the {each.role} workers: {_ms(each.mean_s)} a batch, "
                f"{each.slowness:.1f} times the median of the layers like it"
            )


# --- experts -------------------------------------------------------------------------------------------------------


def _loads(tokens: dict[int, tuple[int, ...]]) -> Iterable[ExpertLoad]:
    for layer, counts in tokens.items():
        mean = sum(counts) / len(counts)
        for expert, count in enumerate(counts):
            yield ExpertLoad(layer, expert, count, count / mean)


def _histogram(loads: Sequence[ExpertLoad]) -> tuple[tuple[float | None, int], ...]:
    if not loads:
        return ()
    counts = [0] * (len(LOAD_BOUNDS) + 1)
    for each in loads:
        counts[sum(each.load > bound for bound in LOAD_BOUNDS)] += 1
    return tuple(zip((*LOAD_BOUNDS, None), counts, strict=True))


def _hot_experts(loads: Sequence[ExpertLoad], tokens: dict[int, tuple[int, ...]]) -> Iterable[str]:
    """loads: the highest first."""
    for each in loads[:NUM_HOTTEST]:
        total, number = sum(tokens[each.layer]), len(tokens[each.layer])
        if each.load >= HOT_EXPERT and total >= MIN_CHOICES_PER_EXPERT * number:
            yield (
                f"expert {each.expert} of layer {each.layer} is hot: {each.load:.1f} times the mean of its layer "
                f"({each.tokens} of {total} choices among {number} experts)"
            )


# -------------------------------------------------------------------------------------------------------------------


def _was_loaded_again(now: WorkerTotals, before: WorkerTotals) -> bool:
    return _shape(now) != _shape(before) or any(
        new.batches < old.batches or new.rows < old.rows or new.seconds < old.seconds
        for new, old in zip(now.layers, before.layers, strict=True)
    )


def _shape(totals: WorkerTotals) -> tuple[int, int, list[int]]:
    """Another one, and it is another shard."""
    return len(totals.layers), totals.first_expert, [len(each) for each in totals.expert_tokens]


def _wait_since(now: WaitTotal, before: WaitTotal) -> WaitTotal:
    return WaitTotal(
        now.worker,
        now.calls - before.calls,
        now.ffn_s - before.ffn_s,
        now.queue_s - before.queue_s,
        now.waited_s - before.waited_s,
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.3g} us"
