"""An OpenAI-compatible server whose answers, and the times at which they come, are written down by the test.

Time is the script's: the client's clock shows what the script says, and moves on only when the client has looked at it. So
what is measured is exact, however slow the machine.
"""

import asyncio
import json
import time
from contextlib import asynccontextmanager

from aiohttp import web
from aiohttp.test_utils import TestServer

DEADLINE_S = 30.0


class ScriptedClock:
    """Seconds that stand still until they are moved; counts how often they were looked at."""

    def __init__(self):
        self.now_s, self.looks = 0.0, 0

    def __call__(self):
        self.looks += 1
        return self.now_s

    async def looked_at_after(self, looks):
        deadline = time.monotonic() + DEADLINE_S
        while self.looks <= looks:
            assert time.monotonic() < deadline, "the client does not read"
            await asyncio.sleep(0)


def text(words, finish_reason=None):
    return event({"choices": [{"index": 0, "text": words, "finish_reason": finish_reason}], "usage": None})


def delta(content, finish_reason=None, **more):
    words = {} if content is None else {"content": content}
    return event({"choices": [{"index": 0, "delta": {**words, **more}, "finish_reason": finish_reason}]})


def usage(prompt_tokens, completion_tokens):
    return event(
        {"choices": [], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}}
    )


def event(body):
    return f"data: {json.dumps(body)}\n\n".encode()


DONE = b"data: [DONE]\n\n"


class ScriptedServer:
    """script: (time, bytes) of every answer's stream, or a function of the request's body that gives them.

    status: of the answers. Without a clock all is sent at once.
    """

    def __init__(self, script, clock=None, status=200):
        self.script, self.clock, self.status = script, clock, status
        self.bodies, self.headers = [], []
        self.under_way = self.most_under_way = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.is_cut_off = False
        self.url = ""

    @asynccontextmanager
    async def running(self):
        application = web.Application()
        application.router.add_get("/v1/models", self._models)
        application.router.add_post("/v1/completions", self._answer)
        application.router.add_post("/v1/chat/completions", self._answer)
        async with TestServer(application) as server:
            self.url = str(server.make_url("")).rstrip("/")
            yield self

    async def _models(self, _):
        return web.json_response({"data": [{"id": "scripted"}]})

    async def _answer(self, request):
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(request.headers)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await self.may_answer.wait()
            if self.status != 200:
                return web.json_response({"error": {"message": "no room"}}, status=self.status)
            return await self._stream(request, self.script(body) if callable(self.script) else self.script)
        finally:
            self.under_way -= 1

    async def _stream(self, request, script):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for at_s, block in script:
            looks = self.clock.looks if self.clock else 0
            if self.clock:
                self.clock.now_s = at_s
            await response.write(block)
            if self.clock:
                await self.clock.looked_at_after(looks)
        if self.is_cut_off:
            request.transport.abort()
        return response


def counting(body):
    """An answer of as many tokens as are asked for. A word of the prompt is a token, and there is one more."""
    words = body["prompt"].split() if "prompt" in body else body["messages"][0]["content"].split()
    tokens = body["max_tokens"] if "prompt" in body else body["max_completion_tokens"]
    stream = [(0.0, text(" word")) for _ in range(tokens)]
    return [*stream, (0.0, usage(len(words) + 1, tokens)), (0.0, DONE)]
