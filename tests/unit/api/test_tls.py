"""https: the certificate's files, clients with and without a certificate, and the clients of this project."""

import asyncio
import shutil
import ssl
import subprocess

import httpx
import pytest

from afd_server.admin import show_workers
from afd_server.api.tls import tls_context
from afd_server.config import ServeConfig
from afd_server.errors import ConfigError
from tests.unit.api.running_server import DEADLINE_S, Running
from tests.unit.api.scripted_service import ScriptedService, says

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two certificates that sign themselves, with their keys."""
    directory = tmp_path_factory.mktemp("certificates")
    for name in ("mine", "other"):
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
             "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1",
             "-keyout", directory / f"{name}.key", "-out", directory / f"{name}.crt"],
            check=True, capture_output=True, timeout=60,
        )  # fmt: skip
    (directory / "both.pem").write_text(
        (directory / "mine.crt").read_text() + (directory / "mine.key").read_text()
    )
    (directory / "nonsense").write_text("nonsense")
    return directory


def context(files, certfile, keyfile=None, **settings):
    paths = {"ssl_certfile": certfile, "ssl_keyfile": keyfile, "ssl_ca_certs": settings.pop("ca_certs", None)}
    given = {name: None if path is None else str(files / path) for name, path in paths.items()}
    return tls_context(ServeConfig(**given, **settings))


@pytest.mark.parametrize(
    ("given", "flag", "words"),
    [
        ({"certfile": "none", "keyfile": "mine.key"}, "--ssl-certfile", "No such file"),
        ({"certfile": "nonsense", "keyfile": "mine.key"}, "--ssl-certfile", "no certificate"),
        ({"certfile": "mine.crt", "keyfile": "none"}, "--ssl-keyfile", "No such file"),
        ({"certfile": "mine.crt", "keyfile": "nonsense"}, "--ssl-keyfile", "no key"),
        ({"certfile": "mine.crt", "keyfile": "other.key"}, "--ssl-keyfile", "not the key of the certificate"),
        ({"certfile": "mine.crt"}, "--ssl-keyfile", "no key"),
        ({"certfile": None, "keyfile": "mine.key"}, "--ssl-keyfile", "needs --ssl-certfile"),
        ({"certfile": "both.pem", "ca_certs": "nonsense"}, "--ssl-ca-certs", "no certificate"),
        ({"certfile": "both.pem", "ssl_cert_reqs": 2}, "--ssl-cert-reqs", "--ssl-ca-certs"),
        ({"certfile": "both.pem", "ssl_cert_reqs": 3}, "--ssl-cert-reqs", "not one of 0, 1, 2"),
    ],
)
def test_what_is_wrong_is_named(files, given, flag, words):
    with pytest.raises(ConfigError, match=words) as caught:
        context(files, **given)
    assert str(caught.value).startswith(flag + ": ")


def test_without_files_there_is_no_https():
    assert tls_context(ServeConfig()) is None


async def test_answers_and_streams(files):
    verify = ssl.create_default_context(cafile=files / "mine.crt")
    async with Running(ScriptedService(says("abc")), tls=context(files, "both.pem"), verify=verify) as running:
        for stream in (False, True):
            body = {"prompt": "hi", "stream": stream}
            answer = await running.client.post("/v1/completions", json=body)
            assert answer.status_code == 200 and '"finish_reason":"stop"' in answer.text
        plain = httpx.AsyncClient(timeout=DEADLINE_S)
        async with plain:
            with pytest.raises(httpx.HTTPError):
                await plain.get(running.url.replace("https", "http"))
        assert (await running.client.get("/health")).status_code == 200


async def test_clients_may_have_to_show_a_certificate(files):
    tls = context(files, "mine.crt", "mine.key", ca_certs="other.crt", ssl_cert_reqs=2)
    known = ssl.create_default_context(cafile=files / "mine.crt")
    known.load_cert_chain(files / "other.crt", files / "other.key")
    stranger = ssl.create_default_context(cafile=files / "mine.crt")
    async with Running(ScriptedService(says("a")), tls=tls, verify=known) as running:
        async with httpx.AsyncClient(verify=stranger, timeout=DEADLINE_S) as client:
            with pytest.raises(httpx.HTTPError):
                await client.get(running.url + "/health")
        assert (await running.client.get("/health")).status_code == 200


async def test_the_projects_own_clients_trust_whom_the_environment_names(files, monkeypatch, capsys):
    monkeypatch.setenv("SSL_CERT_FILE", str(files / "mine.crt"))
    service = ScriptedService(says("a"))
    service.workers = type("Workers", (), {"worker_states": lambda _: [], "change_under_way": lambda _: ""})()
    verify = ssl.create_default_context(cafile=files / "mine.crt")
    async with Running(service, tls=context(files, "both.pem"), verify=verify) as running:
        assert await asyncio.to_thread(show_workers, running.url, None) == 0
