"""A real HTTP server on loopback, for what posts to one: it answers by a script, and remembers what came."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeAlias

SECRET = "T000-B000-not-to-be-told"
"""The path of :attr:`Server.url`."""


class Server(ThreadingHTTPServer):
    """Answers each request by the next answer of its script; the last one goes on for ever."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, answers: Sequence[Answer]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers = list(answers)
        self.bodies: list[Any] = []
        """Of all requests, as JSON; also of those that got no good answer."""
        self.headers: list[dict[str, str]] = []
        self.taken: list[Any] = []
        """Of those that were answered 200."""
        self.ended = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{SECRET}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        answer = self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0]
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.headers.append(dict(self.headers))
        if answer is ok:
            self.server.taken.append(body)  # before the answer, which a test may wait for
        answer(self)

    def do_GET(self) -> None:
        self.server.bodies.append("a GET")
        code(200)(self)

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""


Answer: TypeAlias = Callable[[_Handler], None]


def code(number: int, **headers: str) -> Answer:
    """An empty answer with this status."""

    def answer(request: _Handler) -> None:
        request.send_response(number)
        for name, text in headers.items():
            request.send_header(name.replace("_", "-"), text)
        request.send_header("Content-Length", "0")
        request.end_headers()

    return answer


ok = code(200)


def slowly(request: _Handler) -> None:
    """200, after a while."""
    time.sleep(0.4)
    request.server.taken.append(request.server.bodies[-1])
    code(200)(request)


def hang(request: _Handler) -> None:
    """No answer while the server lives."""
    request.server.ended.wait(60)


def trickle(request: _Handler) -> None:
    """An answer that never ends: a character now and then, so that no read of it takes long."""
    with contextlib.suppress(OSError):
        request.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
        while not request.server.ended.wait(0.1):
            request.wfile.write(b"x")


def hang_up(request: _Handler) -> None:
    """The connection is closed before there is an answer."""
    request.connection.shutdown(socket.SHUT_RDWR)


def break_off(request: _Handler) -> None:
    """The connection is closed in the middle of the status line."""
    request.wfile.write(b"HTTP/1.")
    hang_up(request)


@contextlib.contextmanager
def serving(*answers: Answer) -> Iterator[Server]:
    """A server while the block runs."""
    server = Server(answers)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


def refusing_url() -> str:
    """Of a port that nobody listens on."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{place.getsockname()[1]}/{SECRET}"
