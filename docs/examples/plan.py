"""Choosing a layout, as a program.

`afd plan --json` counts a model and searches for the split of attention and FFN workers that keeps a time per token at the
lowest cost; neither weights nor a GPU are needed. [The planner](planner.md) says what it knows and what it does not.
"""

import json
import subprocess
import sys

command = [
    "plan",
    "step-3",
    "--dtype",
    "fp8",
    "--hardware",
    "h800",
    "--context",
    "8192",
    "--tpot-sla-ms",
    "50",
    "--json",
]
run = subprocess.run([sys.executable, "-m", "afd_server", *command], check=True, capture_output=True, text=True)
plan = json.loads(run.stdout)

for layout in plan["layouts"]:
    attention, ffn = layout["attention"], layout["ffn"]
    print(
        f"{attention['workers']} attention and {ffn['workers']} FFN workers:"
        f" {layout['tokens_per_s_per_card']:.0f} tokens/s a card, {layout['tpot_ms']['total']:.0f} ms a token,"
        f" {layout['usd_per_mtok']:.2f} USD a million tokens; limited by {layout['limit']}"
    )
print("start the first with:", plan["command"])
