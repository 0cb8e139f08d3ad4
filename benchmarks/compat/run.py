"""Other projects' clients against a live server, and a table of what works.

    .venv/bin/python benchmarks/compat/run.py [--url http://127.0.0.1:8000] [--client openai ...] [-- FLAG ...]

Each client gets an environment of its own under $AFD_HOME/compat, made on first use. Without --url a server of the default
model is started for the run, with the FLAGs after `--`. A client's script (clients/) prints a line of JSON for each of its
checks. The table says what failed and how; the last line is JSON; the exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from afd_server.checkpoints.default_model import afd_home

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from benchmarks.results import commit, machine  # noqa: E402

START_TIMEOUT_S = 300.0
CLIENT_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Project:
    """One client. package: on PyPI, or on npm for a script in JavaScript."""

    name: str
    package: str
    script: str

    @property
    def directory(self) -> Path:
        return afd_home() / "compat" / self.name

    @property
    def is_node(self) -> bool:
        return self.script.endswith(".mjs")


PROJECTS = (
    Project("openai", "openai", "openai_python.py"),
    Project("openai-node", "openai", "openai_node.mjs"),
    Project("anthropic", "anthropic", "anthropic_python.py"),
    Project("litellm", "litellm", "litellm_python.py"),
    Project("langchain-openai", "langchain-openai", "langchain_openai_python.py"),
    Project("instructor", "instructor", "instructor_python.py"),
)


def set_up(project: Project) -> str:
    """Installs it if it is not there; its version. Raises subprocess.CalledProcessError."""
    stamp = project.directory / "version"
    if not stamp.is_file():
        shutil.rmtree(project.directory, ignore_errors=True)
        if project.is_node:
            project.directory.mkdir(parents=True)
            subprocess.run(
                ["npm", "install", "--silent", "--prefix", project.directory, project.package], check=True
            )
            installed = json.loads(
                (project.directory / "node_modules" / project.package / "package.json").read_text()
            )
            version = installed["version"]
        else:
            venv.create(project.directory, with_pip=True)
            python = project.directory / "bin" / "python"
            subprocess.run(
                [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", project.package],
                check=True,
            )
            asked = f"import importlib.metadata as m; print(m.version({project.package!r}))"
            version = subprocess.check_output([python, "-c", asked], text=True).strip()
        stamp.write_text(version)
    return stamp.read_text().strip()


def reports(project: Project, url: str, model: str) -> list[dict[str, Any]]:
    """What its script says, one entry a check."""
    script = HERE / "clients" / project.script
    environment = {**os.environ, "AFD_URL": url, "AFD_MODEL": model}
    if project.is_node:
        # Node looks for packages above the script, so the script goes where they are.
        command = ["node", str(shutil.copy(script, project.directory))]
    else:
        command = [str(project.directory / "bin" / "python"), str(script)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=CLIENT_TIMEOUT_S, check=False
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"check"')]
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["no word"]
        lines.append({"check": "the script itself", "ok": False, "shown": words[-1]})
    return lines


@contextmanager
def server(flags: list[str], model: str = "default") -> Iterator[str]:
    """The URL of a server of `model`, for the run."""
    log = afd_home() / "compat" / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as written:
        command = [sys.executable, "-u", "-m", "afd_server", "serve", model, "--port", "0", *flags]
        process = subprocess.Popen(command, stdout=written, stderr=subprocess.STDOUT)
        try:
            yield _url(process, log)
        finally:
            process.terminate()
            process.wait(60)


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        words = [line.split() for line in log.read_text().splitlines()]
        found = [line[1] for line in words if len(line) == 2 and line[0] == "url"]
        if found:
            return found[0]
        time.sleep(0.2)
    raise RuntimeError(f"the server did not start: see {log}")


def main() -> int:
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    own, flags = sys.argv[1:at], sys.argv[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url")
    parser.add_argument("--client", nargs="+", choices=[project.name for project in PROJECTS])
    arguments = parser.parse_args(own)
    chosen = [project for project in PROJECTS if arguments.client is None or project.name in arguments.client]
    versions = {project.name: set_up(project) for project in chosen}
    if arguments.url:
        return show(chosen, versions, arguments.url)
    with server(flags) as url:
        return show(chosen, versions, url)


def show(chosen: list[Project], versions: dict[str, str], url: str) -> int:
    model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    results = {}
    print("| client | version | check | result |\n| --- | --- | --- | --- |")
    for project in chosen:
        results[project.name] = reports(project, url, model)
        for report in results[project.name]:
            shown = report["shown"].replace("|", "\\|").replace("\n", " ")
            result = f"ok: `{shown[:80]}`" if report["ok"] else f"**failed**: {shown}"
            print(f"| {project.name} | {versions[project.name]} | {report['check']} | {result} |", flush=True)
    print(
        json.dumps(
            {"commit": commit(), "machine": machine(), "model": model, "versions": versions, "results": results}
        )
    )
    return int(not all(report["ok"] for reports_ in results.values() for report in reports_))


if __name__ == "__main__":
    raise SystemExit(main())
