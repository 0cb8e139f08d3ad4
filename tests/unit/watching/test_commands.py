"""`afd top`, `afd report` and `afd trace` against a server that says what the test wants."""

import gzip
import http.server
import json
import threading

import pytest
from rich.console import Console

from afd_server.cli import main
from afd_server.watching import top as top_module
from afd_server.watching.frame import frame
from afd_server.watching.report import shown
from tests.unit.watching.views import REPORT, STATES, exposition, view

WIDTHS = (80, 120)


@pytest.fixture
def server():
    """Answers a path with (status, content); "key" is the one key, where it has one."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path, _, query = self.path.partition("?")
            built.asked.append((path, query))
            key_is_right = built.key is None or self.headers["Authorization"] == f"Bearer {built.key}"
            status, content = (
                built.answers[path] if key_is_right else (401, {"error": {"message": "no such key"}})
            )
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    built = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    built.key, built.asked = None, []
    built.answers = {
        "/admin/workers": (200, {"change": None, "workers": STATES}),
        "/admin/stragglers": (200, REPORT),
        "/admin/trace": (200, {"traceEvents": []}),
        "/metrics": (200, exposition()),
    }
    built.url = f"http://127.0.0.1:{built.server_port}"
    thread = threading.Thread(target=built.serve_forever, daemon=True)
    thread.start()
    yield built
    built.shutdown()
    built.server_close()


def drawn(part, width):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(part)
    return console.export_text()


@pytest.mark.parametrize("width", WIDTHS)
def test_a_frame_has_every_worker_in_a_line_and_says_what_it_does(width):
    text = drawn(frame(view()), width)
    lines = text.splitlines()
    assert all(len(line) <= width for line in lines)
    assert "8 running, 3 waiting, 0 queued" in text
    assert "0.4 tokens/s, 6 prompt tokens/s" in text
    (attention,) = [line.split() for line in lines if line.startswith("attention-0")]
    assert attention == ["attention-0", "serving", "67m", "8", "3", "58%", "4", "8.0", "2.00", "ms", "-"]
    (ffn,) = [line.split() for line in lines if line.startswith("ffn-0")]
    assert ffn == ["ffn-0", "serving", "2m", "4", "8.0", "4.00", "ms", "0.3x"]
    assert "down: has not" in text
    assert "3.0x" in text
    assert "hop  attention 2.00 ms  wire 0.50 ms  FFN 1.50 ms  bubble 40%  micro-batches 2.0" in text
    assert "* ffn-1 is slow: it takes 3.0 times as long" in " ".join(text.split())


def test_a_frame_tells_of_a_change_and_of_a_server_that_does_not_answer():
    text = drawn(frame(view(change="scaling to 3", problem="connection refused", seconds=None)), 120)
    assert "scaling to 3" in text
    assert "connection refused" in text
    assert "since the start" in text
    assert "4 tokens, 64 prompt tokens" in text


def test_top_once_prints_a_frame_and_ends(server, capsys):
    server.key = "operator"
    assert main(["top", "--once", "--url", server.url, "--api-key", "operator,client"]) == 0
    text = capsys.readouterr().out
    assert "tiny-model" in text
    assert "attention-0" in text


def test_top_goes_on_when_the_server_does_not_answer_and_ends_by_an_interrupt(server, monkeypatch):
    frames, sleeps = [], []

    def sleep(seconds):
        sleeps.append(seconds)
        if len(sleeps) == 2:
            server.answers["/metrics"] = (500, b"")
        if len(sleeps) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(top_module.time, "sleep", sleep)
    monkeypatch.setattr(top_module, "frame", lambda view: (frames.append(view), frame(view))[1])
    console = Console(file=open("/dev/null", "w"), force_terminal=True, width=80)  # noqa: SIM115
    assert top_module.top(server.url, None, once=False, console=console) == 0
    assert [bool(each.problem) for each in frames] == [False, False, True, True]
    assert frames[0].seconds is None
    assert frames[1].seconds > 0
    assert frames[3].workers == STATES


def test_the_report_says_who_is_slow_and_how_experts_are_loaded(server, capsys):
    assert main(["report", "--url", server.url]) == 0
    text = capsys.readouterr().out
    for part in (
        "of the last 50 s:",
        "ffn-1 is slow",
        "OVER PEERS",
        "3.00",
        "HOTTEST EXPERTS",
        "2.25",
        "LOAD OVER MEAN",
    ):
        assert part in text
    assert main(["report", "--json", "--url", server.url]) == 0
    assert json.loads(capsys.readouterr().out) == REPORT


def test_a_report_of_nothing_is_one():
    empty = json.loads(json.dumps({**REPORT, "waits": {}, "hottest_experts": [], "seconds": None}))
    text = "".join(drawn(part, 80) for part in shown(empty))
    assert "since the workers were loaded" in text
    assert "LOAD" not in text


def test_a_trace_is_written_and_compressed_by_its_name(server, tmp_path, capsys):
    plain, compressed = tmp_path / "trace.json", tmp_path / "trace.json.gz"
    for path in (plain, compressed):
        assert main(["trace", "--seconds", "0.5", "-o", str(path), "--url", server.url]) == 0
    assert server.asked[-1] == ("/admin/trace", "seconds=0.5")
    assert (
        json.loads(plain.read_bytes())
        == json.loads(gzip.decompress(compressed.read_bytes()))
        == {"traceEvents": []}
    )
    assert "ui.perfetto.dev" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["top", "--once"], ["report"], ["trace"]])
def test_a_wrong_key_or_no_server_is_one_line(server, command, capsys):
    server.key = "operator"
    assert main([*command, "--url", server.url, "--api-key", "guessed"]) == 1
    assert capsys.readouterr().err == f"afd {command[0]}: no such key\n"
    assert main([*command, "--url", "http://127.0.0.1:1"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "127.0.0.1:1" in error


def test_a_file_that_cannot_be_written_is_one_line(server, tmp_path, capsys):
    assert main(["trace", "-o", str(tmp_path / "no" / "trace.json"), "--url", server.url]) == 1
    assert "No such file or directory" in capsys.readouterr().err
