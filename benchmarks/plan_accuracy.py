"""The planner's step time against the measured one: one attention and one FFN worker on this machine.

    .venv/bin/python benchmarks/plan_accuracy.py /tmp/tiny --rounds 2 [--concurrency 1 8 32] [--context 128 1024]

Each round lets real requests decode on the server's own workers (step_profile.py), profiles the checkpoint (`afd profile`), and
lets them decode again: a shared machine's memory changes its speed from one minute to the next, so what is compared with the
profile is the mean of what was before and after it. The prediction is the planner's for one worker of each kind with the profile's
times, at the requests' mean context; measured is the median step, from the end of one to the end of the next. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from results import commit, machine

from afd_server.planner.hardware import choose, read_hardware
from afd_server.planner.layout import Layout, Workload, predict
from afd_server.planner.model_config import read_counted_model
from afd_server.planner.profile_file import Profile, read_profile

OUTPUT_TOKENS = 48
CARD = "cpu-epyc"  # its memory and price play no part here
PROMISED = 0.15
PARTS = ("attention", "FFN", "wire", "once", "step")


@dataclass(frozen=True)
class Case:
    """So many requests decode after prompts of so many tokens."""

    concurrency: int
    input_tokens: int

    @property
    def context(self) -> int:
        return self.input_tokens + OUTPUT_TOKENS // 2


def profile(model: Path, most_requests: int, longest: int) -> Profile:
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "profile.yaml"
        flags = ["--max-num-seqs", most_requests, "--max-model-len", longest, "--out", out]
        subprocess.run(
            [sys.executable, "-m", "afd_server", "profile", model, *map(str, flags)],
            check=True,
            stdout=sys.stderr,
        )
        return read_profile(out)


def measured(model: Path, input_tokens: int, concurrencies: list[int]) -> dict[Case, dict[str, float]]:
    """Milliseconds of a median step: of each part, and of the whole from one end to the next."""
    script = Path(__file__).with_name("step_profile.py")
    flags = ["--input-tokens", input_tokens, "--output-tokens", OUTPUT_TOKENS, "--concurrency", *concurrencies]
    done = subprocess.run(
        [sys.executable, script, model, *map(str, flags)], check=True, capture_output=True, text=True
    )
    return {
        Case(result["concurrency"], input_tokens): {
            "attention": result["attention_us"] / 1e3,
            "FFN": result["ffn_us"] / 1e3,
            "wire": (result["waiting_us"] - result["ffn_us"]) / 1e3,
            "once": (result["sampling_us"] + result["between_us"]) / 1e3,
            "step": result["step_us"] / 1e3,
        }
        for result in json.loads(done.stdout.splitlines()[-1])["results"]
    }


def measured_all(arguments: argparse.Namespace) -> dict[Case, dict[str, float]]:
    found = {}
    for input_tokens in arguments.context:
        found |= measured(arguments.model, input_tokens, arguments.concurrency)
    return found


def predicted(model: Path, times: Profile, case: Case) -> dict[str, float]:
    """The same by the planner."""
    cards = choose(read_hardware(), [CARD])
    workload = Workload(read_counted_model(model), case.context, cards, profile=times)
    ours = predict(workload, Layout(CARD, CARD, 1, 1, 1, 1, case.concurrency, "float32"))
    parts = {"attention": ours.attention_s, "FFN": ours.ffn_s, "wire": ours.wire_s, "once": ours.overhead_s}
    return {name: 1e3 * seconds for name, seconds in {**parts, "step": ours.tpot_s}.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, nargs="+", default=[128, 1024], help="tokens of a prompt")
    arguments = parser.parse_args()
    found: dict[Case, list[tuple[dict[str, float], dict[str, float]]]] = {}
    longest = 2 * (max(arguments.context) + OUTPUT_TOKENS)
    for _ in range(arguments.rounds):
        before = measured_all(arguments)
        times = profile(arguments.model, max(arguments.concurrency), longest)
        after = measured_all(arguments)
        for case, theirs in before.items():
            mean = {part: (theirs[part] + after[case][part]) / 2 for part in PARTS}
            found.setdefault(case, []).append((predicted(arguments.model, times, case), mean))
    ratios = {case: [ours["step"] / theirs["step"] for ours, theirs in pairs] for case, pairs in found.items()}
    print(
        f"{arguments.model.name}, {machine()}, commit {commit()}, {arguments.rounds} rounds; ms, predicted / measured\n"
    )
    print(f"| requests | context | {' | '.join(PARTS)} | step's ratio |\n|{' --- |' * (len(PARTS) + 3)}")
    for case, pairs in found.items():
        cells = [
            " / ".join(f"{statistics.median(pair[side][part] for pair in pairs):.2f}" for side in (0, 1))
            for part in PARTS
        ]
        spread = f"{statistics.median(ratios[case]):.2f} ({min(ratios[case]):.2f} to {max(ratios[case]):.2f})"
        print(f"| {case.concurrency} | {case.context} | {' | '.join(cells)} | {spread} |")
    medians = [statistics.median(each) for each in ratios.values()]
    within = sum(abs(ratio - 1) <= PROMISED for ratio in medians)
    print(f"\n{within} of {len(medians)} within {PROMISED:.0%}")
    print(json.dumps({"benchmark": "plan_accuracy", "model": arguments.model.name, "ratios": [
        {"concurrency": case.concurrency, "context": case.context, "predicted_over_measured": each}
        for case, each in ratios.items()
    ]}))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
