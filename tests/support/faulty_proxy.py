"""A reverse proxy between S3 clients and a real server, which fails as it is told and counts."""

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

from aiohttp import ClientConnectionError, ClientSession, ClientTimeout, TCPConnector, web
from yarl import URL

_SLOW_DOWN = (
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
_OF_ONE_HOP = {"connection", "expect", "keep-alive", "transfer-encoding"}


class FaultyProxy:
    """A proxy in a thread of its own; its public attributes may be changed at any time.

    Objects are counted by their path, as in "/bucket/prefix/name".
    """

    def __init__(self, server_url: str) -> None:
        self.refusals = 0  # so many next requests are answered with 503 SlowDown
        self.lost_answers = 0  # so many next requests are carried out, the answers never sent
        self.cuts = 0  # so many next bodies longer than `cut_after_bytes` end there
        self.cut_after_bytes = 0
        self.delay_seconds = 0.0  # before each answer
        self.requests: Counter[tuple[str, str]] = Counter()  # of (method, path), refused or not
        # Of the bodies of (method, path): of PUT what came, of the others what was answered.
        self.transferred_bytes: Counter[tuple[str, str]] = Counter()
        self._server_url = server_url
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _open(self) -> None:
        self._session = ClientSession(
            connector=TCPConnector(limit=0, force_close=True),
            timeout=ClientTimeout(),
            auto_decompress=False,
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        )
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(
            application, access_log=None, handler_cancellation=True, shutdown_timeout=0.1
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.endpoint_url = f"http://{host}:{port}"

    async def _close(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests[request.method, request.path] += 1
        await asyncio.sleep(self.delay_seconds)
        if self.refusals > 0:
            self.refusals -= 1
            return web.Response(status=503, body=_SLOW_DOWN, content_type="application/xml")
        try:
            return await self._forward(request)
        except ClientConnectionError:
            return self._hang_up(request)

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        """Pass a request on as it came; its signature covers the Host header, too."""
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _OF_ONE_HOP}
        async with self._session.request(
            request.method,
            URL(self._server_url + request.raw_path, encoded=True),
            headers=headers,
            data=self._body(request) if request.can_read_body else None,
            allow_redirects=False,
        ) as answer:
            if self.lost_answers > 0:
                self.lost_answers -= 1
                return self._hang_up(request)
            response = web.StreamResponse(status=answer.status, reason=answer.reason)
            response.headers.extend(
                (k, v) for k, v in answer.headers.items() if k.lower() not in _OF_ONE_HOP
            )
            await response.prepare(request)
            sent = 0
            async for data in answer.content.iter_any():
                if cut := self.cuts > 0 and sent + len(data) > self.cut_after_bytes:
                    self.cuts -= 1
                    data = data[: max(0, self.cut_after_bytes - sent)]
                await response.write(data)
                sent += len(data)
                if request.method != "PUT":
                    self.transferred_bytes[request.method, request.path] += len(data)
                if cut:
                    return self._hang_up(request)
            await response.write_eof()
            return response

    async def _body(self, request: web.Request) -> AsyncIterator[bytes]:
        async for data in request.content.iter_any():
            if request.method == "PUT":
                self.transferred_bytes[request.method, request.path] += len(data)
            yield data

    def _hang_up(self, request: web.Request) -> web.StreamResponse:
        assert request.transport
        request.transport.close()
        return web.Response()
