"""An HTTP proxy on loopback in front of a store: counts what is asked, and answers as badly as it is told.

>>> with Proxy("http://127.0.0.1:5000") as proxy:
...     proxy.weather = Weather(slow_down=0.05, reset=0.02, cut=0.02)
...     use(proxy.url)
...     proxy.seen
Counter({'passed': 91, 'slow_down': 5, 'reset': 2, 'cut': 2})
"""

from __future__ import annotations

import asyncio
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

MAX_BODY_BYTES = 64 * 2**20

SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)


@dataclass(frozen=True, kw_only=True)
class Weather:
    """Shares of requests; which ones follows from the seed and their number."""

    slow_down: float = 0.0
    """Answered by 503."""
    reset: float = 0.0
    """The connection is reset: half of them before the store is asked, half after it."""
    cut: float = 0.0
    """The body ends early."""
    wait: float = 0.0
    """Answered `wait_s` later."""
    wait_s: float = 0.0
    latency_s: float = 0.0
    """Of every request."""
    hold_until: int = 0
    """Requests are held until so many are in flight, or 60 s have passed."""
    dark_at: int | None = None
    """The how-many-th request, of those that `dark_on` fits, finds the store dark: for `dark_s`, what is asked is held
    and then reset."""
    dark_on: str = ""
    """Regular expression for method and target, `PUT /bucket/key`."""
    dark_s: float = 0.0
    seed: int = 0


@dataclass(kw_only=True)
class Request:
    method: str
    target: str
    headers: Mapping[str, str]
    """Names in lower case."""
    raw: bytes
    """What goes to the store."""


class Proxy:
    """Runs in a thread of its own while the block does."""

    def __init__(self, upstream: str, *, remember: bool = False):
        """Takes the store's URL; with `remember` it is asked for the same only once."""
        parts = urlsplit(upstream)
        self._upstream = parts.hostname, parts.port
        self._memory: dict[tuple[str, ...], tuple[bytes, bytes]] | None = {} if remember else None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._connections: set[asyncio.Task[None]] = set()
        self._in_flight = 0
        self.reset_counts(Weather())

    def reset_counts(self, weather: Weather) -> None:
        """Sets the weather and counts from 0."""
        self.weather, self._random, self._number = weather, random.Random(weather.seed), 0
        self._dark_until, self._fitting = 0.0, 0
        self.seen, self.methods, self.most_in_flight = Counter[str](), Counter[str](), 0
        self.targets: set[str] = set()
        self.signers = Counter[str]()
        self._enough = asyncio.Event()

    def clear_up(self) -> None:
        """Fair weather from now on; the counts stay."""
        self.weather, self._dark_until = Weather(), 0.0

    def __enter__(self) -> Proxy:
        self._thread.start()
        starting = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result(30)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    async def _close(self) -> None:
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while (request := await _read_request(reader, writer)) is not None:
                self._in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self._in_flight)
                try:
                    if not await self._answer(request, writer):
                        break
                finally:
                    self._in_flight -= 1
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client went away, or the proxy is closed
        finally:
            self._connections.discard(task)
            writer.transport.abort()

    def _outcome(self, request: Request) -> str:
        weather = self.weather
        self._number += 1
        if re.search(weather.dark_on, f"{request.method} {request.target}"):
            self._fitting += 1
            if self._fitting == weather.dark_at:
                self._dark_until = time.monotonic() + weather.dark_s
        if time.monotonic() < self._dark_until:
            return "dark"
        draw = self._random.random()
        for name in ("slow_down", "reset", "cut", "wait"):
            share: float = getattr(weather, name)
            if draw < share:
                return name
            draw -= share
        return "passed"

    async def _answer(self, request: Request, writer: asyncio.StreamWriter) -> bool:
        """Answers, and says whether the connection stays."""
        outcome = self._outcome(request)
        self.seen[outcome] += 1
        self.methods[request.method] += 1
        self.targets.add(f"{request.method} {request.target}")
        signed = re.search(r"Credential=([^/]+)/", request.headers.get("authorization", ""))
        self.signers[signed[1] if signed else "nobody"] += 1
        if self.weather.hold_until:
            if self.most_in_flight >= self.weather.hold_until:
                self._enough.set()
            await asyncio.wait_for(self._enough.wait(), 60)
        await asyncio.sleep(self.weather.latency_s + (self.weather.wait_s if outcome == "wait" else 0))
        if outcome == "dark":
            await asyncio.sleep(max(0.0, self._dark_until - time.monotonic()))
            return False
        if outcome == "slow_down":
            head = (
                f"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: {len(SLOW_DOWN)}\r\n\r\n"
            )
            writer.write(head.encode() + (b"" if request.method == "HEAD" else SLOW_DOWN))
            await writer.drain()
            return True
        if outcome == "reset" and self._number % 2:
            return False
        head, body = await self._ask(request)
        if outcome == "reset":
            return False
        writer.write(head + (body[: len(body) // 2] if outcome == "cut" else body))
        await writer.drain()
        return outcome != "cut"

    async def _ask(self, request: Request) -> tuple[bytes, bytes]:
        key = (request.method, request.target, *(request.headers.get(name, "") for name in ("range", "if-match")))
        if self._memory is not None and key in self._memory:
            return self._memory[key]
        reader, writer = await asyncio.open_connection(*self._upstream)
        try:
            writer.write(request.raw)
            head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.read(-1)
        finally:
            writer.transport.abort()
        if b"transfer-encoding: chunked" in head.lower():
            body = _joined(body)
        answer = _as_http_1_1(head, body, request.method), body
        if self._memory is not None and request.method in ("GET", "HEAD"):
            self._memory[key] = answer
        return answer


async def _read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")[:-2]
    method, target, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("expect", "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    length = int(headers.get("content-length", 0))
    assert length <= MAX_BODY_BYTES and "transfer-encoding" not in headers, headers
    body = await reader.readexactly(length)
    kept = [line for line in lines if line.partition(":")[0].lower() not in ("connection", "expect")]
    raw = "\r\n".join([first, *kept, "Connection: close", "", ""]).encode("latin-1") + body
    return Request(method=method, target=target, headers=headers, raw=raw)


def _joined(chunked: bytes) -> bytes:
    parts, rest = [], chunked
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        parts.append(rest[:length])
        rest = rest[length + 2 :] if length else b""
    return b"".join(parts)


def _as_http_1_1(head: bytes, body: bytes, method: str) -> bytes:
    first, *lines = head.decode("latin-1").split("\r\n")[:-2]
    _, status = first.split(" ", 1)
    dropped = ("connection", "transfer-encoding") + (() if method == "HEAD" else ("content-length",))
    kept = [line for line in lines if line.partition(":")[0].lower() not in dropped]
    if method != "HEAD" and not status.startswith(("204", "304")):
        kept.append(f"Content-Length: {len(body)}")
    return "\r\n".join([f"HTTP/1.1 {status}", *kept, "", ""]).encode("latin-1")


def shares(seen: Counter[str]) -> dict[str, Any]:
    """Returns what was seen, for a line of a test's report."""
    return {name: f"{count} ({count / seen.total():.1%})" for name, count in seen.most_common()}
