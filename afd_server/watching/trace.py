"""`afd trace`: every hop of every worker for a while, into a file that ui.perfetto.dev opens.

What lives here: fetching it. What does not: the recording, which is the server's.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import httpx

from afd_server.admin import AdminError, operator_client, problem_of

# Beyond the recording itself: writing down what many workers have done.
ANSWER_TIMEOUT_S = 60.0


def trace(url: str, api_key: str | None, seconds: float, output: Path) -> int:
    """Writes the file, compressed when its name ends in .gz, and gives the exit code. Raises AdminError."""
    with operator_client(url, api_key, timeout=httpx.Timeout(seconds + ANSWER_TIMEOUT_S)) as client:
        try:
            response = client.get("/admin/trace", params={"seconds": seconds})
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise AdminError(f"{client.base_url}: {str(error) or type(error).__name__}") from None
    if response.status_code != 200:
        raise AdminError(problem_of(response))
    content = gzip.compress(response.content) if output.suffix == ".gz" else response.content
    try:
        output.write_bytes(content)
    except OSError as error:
        raise AdminError(f"{output}: {error.strerror}") from None
    print(f"{output}: {len(content) / 1e3:,.0f} kB; open it at https://ui.perfetto.dev")
    return 0
