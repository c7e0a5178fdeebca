"""Runs a service until a signal: it then answers what was accepted and ends with status 0."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable

import uvicorn

from gdrt_ds.errors import UserError

MAX_CONNECTIONS = 1024
"""Connections beyond this are answered with 503 by uvicorn."""
MAX_ENDING_S = 120
"""Seconds after which the end of the service does not wait any longer for clients that do not read."""


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket of that address; port 0 takes a free one.

    It does not listen before `run_service`: until then clients are refused, and do not wait for an answer.

    Raises:
        UserError: the address is taken, empty, or none of this machine's.
    """
    if not host:
        raise UserError(
            "--host is empty, which would mean every address of this machine",
            "leave it out for this machine alone, or give --host 0.0.0.0",
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    place = socket.socket(family, socket.SOCK_STREAM)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind((host, port))
    except (OSError, OverflowError) as error:
        place.close()
        raise _cannot_listen(host, port, error) from None
    return place


def _cannot_listen(host: str, port: int, error: Exception) -> UserError:
    return UserError(
        f"--host {host} --port {port}: cannot listen there ({error})", "give another port or address"
    )


def run_service(app, place: socket.socket, tell: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT.

    Args:
        app: the application.
        place: where it listens.
        tell: called with one line when requests are answered, and one when that ends.

    Raises:
        UserError: another service took the address meanwhile.
    """
    host, port = place.getsockname()[:2]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        place.listen()
    except OSError as error:
        raise _cannot_listen(host, port, error) from None
    counting = CountedCancellations(app)
    config = uvicorn.Config(
        counting,
        log_level="warning",
        access_log=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=MAX_ENDING_S,
        server_header=False,
    )
    server = AnnouncingServer(config, lambda: tell(f"ready: http://{address}"))
    # uvicorn raises the signal again when it has finished; the process would then not end with status 0.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server.run(sockets=[place])
    if counting.cancelled:
        tell(
            f"stopped: {counting.cancelled} accepted requests are not answered; they took more than "
            f"{MAX_ENDING_S} s, or a second signal ended them"
        )
    else:
        tell("stopped: everything that was accepted is answered")


class CountedCancellations:
    """An ASGI middleware that counts the requests whose tasks the end of the server cancels.

    Attributes:
        cancelled: their number.
    """

    def __init__(self, app):
        self.app = app
        self.cancelled = 0

    async def __call__(self, scope, receive, send) -> None:
        try:
            await self.app(scope, receive, send)
        except asyncio.CancelledError:
            if scope["type"] == "http":
                self.cancelled += 1
            raise


class AnnouncingServer(uvicorn.Server):
    """uvicorn's server, which calls a function as soon as it answers requests."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]):
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()
