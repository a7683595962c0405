"""Where the server listens: a port or a Unix socket, plain or TLS. Imports nothing that a start would wait for."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import stat
from typing import TYPE_CHECKING, NoReturn

from jinfer import ConfigError, ServerConfig

if TYPE_CHECKING:
    import ssl

BACKLOG = 2048  # connections that wait to be accepted


def bind(config: ServerConfig) -> socket.socket:
    """A listening socket: that an address is in use shows before a model is loaded for minutes.

    It has to listen. Two sockets may be bound to one port as long as neither does. Raises ConfigError.
    """
    if config.uds is not None:
        return _bind_path(config.uds)
    host, port = config.host, config.port
    sock = None
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror or error}. Choose another with --host or --port"
        ) from error
    return sock


def _bind_path(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            sock.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_left_over(path):
                raise
            os.unlink(path)
            sock.bind(path)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"cannot listen on {path}: {error.strerror or error}. Choose another with --uds"
        ) from error
    return sock


def _is_left_over(path: str) -> bool:
    """Whether a socket lies there that nobody listens on: a process that was killed leaves its own."""
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
    return False


def unlink(config: ServerConfig) -> None:
    """Removes the Unix socket, if that is where the server listened."""
    if config.uds is not None:
        with contextlib.suppress(OSError):
            os.unlink(config.uds)


def url(config: ServerConfig, sock: socket.socket) -> str:
    """Where the server can be reached, for people to read."""
    if config.uds is not None:
        return f"unix:{config.uds}"
    scheme = "https" if config.ssl_certfile else "http"
    host = config.host
    name = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{scheme}://{name}:{sock.getsockname()[1]}{config.root_path or ''}"


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def tls_context(config: ServerConfig) -> ssl.SSLContext | None:
    """What HTTPS is served with; None for plain HTTP. Raises ConfigError for files that are no certificate and key."""
    if config.ssl_certfile is None:
        return None
    import ssl  # ten milliseconds that others do not pay

    def no_password() -> NoReturn:
        raise ConfigError(f"the key of {config.ssl_certfile} is encrypted: give it without a password")

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, no_password)
    except OSError as error:  # ssl.SSLError is one
        files = " and ".join(filter(None, (config.ssl_certfile, config.ssl_keyfile)))
        raise ConfigError(f"cannot serve HTTPS with {files}: {error}") from error
    return context
