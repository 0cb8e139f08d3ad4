"""API keys of a file: what the command writes, the ring reads, and what a change of the file does."""

import logging
import os

import pytest

from afd_server.api.keys import MAX_KEYS, MAX_SENT_BYTES, KeyRing, new_key, parse_line
from afd_server.cli import main
from afd_server.errors import ConfigError
from tests.unit.api.scripted_service import ScriptedService, client_for, says

HASH = f"blake2b:{'ab' * 16}:{'cd' * 32}"


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def file_of(tmp_path, *entries, name="keys"):
    path = tmp_path / name
    path.write_text("".join(entry.line() + "\n" for entry in entries))
    path.chmod(0o600)
    return path


def test_what_the_command_prints_opens_and_what_it_writes_does_not_tell_it(tmp_path, capsys):
    path = tmp_path / "keys"
    limits = ["--requests-per-minute", "6", "--tokens-per-minute", "700"]
    assert main(["key", "new", "alice", *limits, "--file", str(path)]) == 0
    alice = capsys.readouterr().out.strip()
    assert main(["key", "new", "ops", "--operator", "--file", str(path)]) == 0
    ops = capsys.readouterr().out.strip()
    ring = KeyRing(file=str(path))
    found = ring.find(alice.encode())
    assert (found.name, found.is_operator, found.requests_per_minute, found.tokens_per_minute) == (
        "alice", False, 6, 700,
    )  # fmt: skip
    assert ring.find(ops.encode()).is_operator
    assert ring.find(b"afd-other") is None and ring.find(b"") is None
    assert alice not in path.read_text() and alice != ops
    assert path.stat().st_mode & 0o777 == 0o600


def test_without_a_file_the_line_for_one_follows_the_key(capsys):
    assert main(["key", "new", "bob"]) == 0
    key, line = capsys.readouterr().out.splitlines()
    assert parse_line(line).matches(key.encode())


def test_a_line_is_added_below_one_without_an_end(tmp_path, capsys):
    path = tmp_path / "keys"
    path.write_text(f"# ours\nold user {HASH}")
    assert main(["key", "new", "bob", "--file", str(path)]) == 0
    assert [line.split()[0] for line in path.read_text().splitlines()] == ["#", "old", "bob"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a name"], "the name"),
        (["x", "--requests-per-minute", "0"], "requests-per-minute"),
        (["old", "--file", "FILE"], "has a key old already"),
        (["x", "--file", "/nowhere/at/all"], "cannot write"),
    ],
)
def test_a_key_that_cannot_be_made(tmp_path, capsys, arguments, words):
    path = tmp_path / "keys"
    path.write_text(f"old user {HASH}\n")
    before = path.read_text()
    assert main(["key", "new", *(str(path) if word == "FILE" else word for word in arguments)]) == 2
    shown = capsys.readouterr()
    assert words in shown.err and len(shown.err.splitlines()) == 1 and shown.out == ""
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("alice user", "NAME ROLE HASH"),
        (f"al/ice user {HASH}", "the name"),
        (f"alice king {HASH}", "the role"),
        ("alice user sha1:ab:cd", "the hash"),
        (f"alice user {HASH[:-1]}", "the hash"),
        (f"alice user {HASH} requests=5", "requests-per-minute"),
        (f"alice user {HASH} tokens-per-minute=-5", "tokens-per-minute"),
        (f"alice user {HASH} tokens-per-minute={'9' * 5000}", "tokens-per-minute"),
        (f"alice user {HASH} tokens-per-minute=5 tokens-per-minute=6", "each once"),
        (f"bob user {HASH}", "twice"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, words):
    path = tmp_path / "keys"
    path.write_text(f"# people\n\nbob user {HASH}\n{line}\n")
    with pytest.raises(ConfigError, match=r"--api-key-file.*line 4") as caught:
        KeyRing(file=str(path))
    assert words in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"# nobody\n", b"\xff\xfe", b"x" * 2**19])
def test_a_file_that_holds_no_keys(tmp_path, content):
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="--api-key-file"):
        KeyRing(file=str(path))


