"""What every request goes through: where it comes from, refusals as answers, headers, the log."""

import logging
import time
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from typing import Any

from aiohttp import web

from streaming.serve.access import Access
from streaming.serve.errors import RefusedError

_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; media-src 'self' blob: mediastream:;"
    " frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_CORS = {
    "Access-Control-Allow-Methods": "GET, POST, DELETE",
    "Access-Control-Allow-Headers": "Authorization, Content-Type",
    "Access-Control-Expose-Headers": "Location, Retry-After",
    "Access-Control-Max-Age": "600",
}
_QUIET = ("/healthz", "/readyz", "/metrics", "/cluster/replicas")  # are asked all the time
_RETRY = 5  # seconds after which a client may ask again

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = logging.getLogger("flashtalk.serve")


def behind(proxies: Collection[str]) -> Any:
    """A middleware that takes the word of these proxies for the address that a request comes from."""

    @web.middleware
    async def believe(request: web.Request, handler: Handler) -> web.StreamResponse:
        told = request.headers.get("X-Forwarded-For")
        if told and request.remote in proxies:
            request = request.clone(remote=told.rpartition(",")[2].strip())  # the last one is what the proxy has seen
        return await handler(request)

    return believe


def with_headers(access: Access) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """For `on_response_prepare` of an application, which streams pass too: the headers of all answers."""

    async def add(request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(_HEADERS)
        with suppress(RefusedError):
            if other_site := access.check_origin(request.headers):
                response.headers.update(_CORS | {"Access-Control-Allow-Origin": other_site, "Vary": "Origin"})

    return add


def answering(access: Access, on_refused: Callable[[str], None]) -> Any:
    """A middleware that checks where a request comes from, turns refusals into answers, and writes the log.

    `on_refused` is called with the code of each refusal.
    """

    @web.middleware
    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        begun = time.monotonic()
        try:
            access.check_origin(request.headers)
            if request.method == "OPTIONS":
                response: web.StreamResponse = web.Response(status=204)
            else:
                response = await handler(request)
        except RefusedError as error:
            response = refused(error)
        except web.HTTPException as error:
            code = {413: "too_large", 403: "not_found", 404: "not_found", 405: "not_found"}.get(error.status)
            response = refused(RefusedError(code or "bad_request"))
        except Exception:
            log.exception("%s %s", request.method, request.path)
            response = refused(RefusedError("internal"))
        if request.path not in _QUIET:
            took = round(time.monotonic() - begun, 3)
            extra = {"method": request.method, "path": request.path, "status": response.status, "seconds": took}
            log.info("%s %s %d", request.method, request.path, response.status, extra=extra)
        return response

    def refused(error: RefusedError) -> web.Response:
        on_refused(error.code)
        body = {"error": {"code": error.code, "message": str(error)}}
        wait = {"Retry-After": str(_RETRY)} if error.status in (429, 503) else {}
        return web.json_response(body, status=error.status, headers=wait)

    return answer
