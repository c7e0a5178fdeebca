"""A service on the loop-back address, and clients that speak to it over real sockets."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import uvicorn

from gdrt_ds.serving.running import listen
from gdrt_ds.serving.service import Limits, make_service


@dataclass
class Client:
    """Speaks to the service of one port."""

    port: int

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str):
        """Returns status, headers and the text of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {"content-type": "application/json", **headers})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read().decode()
        finally:
            connection.close()

    def post(self, value) -> tuple[int, dict]:
        """Asks for recommendations; bytes are sent as they are."""
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        status, _, text = self.request("POST", "/v1/recommend", body)
        return status, json.loads(text)

    def ask(self, histories, k=10, clients=8) -> list[dict]:
        """Answers to many histories, asked by several clients at the same time."""

        def one(history):
            status, answer = self.post({"history": history, "k": k})
            assert status == 200, answer
            return answer

        with ThreadPoolExecutor(clients) as pool:
            return list(pool.map(one, histories))

    def raw(self, text: bytes, wait_s: float = 10.0) -> bytes:
        """Sends bytes that need not be HTTP; returns what comes back until the connection ends."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=wait_s) as place:
            place.sendall(text)
            parts = []
            with contextlib.suppress(TimeoutError, ConnectionResetError):
                while part := place.recv(65536):
                    parts.append(part)
            return b"".join(parts)


@contextlib.contextmanager
def serving(recommender, **limits) -> Iterator[tuple[Client, object]]:
    """Serves from a thread; gives a client and the application."""
    app = make_service(recommender, Limits(**limits))
    place = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield Client(place.getsockname()[1]), app
    finally:
        server.should_exit = True
        thread.join(timeout=60)
        assert not thread.is_alive()
