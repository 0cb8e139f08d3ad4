"""The front-end's certificate, for https. Whatever is wrong with its files ends the start, and names the flag."""

from __future__ import annotations

import ssl
from pathlib import Path

from afd_server.config import ServeConfig
from afd_server.errors import ConfigError


def tls_context(config: ServeConfig) -> ssl.SSLContext | None:
    """None without --ssl-certfile. Raises ConfigError."""
    if config.ssl_certfile is None:
        for name in ("ssl_keyfile", "ssl_ca_certs"):
            if getattr(config, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')}", "needs --ssl-certfile")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _check_readable("--ssl-certfile", config.ssl_certfile)
    if config.ssl_keyfile is not None:
        _check_readable("--ssl-keyfile", config.ssl_keyfile)
    try:
        # Without a password of its own OpenSSL would ask for one at the terminal.
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password="")
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(*_culprit(config, error)) from None
    if config.ssl_ca_certs is not None:
        _check_readable("--ssl-ca-certs", config.ssl_ca_certs)
        try:
            context.load_verify_locations(config.ssl_ca_certs)
        except ssl.SSLError as error:
            raise ConfigError(
                "--ssl-ca-certs", f"{config.ssl_ca_certs} holds no certificate: {error.reason}"
            ) from None
    if config.ssl_cert_reqs and config.ssl_ca_certs is None:
        raise ConfigError("--ssl-cert-reqs", "certificates of clients are checked against --ssl-ca-certs")
    context.verify_mode = ssl.VerifyMode(config.ssl_cert_reqs)
    return context


def _check_readable(flag: str, path: str) -> None:
    try:
        Path(path).open("rb").close()
    except OSError as error:
        raise ConfigError(flag, f"cannot read {path}: {error.strerror or error}") from None


def _culprit(config: ServeConfig, error: Exception) -> tuple[str, str]:
    """Flag and problem. The certificates are read first; OpenSSL does not say of which file it speaks."""
    reason = getattr(error, "reason", None) or str(error)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(config.ssl_certfile)
    except ssl.SSLError:
        return "--ssl-certfile", f"{config.ssl_certfile} holds no certificate in PEM form: {reason}"
    if reason == "KEY_VALUES_MISMATCH":
        return "--ssl-keyfile", f"{config.ssl_keyfile or config.ssl_certfile} is not the key of the certificate"
    return (
        "--ssl-keyfile",
        f"{config.ssl_keyfile or config.ssl_certfile} holds no key that can be used: {reason}",
    )
