"""Asks a server of OpenAI's API for streamed answers, and notes when each piece of one came.

Only the standard library, and one connection a client that is used again, so that what is measured is the server.
"""

import asyncio
import json
import ssl
import time
import urllib.parse
from dataclasses import dataclass, field


@dataclass
class Answered:
    """One answer; times are seconds since it was asked for; `again` says that its connection was found closed."""

    text: str = ""
    pieces: list = field(default_factory=list)
    tokens: int | None = None
    prompt_tokens: int | None = None
    finish: str | None = None
    whole: float = 0.0
    error: str | None = None
    again: bool = False

    @property
    def lost(self):
        """Whether the server neither ended the answer nor said why not."""
        return self.error is None and self.finish is None


class Client:
    """One client, which asks and waits in turn."""

    def __init__(self, url, key=None, timeout=600.0):
        parts = urllib.parse.urlsplit(url)
        self.host, self.tls = parts.hostname, parts.scheme == "https"
        self.port = parts.port or (443 if self.tls else 80)
        self.base, self.key, self.timeout = parts.path.rstrip("/"), key, timeout
        self.reader = self.writer = None

    async def ask(self, body, endpoint="/chat/completions"):
        """Sends `body`, which is an object, to an endpoint that streams as OpenAI's chat or completions do."""
        answered, begin = Answered(), time.perf_counter()
        try:
            async with asyncio.timeout(self.timeout):
                await self._ask(endpoint, json.dumps(body).encode(), answered, begin)
        except (OSError, EOFError, ValueError, TimeoutError, asyncio.IncompleteReadError) as error:
            answered.error = f"{type(error).__name__}: {error}"
            self.close()
        answered.whole = time.perf_counter() - begin
        return answered

    def close(self):
        if self.writer:
            self.writer.close()
        self.reader = self.writer = None

    async def _ask(self, endpoint, body, answered, begin):
        status = None
        if self.writer is not None:
            try:
                status = await self._send(endpoint, body)
            except (ConnectionError, asyncio.IncompleteReadError) as error:
                # A server may close a connection that nobody uses; what it has begun to answer is not asked again.
                if getattr(error, "partial", b""):
                    raise
                answered.again = True
                self.close()
        if status is None:
            status = await self._send(endpoint, body)
        headers = {}
        while line := (await self.reader.readuntil(b"\r\n")).strip():
            name, value = line.decode("latin-1").split(":", 1)
            headers[name.lower()] = value.strip()
        rest = b""
        async for data in self._body(headers):
            rest += data
            if status != 200:
                continue
            *lines, rest = rest.split(b"\n")
            for line in lines:
                note(line.strip(), answered, time.perf_counter() - begin)
        if status != 200:
            answered.error = f"{status}: {rest.decode(errors='replace')[:300]}"
        if headers.get("connection", "").lower() == "close":
            self.close()

    async def _send(self, endpoint, body):
        """Sends a request, over a new connection where there is none; returns its status."""
        if self.writer is None:
            context = ssl.create_default_context() if self.tls else None
            self.reader, self.writer = await asyncio.open_connection(self.host, self.port, ssl=context, limit=1 << 22)
        head = [
            f"POST {self.base}{endpoint} HTTP/1.1",
            f"Host: {self.host}:{self.port}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        ]
        if self.key:
            head.append(f"Authorization: Bearer {self.key}")
        self.writer.write("\r\n".join([*head, "", ""]).encode() + body)
        await self.writer.drain()
        return int((await self.reader.readuntil(b"\r\n")).split()[1])

    async def _body(self, headers):
        if "content-length" in headers:
            yield await self.reader.readexactly(int(headers["content-length"]))
            return
        if headers.get("transfer-encoding", "").lower() != "chunked":
            while data := await self.reader.read(1 << 16):
                yield data
            self.close()
            return
        while size := int((await self.reader.readuntil(b"\r\n")).split(b";")[0], 16):
            yield await self.reader.readexactly(size)
            await self.reader.readexactly(2)
        await self.reader.readuntil(b"\r\n")


def note(line, answered, now):
    """Reads one line of a stream of events into `answered`."""
    if not line.startswith(b"data:") or line.endswith(b"[DONE]"):
        return
    event = json.loads(line[5:])
    if "error" in event:
        answered.error = json.dumps(event["error"])[:300]
    if usage := event.get("usage"):
        answered.tokens, answered.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
    for choice in event.get("choices", ()):
        if text := choice.get("delta", {}).get("content") or choice.get("text"):
            answered.text += text
            answered.pieces.append(now)
        answered.finish = choice.get("finish_reason") or answered.finish
