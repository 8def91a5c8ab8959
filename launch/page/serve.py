"""Serves the report of a run on this machine: three known paths, nothing of the disk, drawn anew as the run goes on.

Who asks under another name than this machine's own loopback is refused: a page of a stranger could otherwise have its
name point here, and read the report through the browser of who visits it (DNS rebinding).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HOST = "127.0.0.1"
_NAMES = (HOST, "localhost")
_PATIENCE_S = 10.0
_HEADERS = {
    "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY", "Cross-Origin-Resource-Policy": "same-origin",
}  # fmt: skip

Drawn = tuple[str, str, bool]
"""A page, its version, and whether there will be another."""


class PageServer(ThreadingHTTPServer):
    """Gives what `draw` returns, one call at a time. Raises OSError where the port is taken; 0 takes a free one."""

    daemon_threads = True
    request_queue_size = 16

    def __init__(self, draw: Callable[[], Drawn], port: int = 0) -> None:
        super().__init__((HOST, port), _Handler)
        self._draw, self._one = draw, threading.Lock()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://{HOST}:{self.server_port}/"

    def drawn(self) -> Drawn:
        """The page as it is now."""
        with self._one:
            return self._draw()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is gone is nobody's loss."""


class _Handler(BaseHTTPRequestHandler):
    server_version, sys_version = "Unbroken", ""
    timeout = _PATIENCE_S
    protocol_version = "HTTP/1.0"  # a connection for each answer: none is left open

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        server = self.server
        assert isinstance(server, PageServer)
        host = self.headers.get_all("Host") or []
        allowed = {f"{name}:{server.server_port}" for name in _NAMES}
        if len(host) != 1 or host[0].lower() not in allowed:
            return self._send(HTTPStatus.MISDIRECTED_REQUEST, "text/plain", "not this host\n", body)
        if self.path not in ("/", "/report.html", "/state"):
            return self._send(HTTPStatus.NOT_FOUND, "text/plain", "nothing here\n", body)
        page, version, live = server.drawn()
        if self.path == "/state":
            state = json.dumps({"version": version, "running": live})
            return self._send(HTTPStatus.OK, "application/json", state, body)
        return self._send(HTTPStatus.OK, "text/html", page, body)

    def _send(self, status: HTTPStatus, kind: str, text: str, body: bool) -> None:
        data = text.encode()
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is the user's."""
