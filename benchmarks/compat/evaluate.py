"""lm-eval's score of this server beside its score of transformers on the same checkpoint, on a small task of our own.

    .venv/bin/python benchmarks/compat/evaluate.py [MODEL]

The tasks (tasks/) are 32 questions, once by the log-probability of four answers, once by greedy text. lm-eval asks the server
through its `local-completions` (prompts of token ids, echo with logprobs), and transformers through its `hf`, both in float32.
lm-eval gets an environment of its own under $AFD_HOME/compat. The last line is JSON; the exit code is 1 if a score differs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import httpx

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

from run import server  # noqa: E402

from afd_server.checkpoints.default_model import afd_home, default_model  # noqa: E402
from benchmarks.results import commit, machine  # noqa: E402

PACKAGES = (("torch==2.13.0",), ("lm_eval[api]", "transformers>=5", "accelerate"))
TASKS = ("facts", "continue")
TIMEOUT_S = 900.0


def program() -> Path:
    """lm-eval's own, installed on first use. Raises subprocess.CalledProcessError."""
    directory = afd_home() / "compat" / "lm-eval"
    stamp = directory / "version"
    if not stamp.is_file():
        shutil.rmtree(directory, ignore_errors=True)
        venv.create(directory, with_pip=True)
        python = directory / "bin" / "python"
        for packages in PACKAGES:
            subprocess.run(
                [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *packages], check=True
            )
        asked = "import importlib.metadata as m; print(m.version('lm_eval'))"
        stamp.write_text(subprocess.check_output([python, "-c", asked], text=True).strip())
    return directory / "bin" / "lm_eval"


def score(tasks: Path, model: str, arguments: str) -> dict[str, Any]:
    """Task -> metric -> value, the log-likelihood of every answer of the first task, and the texts of the second."""
    with tempfile.TemporaryDirectory() as out:
        command = [program(), "run", "--model", model, "--model_args", arguments, "--tasks",
                   ",".join(f"afd_{name}" for name in TASKS), "--include_path", tasks, "--output_path", out,
                   "--log_samples", "--batch_size", "4", "--device", "cpu"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        (results,) = Path(out).rglob("results_*.json")
        scores = {task: {name: value for name, value in metrics.items() if isinstance(value, float)}
                  for task, metrics in json.loads(results.read_text())["results"].items()}  # fmt: skip
        likelihoods = [float(answer[0]) for answers in _answers(out, "facts") for answer in answers]
        return {"scores": scores, "log_likelihoods": likelihoods, "texts": _answers(out, "continue")}


def _answers(out: str, task: str) -> list[Any]:
    """What came of each question, in order."""
    (samples,) = Path(out).rglob(f"samples_afd_{task}_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    return [row["filtered_resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="default: the default model")
    model = parser.parse_args().model or default_model(afd_home())
    with tempfile.TemporaryDirectory() as directory:
        tasks = Path(directory)
        for name in TASKS:
            text = (HERE / "tasks" / f"{name}.yaml").read_text()
            (tasks / f"{name}.yaml").write_text(
                text.replace("{data_files}", str(HERE / "tasks" / "facts.jsonl"))
            )
        theirs = score(tasks, "hf", f"pretrained={model},dtype=float32")
        with server(["--dtype", "float32"], str(model)) as url:
            name = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
            ours = score(tasks, "local-completions", f"model={name},base_url={url}/v1/completions,tokenizer={model},"
                                                     "tokenizer_backend=huggingface,num_concurrent=4")  # fmt: skip
    print("| task | metric | transformers | this server |\n| --- | --- | --- | --- |")
    for task, metrics in theirs["scores"].items():
        for metric, value in metrics.items():
            if "stderr" not in metric:
                print(
                    f"| {task} | {metric.partition(',')[0]} | {value:.4f} | {ours['scores'][task][metric]:.4f} |"
                )
    pairs = zip(theirs["log_likelihoods"], ours["log_likelihoods"], strict=True)
    furthest = max(abs(first - second) for first, second in pairs)
    print(f"log-likelihoods of {len(ours['log_likelihoods'])} answers differ by {furthest:.1e} at most")
    equal = sum(first == second for first, second in zip(theirs["texts"], ours["texts"], strict=True))
    print(f"{equal} of {len(ours['texts'])} greedy texts are the same")
    same = theirs["scores"] == ours["scores"] and equal == len(ours["texts"])
    print(json.dumps({"commit": commit(), "machine": machine(), "same": same, "largest_difference": furthest, "equal_texts": equal,
                      "transformers": theirs["scores"], "afd": ours["scores"]}))  # fmt: skip
    return int(not same)


if __name__ == "__main__":
    raise SystemExit(main())
