"""On PYTHONPATH, this keeps an interpreter from every address but its own machine's, and logs who asked for one."""

import socket
import sys
import traceback

HOME = ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", None, "")
_connect, _getaddrinfo = socket.socket.connect, socket.getaddrinfo


def _forbid(address: object) -> None:
    print(f"NETWORK FORBIDDEN: {address}\n{''.join(traceback.format_stack())}", file=sys.stderr, flush=True)
    raise OSError(f"no network in this test: {address}")


def connect(self: socket.socket, address: object) -> None:
    if isinstance(address, tuple) and address[0] not in HOME:
        _forbid(address)
    _connect(self, address)  # type: ignore[arg-type]


def getaddrinfo(host: str | None, *args: object, **kwargs: object) -> object:
    if host not in HOME:
        _forbid(host)
    return _getaddrinfo(host, *args, **kwargs)  # type: ignore[arg-type]


socket.socket.connect = connect  # type: ignore[method-assign]
socket.getaddrinfo = getaddrinfo  # type: ignore[assignment]
