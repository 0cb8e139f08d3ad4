"""One request to an OpenAI-compatible server: sent, its stream read to the end, and the time of every chunk noted.

What lives here: HTTP, server-sent events, and the kinds of failure. What does not: when a request is sent (generator.py).
A failed request raises nothing: it is an Outcome like the others. aiohttp, as it takes a quarter of httpx's processor time
for a chunk and for a connection, and what the generator takes is missing at the server where both share a machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp
import msgspec

from afd_server.bench.dataset import Prompt
from afd_server.bench.outcome import Outcome
from afd_server.errors import ServingError

READ_BYTES = 1 << 18
ERROR_BYTES, MESSAGE_CHARACTERS = 4096, 300
MAX_LINE_BYTES = 1 << 24
MODELS_TIMEOUT_S = 30.0
NO_ADDRESS = (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError)
# Shorter than servers keep an idle connection open: none is used again just as the server closes it.
KEEP_ALIVE_S = 2.0


class BenchError(ServingError):
    """The server cannot be measured at all. The message is the line to show."""


@dataclass(frozen=True)
class Target:
    """The server, and what every request to it has in common.

    url: without the route. fields: of every request's body ("temperature", "ignore_eos", ...). keep_alive: whether requests
    follow one another on a connection, as clients do; some servers close one just then.
    """

    url: str
    model: str = ""
    endpoint: str = "/v1/completions"
    is_chat: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 600.0
    keep_alive: bool = True
    verify_certificate: bool = True


class _Delta(msgspec.Struct):
    content: Any = None
    reasoning_content: Any = None
    reasoning: Any = None
    tool_calls: Any = None

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning_content or self.reasoning or self.tool_calls)


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    finish_reason: Any = None

    @property
    def is_output(self) -> bool:
        """All but the chunk of a chat that only says who speaks. A token may have no text of its own."""
        return self.delta is None or bool(self.delta) or self.finish_reason is not None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class _FailedError(Exception):
    """The answer is not the one asked for."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Client:
    """`async with Client(target) as client:` and any number of `send` at the same time."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._session: aiohttp.ClientSession | None = None
        self._decoder = msgspec.json.Decoder(_Event)

    async def __aenter__(self) -> Self:
        reuse: dict[str, Any] = {"keepalive_timeout": KEEP_ALIVE_S}
        if not self.target.keep_alive:
            reuse = {"force_close": True}
        connector = aiohttp.TCPConnector(limit=0, ssl=self.target.verify_certificate, **reuse)
        timeout = aiohttp.ClientTimeout(total=self.target.timeout_s)
        headers = {"Content-Type": "application/json", **self.target.headers}
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=timeout, headers=headers, read_bufsize=READ_BYTES
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def first_model(self) -> str:
        """The name of the first model that the server lists. Raises BenchError."""
        assert self._session is not None
        url = self.target.url
        try:
            timeout = aiohttp.ClientTimeout(total=MODELS_TIMEOUT_S)
            async with self._session.get(f"{url}/v1/models", timeout=timeout) as response:
                if response.status in (401, 403):
                    raise BenchError(f"{url} asks for a key, or does not know this one")
                return str((await response.json(content_type=None))["data"][0]["id"])
        except aiohttp.ClientConnectorError as error:
            raise BenchError(f"no server answers at {url}: {error.os_error}") from None
        except TimeoutError:
            raise BenchError(f"no server answers at {url} within {MODELS_TIMEOUT_S:g} s") from None
        except NO_ADDRESS:
            raise BenchError(f"{url} is no address") from None
        except (aiohttp.ClientError, LookupError, ValueError, TypeError):
            raise BenchError(
                f"{url} does not list its models as an OpenAI server does; name one by --model"
            ) from None

    async def send(self, prompt: Prompt, due_s: float, clock: Callable[[], float]) -> Outcome:
        """One request from now to its end. clock: seconds from the start of the run."""
        body = self._body(prompt)
        sent_s = clock()
        stream = _Stream(self._decoder, clock)
        try:
            await self._read(body, stream)
        except _FailedError as error:
            kind, message = error.kind, str(error)
        except TimeoutError:
            kind, message = "timeout", f"no end after {self.target.timeout_s:g} s"
        except aiohttp.ClientConnectorError as error:
            kind, message = "cannot connect", str(error.os_error)
        except NO_ADDRESS as error:
            kind, message = "cannot connect", f"{error} is no address"
        except (aiohttp.ClientError, OSError) as error:
            kind, message = "connection lost", str(error) or type(error).__name__
        else:
            return Outcome(due_s, sent_s, tuple(stream.chunks_s), stream.input_tokens, stream.output_tokens)
        # It is shown in a terminal, which must not obey it.
        message = "".join(character if character.isprintable() else " " for character in message)
        return Outcome(due_s, sent_s, error=kind, message=" ".join(message.split())[:MESSAGE_CHARACTERS])

    def _body(self, prompt: Prompt) -> bytes:
        content: dict[str, Any] = {"prompt": prompt.text, "max_tokens": prompt.output_tokens}
        if self.target.is_chat:
            messages = [{"role": "user", "content": prompt.text}]
            content = {"messages": messages, "max_completion_tokens": prompt.output_tokens}
        return msgspec.json.encode(
            {
                "model": self.target.model,
                **content,
                "stream": True,
                "stream_options": {"include_usage": True},
                **self.target.fields,
            }
        )

    async def _read(self, body: bytes, stream: _Stream) -> None:
        assert self._session is not None
        url = f"{self.target.url}{self.target.endpoint}"
        async with self._session.post(url, data=body) as response:
            if response.status != 200:
                words = (await response.content.read(ERROR_BYTES)).decode(errors="replace")
                raise _FailedError(f"HTTP {response.status}", words)
            async for block in response.content.iter_any():
                stream.feed(block)
        stream.check()


class _Stream:
    """The events of one answer, from blocks of bytes that are cut anywhere. All of a block came at one time."""

    def __init__(self, decoder: msgspec.json.Decoder[_Event], clock: Callable[[], float]) -> None:
        self._decoder, self._clock = decoder, clock
        self._rest = b""
        self._usage: _Usage | None = None
        self.chunks_s: list[float] = []

    def feed(self, block: bytes) -> None:
        now_s = self._clock()
        *lines, self._rest = (self._rest + block).split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            raise _FailedError("malformed answer", f"a line of more than {MAX_LINE_BYTES} bytes")
        for line in lines:
            if line.startswith(b"data:"):
                data = line[5:].strip()
                if data != b"[DONE]":
                    self._take(data, now_s)

    def _take(self, data: bytes, now_s: float) -> None:
        try:
            event = self._decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _FailedError("malformed answer", f"{error}: {data[:100]!r}") from None
        if event.error is not None:
            raise _FailedError("error in the stream", str(event.error))
        if any(choice.is_output for choice in event.choices):
            self.chunks_s.append(now_s)
        self._usage = event.usage or self._usage

    def check(self) -> None:
        if self._usage is None:
            raise _FailedError("no usage", "the stream ended without the usage that stream_options asks for")
        if not self.chunks_s:
            raise _FailedError("no output", "the stream ended without a token")

    @property
    def input_tokens(self) -> int:
        assert self._usage is not None
        return self._usage.prompt_tokens

    @property
    def output_tokens(self) -> int:
        assert self._usage is not None
        return self._usage.completion_tokens
