"""What a request may cost before anything looks at it: bytes of its body and seconds to send it.

An ASGI middleware reads the body, bounded, and hands the application a complete one. A body that is too large
is read to its end without being kept, up to a limit, because a client that still writes would see a broken
connection instead of the answer.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass

DISCARDED = 32 << 20
"""Bytes of a refused body that are read and thrown away; a client that sends more is cut off."""


@dataclass(frozen=True)
class Refusal(Exception):
    """An answer that is given instead of the application's."""

    status: int
    problem: str


class BodyLimit:
    """Wraps an ASGI application.

    Args:
        app: the application.
        max_bytes: largest body.
        max_seconds: time in which a body must have come.
    """

    def __init__(self, app, max_bytes: int, max_seconds: float):
        self.app = app
        self.max_bytes = max_bytes
        self.max_seconds = max_seconds

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._body(receive), self.max_seconds)
        except asyncio.TimeoutError:
            await _refuse(send, Refusal(408, f"the body did not come within {self.max_seconds:g} s"))
            return
        except Refusal as refusal:
            await _refuse(send, refusal)
            return
        if body is None:
            return  # the client is gone
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay():
            if parts:
                return parts.pop()
            return await receive()

        await self.app(scope, replay, send)

    async def _body(self, receive) -> bytes | None:
        """The whole body; None if the client left.

        Raises:
            Refusal: it is larger than `max_bytes`.
        """
        parts = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            piece = message.get("body", b"")
            size += len(piece)
            if size <= self.max_bytes:
                parts.append(piece)
            else:
                parts = []
            if not message.get("more_body", False) or size > DISCARDED:
                break
        if size > self.max_bytes:
            raise Refusal(413, f"the body is larger than {self.max_bytes} bytes")
        return b"".join(parts)


async def _refuse(send, refusal: Refusal) -> None:
    text = json.dumps({"error": refusal.problem}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(text)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": text})
