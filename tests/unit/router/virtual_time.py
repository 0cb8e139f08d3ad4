"""An event loop whose clock jumps to the next timer: hours of a simulated server take seconds."""

import asyncio
import selectors


class _Jump(selectors.SelectSelector):
    """Instead of waiting, time passes."""

    def __init__(self):
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout=None):
        assert timeout is not None, "everyone waits and nothing is going to happen"
        self.now_s += max(0.0, timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self):
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self):
        return self._jump.now_s


def run_virtual(coroutine):
    """asyncio.run in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(coroutine)
