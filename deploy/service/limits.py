"""What a request may ask of the service: a size, a time, and a key."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of the service.

    Attributes:
        max_body_bytes: Of a request's body.
        max_pixels: Width times height of an image.
        max_results: k at most.
        max_items: Items of one request at most.
        max_waiting: Images that may wait for the model; more are refused with status 429.
        timeout: Seconds that a request may take.
        max_batch: Images of one forward pass.
    """

    max_body_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    max_results: int = 1000
    max_items: int = 1000
    max_waiting: int = 256
    timeout: float = 30.0
    max_batch: int = 16

    def __post_init__(self):
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be > 0, got {value}")


class Guard:
    """ASGI middleware around the whole service: key, size of the body, time; and it counts.

    Args:
        app: What it guards.
        limits: [`Limits`].
        api_key: What `X-API-Key` must be; None: anybody may ask.
        observe: Called with method, route, status and seconds of each request.
    """

    # the description too, as of any FastAPI service: a browser sends no key before its page has asked for one
    OPEN = ("/health", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json")

    def __init__(self, app, limits, api_key, observe):
        self.app, self.limits, self.api_key, self.observe = app, limits, api_key, observe

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status, body = time.perf_counter(), None, _Body(receive, self.limits.max_body_bytes)

        async def sending(message):
            nonlocal status
            if body.is_too_large and status in (None, 413):  # whatever the service made of half a body
                if status is None:
                    status = 413
                    await _answer(send, 413, self._too_large())
                return
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is not None:
                await _answer(sending, *refusal)
                return
            try:
                async with asyncio.timeout(self.limits.timeout):
                    await self.app(scope, body.receive, sending)
            except TimeoutError:
                if status is None:
                    await _answer(sending, 504, f"this took longer than {self.limits.timeout:g} seconds")
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self.observe(scope["method"], route, status or 500, time.perf_counter() - begin)

    def _refusal(self, scope):
        """Status and text, or None."""
        headers = dict(scope["headers"])
        if self.api_key is not None and scope["path"] not in self.OPEN:
            given = headers.get(b"x-api-key", b"")
            if not hmac.compare_digest(given, self.api_key.encode()):
                return 401, "the header X-API-Key must hold the service's key"
        if any(
            ord(letter) < 32 or ord(letter) == 127 for letter in scope["path"]
        ):  # routes would pass over a line break
            return 422, "an address can't have control characters, such as line breaks"
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.limits.max_body_bytes:
            return 413, self._too_large()
        return None

    def _too_large(self):
        return f"a request's body may have {self.limits.max_body_bytes:,} bytes"


class _Body:
    """A request's body as it comes in; it breaks off where it has too many bytes."""

    def __init__(self, receive, most):
        self._receive, self._most, self._bytes = receive, most, 0

    @property
    def is_too_large(self):
        return self._bytes > self._most

    async def receive(self):
        message = await self._receive()
        self._bytes += len(message.get("body", b""))
        return {"type": "http.disconnect"} if self.is_too_large else message


async def _answer(send, status, text):
    body = json.dumps({"detail": text}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 413:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


__all__ = ["Guard", "Limits"]
