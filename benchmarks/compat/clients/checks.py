"""How each client's script reports: one line of JSON a check. What is checked is the script's own business."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable

URL = os.environ["AFD_URL"]  # without /v1
MODEL = os.environ["AFD_MODEL"]
API_KEY = os.environ.get("AFD_API_KEY", "none")

QUESTION = "What is the capital of France?"
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}


def check(name: str) -> Callable[[Callable[[], object]], None]:
    """Runs the function at once. What it returns is shown; what it raises is why it failed."""

    def run(function: Callable[[], object]) -> None:
        try:
            report = {"check": name, "ok": True, "shown": str(function())[:200]}
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            report = {
                "check": name,
                "ok": False,
                "shown": f"{type(error).__name__}: {error} ({last.name})"[:400],
            }
        print(json.dumps(report), flush=True)

    return run
