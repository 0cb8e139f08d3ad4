"""The attention workers of a simulated deployment: their lives, one after the other, and what becomes of them on the way.

What lives here: starting, killing, restarting, adding and removing workers of both roles, at their times. What does not: what the
router makes of it (router.py, the real one), and a single life (replica.py).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from afd_server.router.router import Router
from afd_server.simulator.replica import ReplicaAccount, SimulatedReplica
from afd_server.simulator.scenario import Kill, Resize, Scenario
from afd_server.simulator.work import Execution, StepModel
from afd_server.types import ReplicaUpdate


class Fleet:
    """All workers by name. on_update: of the clients."""

    def __init__(self, scenario: Scenario, execution: Execution) -> None:
        self._scenario = scenario
        self._execution = execution
        self._time = asyncio.get_running_loop().time
        self.accounts: dict[str, ReplicaAccount] = {}
        self._replicas: dict[str, SimulatedReplica] = {}
        self._num_ffn_replicas = scenario.config.ffn_replicas
        self._down: set[str] = set()
        self._began_s: dict[str, float] = {}
        self.alive_s: dict[str, float] = {}  # of those that have left
        self.num_failures = 0
        self.on_update: Callable[[ReplicaUpdate], None] | None = None
        self.router: Router | None = None
        execution.know(range(scenario.config.attention_workers))
        for index in range(scenario.config.attention_workers):
            self._start_attention(index)
        for index in range(scenario.config.ffn_workers):
            self._began_s[f"ffn-{index}"] = 0.0

    def clients(self) -> list[SimulatedReplica]:
        return list(self._replicas.values())

    def names(self) -> list[str]:
        """Of those that are paid for now."""
        return list(self._began_s)

    def worker_seconds(self, role: str) -> float:
        """For which workers of a role were there, loading included."""
        now_s = self._time()
        there = sum(now_s - began_s for name, began_s in self._began_s.items() if name.startswith(role))
        return there + sum(seconds for name, seconds in self.alive_s.items() if name.startswith(role))

    # --- what happens to them ---------------------------------------------------------------------------------------

    async def fail_at_random(self, role: str) -> None:
        """Failures of all GPUs of a role together are one Poisson process; each takes a worker with it."""
        failures, scenario = self._scenario.failures, self._scenario
        gpus = scenario.attention_gpus if role == "attention" else scenario.ffn_gpus
        generator = random.Random(f"{scenario.seed}-{role}")
        assert failures.mtbf_s is not None
        while True:
            names = [name for name in self._began_s if name.startswith(role)]
            await asyncio.sleep(generator.expovariate(gpus * len(names) / failures.mtbf_s))
            self.kill(generator.choice([name for name in self._began_s if name.startswith(role)]))

    async def kill_at(self, kill: Kill) -> None:
        await asyncio.sleep(kill.at_s - self._time())
        if kill.name in self._began_s:
            self.kill(kill.name)

    def kill(self, name: str) -> None:
        """It dies, unless it is down already, and is back after its restart."""
        if name in self._down:
            return
        self._down.add(name)
        self.num_failures += 1
        failures = self._scenario.failures
        loop = asyncio.get_running_loop()
        role, index = _parts(name)
        if role == "attention":
            self._replicas[name].kill()
            loop.call_later(failures.attention_restart_s, self._restart_attention, name, index)
        else:
            self._execution.fail(index)
            loop.call_later(failures.ffn_restart_s, self._restore_ffn, name, index)

    async def resize_at(self, resize: Resize) -> None:
        await asyncio.sleep(resize.at_s - self._time())
        if resize.ffn_replicas is not None:
            await self._resize_ffn(resize.ffn_replicas)
        if resize.attention_workers is not None:
            await self._resize_attention(resize.attention_workers)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _start_attention(self, index: int) -> SimulatedReplica:
        name, scenario = f"attention-{index}", self._scenario
        steps = StepModel(scenario.times, scenario.slowness.get(name, 1.0))
        account = self.accounts.setdefault(name, ReplicaAccount())
        replica = self._replicas[name] = SimulatedReplica(
            name, index, scenario.config, scenario.kv_blocks, steps, self._execution,
            account=account, on_update=self._pass_on,
        )  # fmt: skip
        self._began_s.setdefault(name, self._time())
        return replica

    def _pass_on(self, update: ReplicaUpdate) -> None:
        assert self.on_update is not None
        self.on_update(update)

    def _restart_attention(self, name: str, index: int) -> None:
        self._down.discard(name)
        if name in self._began_s:  # it has not left meanwhile
            assert self.router is not None
            self.router.replace(name, self._start_attention(index))

    def _restore_ffn(self, name: str, index: int) -> None:
        self._down.discard(name)
        if name in self._began_s:
            self._execution.restore(index)

    async def _resize_attention(self, wanted: int) -> None:
        assert self.router is not None
        present = [name for name in self._began_s if name.startswith("attention")]
        now_s = self._time()
        if wanted > len(present):
            names = [f"attention-{index}" for index in range(len(present), wanted)]
            self._began_s |= dict.fromkeys(names, now_s)
            await asyncio.sleep(self._scenario.failures.attention_restart_s)
            self._execution.know(range(len(present), wanted))
            for index in range(len(present), wanted):
                self.router.add(self._start_attention(index))
        for name in present[wanted:]:
            await self.router.drain(name, self._scenario.config.drain_timeout)
            self.router.remove(name)
            self._replicas.pop(name).kill()
            self._leave(name)

    async def _resize_ffn(self, wanted: int) -> None:
        num_shards = self._scenario.num_shards
        names = [f"ffn-{index}" for index in range(self._num_ffn_replicas * num_shards, wanted * num_shards)]
        if names:
            self._began_s |= dict.fromkeys(names, self._time())
            await asyncio.sleep(self._scenario.failures.ffn_restart_s)
        leaving = range(wanted * num_shards, self._num_ffn_replicas * num_shards)
        self._execution.resize(wanted)
        self._num_ffn_replicas = wanted
        for index in leaving:
            self._leave(f"ffn-{index}")

    def _leave(self, name: str) -> None:
        self.alive_s[name] = self.alive_s.get(name, 0.0) + self._time() - self._began_s.pop(name)


def _parts(name: str) -> tuple[str, int]:
    role, _, index = name.rpartition("-")
    return role, int(index)
