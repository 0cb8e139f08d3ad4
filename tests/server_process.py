"""A real server for tests: `python -m afd_server serve` as a child process, on a free port, asked over HTTP."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0


def afd(*arguments, timeout_s=120.0):
    """One run of the command line to its end."""
    command = [sys.executable, "-m", "afd_server", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


def wait_until(condition, timeout_s=START_TIMEOUT_S):
    """Returns what the condition gives as soon as it is true."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, condition
        time.sleep(0.05)
    return value


class Server:
    """`with Server(directory, "--ffn-workers", 2) as server:` waits until it is ready, and ends it by SIGTERM."""

    program = ("-m", "afd_server")

    def __init__(self, model, *flags):
        self._log = tempfile.NamedTemporaryFile("w+", prefix="afd-server-", suffix=".log")  # noqa: SIM115
        self._command = [
            sys.executable,
            "-u",
            *self.program,
            "serve",
            str(model),
            "--port",
            "0",
            *map(str, flags),
        ]
        self._began_at = 0  # characters of the log: where this process began
        self._left_behind = []  # children of front-ends that were killed
        self._start()

    def _start(self):
        self.url = ""
        self.process = subprocess.Popen(
            self._command, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def __enter__(self):
        self.url = self.wait_for_log(r"is ready after.*?(http://\S+)")[1]
        return self

    def kill_and_start_again(self):
        """kill -9 of the front-end, then the same command. Returns when it is ready; what it left behind is this server's."""
        self._left_behind += psutil.Process(self.process.pid).children()
        self.process.kill()
        self.process.wait(STOP_TIMEOUT_S)
        self._began_at = len(self.log())
        self._start()
        self.__enter__()

    def wait_for_log(self, pattern):
        """The match of a pattern in what the present process has logged, once it is there."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            found = re.search(pattern, self.log()[self._began_at :], re.S)
            if found:
                return found
            time.sleep(0.05)
        self._end()
        raise AssertionError(f"the log does not say {pattern!r}:\n{self.log()}")

    def log(self):
        return Path(self._log.name).read_text(encoding="utf-8", errors="replace")

    def stop(self):
        """SIGTERM, as a container's end sends it; gives the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_TIMEOUT_S)

    def __exit__(self, *_):
        self._end()

    def _end(self):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                raise

    # --- what tests ask of it --------------------------------------------------------------------------------------

    def complete(self, prompt, **fields):
        """The first choice of a completion, and the usage."""
        response = self.post("/v1/completions", prompt=prompt, **fields)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]

    def post(self, path, **body):
        model = httpx.get(f"{self.url}/v1/models", timeout=30).json()["data"][0]["id"]
        return httpx.post(f"{self.url}{path}", json={"model": model, **body}, timeout=120)

    def stream(self, body, on_token=lambda count: None):
        """Of a completion with `stream` and `return_token_ids`: the token ids, and the error that ended or refused it, if one did.
        on_token is told how many there are each time that some have come."""
        token_ids = []
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=120) as response:
            if response.status_code != 200:
                return token_ids, json.loads(response.read())["error"]
            for line in response.iter_lines():
                event = line.removeprefix("data: ")
                if not event or event == "[DONE]":
                    continue
                message = json.loads(event)
                if "error" in message:
                    return token_ids, message["error"]
                token_ids += message["choices"][0]["token_ids"] or []
                on_token(len(token_ids))
        return token_ids, None

    def metric(self, name, **labels):
        """Sum of the samples of a metric whose labels include the given ones."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        samples = re.findall(rf"^{re.escape(name)}(?:\{{([^}}]*)\}})? (\S+)$", text, re.M)
        assert samples, f"there is no metric {name}"
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        return sum(float(value) for given, value in samples if all(pair in given for pair in wanted))

    def pids(self, role):
        """Process ids of the Ray actors of a role ("Attention" or "FFN") below this server."""
        found = []
        for process in self._family():
            try:
                if f"{role}Actor" in " ".join(process.cmdline()):
                    found.append(process.pid)
            except psutil.Error:
                continue
        return found

    def _family(self):
        family = []
        for root in [psutil.Process(self.process.pid), *self._left_behind]:
            with contextlib.suppress(psutil.NoSuchProcess):
                family += root.children(recursive=True)
        return family