def test_a_missing_file_and_too_many_keys(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        KeyRing(file=str(tmp_path / "none"))
    path = tmp_path / "keys"
    path.write_text("".join(f"k{i} user {HASH}\n" for i in range(MAX_KEYS + 1)))
    with pytest.raises(ConfigError, match=f"more than {MAX_KEYS}"):
        KeyRing(file=str(path))


def test_keys_of_both_kinds(tmp_path):
    key, kept = new_key("alice")
    ring = KeyRing("first,second", str(file_of(tmp_path, kept)))
    names = [ring.find(sent.encode()).name for sent in ("first", "second", key)]
    assert names == ["api-key-1", "api-key-2", "alice"]
    assert [ring.find(sent.encode()).is_operator for sent in ("first", "second", key)] == [True, False, False]
    _, clashing = new_key("api-key-2")
    with pytest.raises(ConfigError, match="api-key-2"):
        KeyRing("first,second", str(file_of(tmp_path, clashing)))


def test_what_is_sent_is_bounded():
    long = "x" * MAX_SENT_BYTES
    assert KeyRing(long).find(long.encode()) is not None
    assert KeyRing(long).find(long.encode() + b"x") is None
    with pytest.raises(ConfigError, match="--api-key"):
        KeyRing(long + "x")


def test_every_key_is_compared_whichever_it_is(tmp_path, monkeypatch):
    """Else the time would tell where in the file a key stands."""
    keys = [new_key(f"k{i}") for i in range(5)]
    ring = KeyRing(file=str(file_of(tmp_path, *(kept for _, kept in keys))))
    asked = []
    real = __import__("hmac").compare_digest
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: asked.append(b) or real(a, b))
    for sent in (keys[0][0], keys[4][0], "stranger"):
        asked.clear()
        ring.find(sent.encode())
        assert len(asked) == 5


def test_a_changed_file_is_read_again(tmp_path):
    clock = Clock()
    (alice, kept_alice), (bob, kept_bob) = new_key("alice"), new_key("bob")
    path = file_of(tmp_path, kept_alice)
    ring = KeyRing(file=str(path), clock=clock)
    os.replace(file_of(tmp_path, kept_bob, name="new"), path)
    assert ring.find(bob.encode()) is None  # it is not looked for with every request
    clock.now += 1
    assert ring.find(bob.encode()).name == "bob" and ring.find(alice.encode()) is None
    os.replace(file_of(tmp_path, name="empty"), path)  # every key is withdrawn: nobody may enter then
    clock.now += 1
    assert ring.find(bob.encode()) is None and ring.is_asked_for


def test_a_change_that_cannot_be_read_changes_nothing(tmp_path, caplog):
    clock = Clock()
    alice, kept = new_key("alice")
    path = file_of(tmp_path, kept)
    ring = KeyRing(file=str(path), clock=clock)
    for change in (lambda: path.write_text("nonsense"), path.unlink):
        change()
        caplog.clear()
        for _ in range(3):
            clock.now += 1
            assert ring.find(alice.encode()).name == "alice"
        assert len(caplog.records) == 1 and "stay as they were" in caplog.text


@pytest.mark.parametrize(("mode", "warns"), [(0o600, False), (0o640, False), (0o644, True), (0o620, True)])
def test_a_file_that_others_reach_is_warned_of(tmp_path, caplog, mode, warns):
    path = file_of(tmp_path, new_key("alice")[1])
    path.chmod(mode)
    with caplog.at_level(logging.WARNING):
        KeyRing(file=str(path))
    assert ("chmod 600" in caplog.text) == warns


async def test_roles_and_names_at_the_door(tmp_path):
    (ops, kept_ops), (alice, kept_alice) = new_key("ops", is_operator=True), new_key("alice")
    service = ScriptedService(says("a"))
    keys = KeyRing(file=str(file_of(tmp_path, kept_ops, kept_alice)))
    async with client_for(service, keys=keys) as client:
        statuses = []
        for key in (ops, alice, "stranger"):
            headers = {"Authorization": f"Bearer {key}"}
            statuses.append(
                (await client.post("/v1/completions", json={"prompt": "x"}, headers=headers)).status_code
            )
            statuses.append((await client.get("/admin/nothing", headers=headers)).status_code)
    assert statuses == [200, 404, 200, 403, 401, 401]
    assert [request.tenant for request in service.requests] == ["ops", "alice"]
