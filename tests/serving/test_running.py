"""What a service says at its beginning and its end, with a small application in place of a model."""

from __future__ import annotations

import asyncio
import http.client
import os
import signal
import socket
import threading

import pytest

from gdrt_ds.serving import running
from gdrt_ds.serving.running import listen, run_service

ANSWER = [
    {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]},
    {"type": "http.response.body", "body": b"ok"},
]


class Application:
    """Answers GET /; a request for /slow never ends."""

    def __init__(self):
        self.slow = threading.Event()

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return
        if scope["path"] == "/slow":
            self.slow.set()
            await asyncio.Event().wait()
        for message in ANSWER:
            await send(message)


@pytest.fixture(autouse=True)
def handlers():
    """A service sets handlers of signals, which are the whole process's."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def lines_of(host: str, path: str) -> list[str]:
    """Serves until one request has come, or is answered where it is; then SIGTERM."""
    place = listen(host, 0)
    port = place.getsockname()[1]
    app = Application()
    said = []

    def visit():
        connection = http.client.HTTPConnection(host, port, timeout=30)
        try:
            connection.request("GET", path)
            if path == "/slow":
                app.slow.wait(30)
                os.kill(os.getpid(), signal.SIGTERM)
                connection.getresponse()
            else:
                assert connection.getresponse().read() == b"ok"
        except (OSError, http.client.HTTPException):
            pass  # the slow one: the service ended
        finally:
            connection.close()
            if not app.slow.is_set():
                os.kill(os.getpid(), signal.SIGTERM)

    visitor = threading.Thread(target=visit)

    def tell(line):
        said.append(line)
        if line.startswith("ready: "):
            visitor.start()

    run_service(app, place, tell)
    visitor.join(30)
    assert said[0] == f"ready: http://{f'[{host}]' if ':' in host else host}:{port}"
    return said


def test_the_end_says_whether_all_accepted_requests_are_answered(monkeypatch):
    monkeypatch.setattr(running, "MAX_ENDING_S", 1)
    assert lines_of("127.0.0.1", "/")[1:] == ["stopped: everything that was accepted is answered"]
    (last,) = lines_of("127.0.0.1", "/slow")[1:]
    assert last.startswith("stopped: 1 accepted requests are not answered; they took more than 1 s")


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as place:
            place.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loop-back address")
def test_an_ipv6_address_is_printed_as_a_url_has_it():
    assert lines_of("::1", "/")[0].startswith("ready: http://[::1]:")
