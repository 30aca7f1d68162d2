"""Access control: every request passes through here before it reaches the page.

On loopback any process of this machine has access, unless a token is required. From other machines
a token is always required. Requests that another site's page makes the browser send are rejected.
"""

from __future__ import annotations

import hmac
import re
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "shardway_token"  # plus the port: all ports of a host share their cookies
# The Gradio routes that the page needs. Gradio's other routes upload, download, fetch and record.
ALLOWED_PATHS = re.compile(
    r"/|/(config|theme\.css|favicon\.ico)|/(assets|static)/[^?]*"
    r"|/gradio_api/(info|startup-events|cancel|reset|heartbeat/\w+|queue/(join|data))"
)
HEADERS = {
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
        "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
        "connect-src 'self'; worker-src 'self' blob:; frame-ancestors 'none'; form-action 'self'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
}
TOKEN_REQUIRED = "This page needs a token: open the address that shardway ui printed.\n"


class AuthMiddleware:
    """ASGI middleware that checks host, origin, token and path of every request.

    `token` None: no token is required. `hosts` are the accepted host names; None accepts any.
    """

    def __init__(
        self, app: ASGIApp, token: str | None, hosts: frozenset[str] | None, port: int
    ) -> None:
        self.app, self.token, self.hosts = app, token, hosts
        self.cookie = f"{COOKIE}_{port}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {
            key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]
        }
        response = self._refusal(scope, headers)
        if response is None:
            await self.app(scope, receive, _with_headers(send))
        elif scope["type"] == "http":
            await response(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> ASGIApp | None:
        """The response to send instead of the page; None if the request is allowed."""
        host = headers.get("host", "")
        if self.hosts is not None and _host_name(host) not in self.hosts:
            return PlainTextResponse("This page is not served under that host name.\n", 421)
        origin = headers.get("origin")
        if origin and urlsplit(origin).netloc != host:
            return PlainTextResponse("Requests from other sites are rejected.\n", 403)
        if self.token is not None:
            token = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[-1]
            if _tokens_match(token, self.token):
                # Browsers keep the address in their history, so the token moves to a cookie.
                response = RedirectResponse("/" + scope["path"].lstrip("/\\"), 303)
                response.set_cookie(self.cookie, self.token, httponly=True, samesite="strict")
                return response
            if not _tokens_match(_cookie(headers.get("cookie", ""), self.cookie), self.token):
                return PlainTextResponse(TOKEN_REQUIRED, 401)
        path = scope["path"].removeprefix("/zh") or "/"
        if not ALLOWED_PATHS.fullmatch(path) or ".." in path:
            return PlainTextResponse("Not served by this page.\n", 404)
        return None


def _tokens_match(token: str, expected: str) -> bool:
    """Compares in constant time: the duration does not reveal the first difference."""
    return hmac.compare_digest(token.encode(), expected.encode())


def _cookie(header: str, name: str) -> str:
    """The value of a cookie; empty if it is missing."""
    try:
        morsel = SimpleCookie(header).get(name)
    except CookieError:
        return ""
    return morsel.value if morsel else ""


def _host_name(host: str) -> str:
    """The Host header without its port."""
    return host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host


def _with_headers(send: Send) -> Send:
    """`send` that adds HEADERS to the response."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            added = [(key.encode(), value.encode()) for key, value in HEADERS.items()]
            message["headers"] = [*message["headers"], *added]
        await send(message)

    return send_with_headers
