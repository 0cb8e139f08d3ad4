"""The terminal client against the real front-end, served on a thread of this process."""

import asyncio
import fcntl
import io
import os
import pty
import select
import subprocess
import sys
import termios
import threading
from contextlib import contextmanager

import httpx
import pytest
import uvicorn

from afd_server.api.server import bind_port
from afd_server.chat import Conversation, first_model, run_chat
from afd_server.errors import UnavailableError
from tests.unit.api.scripted_service import TOKENIZER, ScriptedService, app_for, says

DEADLINE_S = 20


@contextmanager
def served(service, **settings):
    listening = bind_port("127.0.0.1", 0)
    config = uvicorn.Config(app_for(service, max_model_len=1000, **settings), log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(DEADLINE_S)


def chat(monkeypatch, url, typed, model=None, api_key=None):
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    return run_chat(url, model, api_key, {"max_tokens": 64})


def prompts(service):
    return [
        TOKENIZER.decode(request.prompt_token_ids, skip_special_tokens=False) for request in service.requests
    ]


def test_questions_from_a_pipe_are_answered_line_by_line(monkeypatch, capsys):
    service = ScriptedService(says("Hi [bold]you[/bold] :cat: 🌍", step=99), says("Two"))
    with served(service) as url:
        assert chat(monkeypatch, url, "Hello\n\nAgain") == 0
    assert capsys.readouterr().out == "Hi [bold]you[/bold] :cat: 🌍\nTwo\n"
    first, second = prompts(service)
    assert first == "<user>Hello<|end|><assistant>"
    assert second == first + "Hi [bold]you[/bold] :cat: 🌍<|end|><user>Again<|end|><assistant>"


def test_reset_forgets_and_quit_leaves(monkeypatch):
    service = ScriptedService(says("one"))
    with served(service) as url:
        assert chat(monkeypatch, url, "a\n/reset\nb\n/quit\nc\n") == 0
    assert prompts(service) == ["<user>a<|end|><assistant>", "<user>b<|end|><assistant>"]


def test_no_server(capsys, monkeypatch):
    with bind_port("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    assert chat(monkeypatch, f"http://127.0.0.1:{port}", "Hello\n") == 1
    assert_one_line(capsys, str(port), "afd serve")


@pytest.mark.parametrize("url", ["nonsense", "ftp://x", "http://[::"])
def test_an_address_that_is_none(capsys, monkeypatch, url):
    assert chat(monkeypatch, url, "Hello\n") == 1
    assert_one_line(capsys)


def test_a_missing_key(capsys, monkeypatch):
    with served(ScriptedService(says("x")), api_key="right") as url:
        assert chat(monkeypatch, url, "Hello\n", api_key="wrong") == 1
        assert_one_line(capsys, "--api-key")
        assert chat(monkeypatch, url, "Hello\n", api_key="right") == 0


def test_an_unknown_model(capsys, monkeypatch):
    with served(ScriptedService()) as url:
        assert chat(monkeypatch, url, "Hello\n", model="gpt-4") == 1
    assert_one_line(capsys, "gpt-4")


@pytest.mark.parametrize("before", [0, 2])
def test_a_failing_answer(capsys, monkeypatch, before):
    service = ScriptedService([*says("abcd")[:before], UnavailableError("the worker is gone")])
    with served(service) as url:
        assert chat(monkeypatch, url, "Hello\nAgain\n") == 1
    assert_one_line(capsys, "the worker is gone")
    assert len(service.requests) == 1


def test_a_server_that_speaks_otherwise():
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=[]))
    with (
        httpx.Client(transport=transport, base_url="http://x") as client,
        pytest.raises(Exception, match="OpenAI"),
    ):
        first_model(client)


def test_what_was_said_before_an_answer_was_stopped_is_kept():
    service = ScriptedService(says("a long answer"))
    with served(service) as url, httpx.Client(base_url=url, timeout=DEADLINE_S) as client:
        conversation = Conversation(client, first_model(client), {})
        answer = conversation.ask("Hello")
        assert [next(answer), next(answer)] == ["a", " "]
        answer.close()
        assert conversation.messages[-1] == {"role": "assistant", "content": "a "}


def test_a_failed_question_is_forgotten():
    service = ScriptedService([UnavailableError("busy")], says("yes"))
    with served(service) as url, httpx.Client(base_url=url, timeout=DEADLINE_S) as client:
        conversation = Conversation(client, "tiny", {})
        with pytest.raises(Exception, match="busy"):
            list(conversation.ask("Hello"))
        assert "".join(conversation.ask("Again")) == "yes"
        assert [message["content"] for message in conversation.messages] == ["Again", "yes"]


def assert_one_line(capsys, *words):
    shown = capsys.readouterr().err
    assert shown.startswith("afd chat: ") and shown.count("\n") == 1
    for word in words:
        assert word in shown


def test_at_a_terminal():
    """Ctrl-C stops an answer and keeps the conversation, an error is one line of it, Ctrl-D leaves."""
    stuck = [*says("ab")[:1], asyncio.Event()]
    service = ScriptedService(stuck, [UnavailableError("busy")], says("fine"))
    with served(service) as url, Terminal("chat", "--url", url) as terminal:
        terminal.read_until("you> ")
        terminal.write("Hello\n")
        terminal.read_until("Hello", "a")
        terminal.write("\x03")
        terminal.read_until("you> ")
        terminal.write("Again\n")
        terminal.read_until("Again", "busy", "you> ")
        terminal.write("Again\n")
        terminal.read_until("fine", "you> ")
        terminal.write("\x04")
        assert terminal.wait() == 0
    assert prompts(service)[2] == "<user>Hello<|end|><assistant>a<|end|><user>Again<|end|><assistant>"


class Terminal:
    """The command line behind a pseudo-terminal."""

    def __init__(self, *arguments):
        self._own, theirs = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "afd_server", *arguments], stdin=theirs, stdout=theirs, stderr=theirs,
            start_new_session=True, env={**os.environ, "TERM": "dumb"},
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(theirs)
        self._seen = ""

    def read_until(self, *words):
        """Reads on until each of the words has come, in this order."""
        for word in words:
            while word not in self._seen:
                assert select.select([self._own], [], [], DEADLINE_S)[0], (
                    f"{word!r} did not come: {self._seen!r}"
                )
                self._seen += os.read(self._own, 4096).decode()
            self._seen = self._seen.split(word, 1)[1]

    def write(self, text):
        os.write(self._own, text.encode())

    def wait(self):
        return self._process.wait(DEADLINE_S)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait(DEADLINE_S)
        os.close(self._own)
