"""`afd chat`: talk to a running server in the terminal.

What lives here: reading questions, showing answers as they stream, and keeping the conversation. What does not: the
model; any server with OpenAI's chat route will do. Questions may come from a pipe, one to a line. Called by cli.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import httpx
from rich.console import Console

from afd_server.config import separate_keys

PROMPT = "[bold]you>[/bold] "
WELCOME = "talking to {model} at {url}; /reset forgets, /quit leaves, Ctrl-C stops an answer"
# Between two pieces of an answer; the first one may wait for a long queue.
TIMEOUT = httpx.Timeout(300.0, connect=10.0)


class ChatError(Exception):
    """The server cannot be talked to. The message is the line to show."""


class Conversation:
    """The messages so far, and the server that continues them."""

    def __init__(self, client: httpx.Client, model: str, sampling: Mapping[str, Any]) -> None:
        self._client = client
        self._sampling = sampling
        self.model = model
        self.messages: list[dict[str, str]] = []

    def ask(self, question: str) -> Generator[str, None, None]:
        """The answer, piece by piece. Both are kept when it is complete or stopped half-way; a failure keeps neither.

        Raises ChatError.
        """
        messages = [*self.messages, {"role": "user", "content": question}]
        body = {"model": self.model, "messages": messages, "stream": True, **self._sampling}
        answer: list[str] = []
        try:
            for piece in _stream(self._client, body):
                answer.append(piece)
                yield piece
        except ChatError:
            answer.clear()
            raise
        finally:
            if answer:
                self.messages = [*messages, {"role": "assistant", "content": "".join(answer)}]


def run_chat(url: str, model: str | None, api_key: str | None, sampling: Mapping[str, Any]) -> int:
    """Talks until /quit or the end of input; gives the exit code.

    url: without a scheme it is taken as http. model: None is the server's first. sampling: fields of every request.
    """
    if "://" not in url:
        url = f"http://{url}"
    headers = {"Authorization": f"Bearer {separate_keys(api_key)[0]}"} if api_key else {}
    is_terminal = sys.stdin.isatty()
    console = Console(highlight=False, emoji=False)
    try:
        with httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=TIMEOUT) as client:
            conversation = Conversation(client, model or first_model(client), sampling)
            if is_terminal:
                console.print(WELCOME.format(model=conversation.model, url=url), style="dim")
            _talk(conversation, console, is_terminal)
    except (ChatError, httpx.InvalidURL) as error:
        print(f"afd chat: {error}", file=sys.stderr)
        return 1
    except UnicodeError:
        print("afd chat: the question is not UTF-8 text", file=sys.stderr)
        return 1
    return 0


def _talk(conversation: Conversation, console: Console, is_terminal: bool) -> None:
    while True:
        try:
            question = (console.input(PROMPT) if is_terminal else input()).strip()
            question.encode()  # raises UnicodeError where the input was not UTF-8
        except EOFError:  # Ctrl-D, or the pipe's end
            return
        except KeyboardInterrupt:  # at the prompt: a line thought better of
            if not is_terminal:
                raise
            console.print()
            continue
        if question == "/quit":
            return
        if question == "/reset":
            conversation.messages = []
        elif question:
            _show_answer(conversation, question, console, is_terminal)


def _show_answer(conversation: Conversation, question: str, console: Console, is_terminal: bool) -> None:
    pieces = conversation.ask(question)
    try:
        for piece in pieces:
            console.print(piece, end="", markup=False, soft_wrap=True)
        console.print()
    except KeyboardInterrupt:
        pieces.close()  # closes the connection, which ends the request
        console.print(" ...")
        if not is_terminal:  # nobody is there to ask on
            raise
    except ChatError as error:
        if not is_terminal:  # a script must notice
            raise
        console.print(f"\n{error}", style="red", markup=False)


def first_model(client: httpx.Client) -> str:
    """The name of the first model that the server lists. Raises ChatError."""
    try:
        response = client.get("/v1/models")
        _raise_for_status(response)
        return response.json()["data"][0]["id"]
    except httpx.HTTPError as error:
        raise ChatError(_unreachable(client, error)) from error
    except (ValueError, LookupError, TypeError) as error:
        raise ChatError(f"{client.base_url} does not answer as an OpenAI server does") from error


def _stream(client: httpx.Client, body: dict[str, Any]) -> Iterator[str]:
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.is_error:
                response.read()
                _raise_for_status(response)
            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield from _text_of(json.loads(line.removeprefix("data: ")))
    except httpx.HTTPError as error:
        raise ChatError(_unreachable(client, error)) from error
    except (ValueError, LookupError, TypeError) as error:
        raise ChatError(f"{client.base_url} does not answer as an OpenAI server does") from error


def _text_of(chunk: dict[str, Any]) -> Iterator[str]:
    if "error" in chunk:
        raise ChatError(chunk["error"]["message"])
    for choice in chunk["choices"]:
        if choice["delta"].get("content"):
            yield choice["delta"]["content"]


def _raise_for_status(response: httpx.Response) -> None:
    if response.status_code == 401:
        raise ChatError("the server asks for a key, or does not know this one: --api-key KEY")
    if response.is_error:
        try:
            message = response.json()["error"]["message"]
        except (ValueError, LookupError, TypeError):
            message = f"the server answered {response.status_code} {response.reason_phrase}"
        raise ChatError(message)


def _unreachable(client: httpx.Client, error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.ConnectError | httpx.UnsupportedProtocol):
        return f"no server answers at {client.base_url}: start one with `afd serve`, or set --url"
    return f"the connection to {client.base_url} failed: {error or type(error).__name__}"
