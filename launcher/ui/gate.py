"""Who may come in: every request passes here before the page sees it.

On loopback any process of this machine may, unless a token is asked for; from elsewhere only who
has the token. Requests that a page of another site makes this browser send are turned away.
"""

from __future__ import annotations

import hmac
import re
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "shardway_token"  # and the port: cookies are shared between those of a host
# What the page needs of Gradio. Its other routes take files in, give files out, fetch, and record.
OPEN = re.compile(
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
REFUSED = "This page asks for its token: open the address that shardway ui printed.\n"


class Gate:
    """An ASGI application around another. `hosts` are the names it answers to; none: any."""

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
        answer = self._refusal(scope, headers)
        if answer is None:
            await self.app(scope, receive, _with_headers(send))
        elif scope["type"] == "http":
            await answer(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> ASGIApp | None:
        """What to answer instead of the page, None for who may come in."""
        host = headers.get("host", "")
        if self.hosts is not None and _name(host) not in self.hosts:
            return PlainTextResponse("This page is not served under that name.\n", 421)
        origin = headers.get("origin")
        if origin and urlsplit(origin).netloc != host:
            return PlainTextResponse("Another site's page has asked for this.\n", 403)
        if self.token is not None:
            asked = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[-1]
            if _same(asked, self.token):
                # Out of the address, which stands in histories, and into a cookie.
                answer = RedirectResponse("/" + scope["path"].lstrip("/\\"), 303)
                answer.set_cookie(self.cookie, self.token, httponly=True, samesite="strict")
                return answer
            if not _same(_cookie(headers.get("cookie", ""), self.cookie), self.token):
                return PlainTextResponse(REFUSED, 401)
        path = scope["path"].removeprefix("/zh") or "/"
        if not OPEN.fullmatch(path) or ".." in path:
            return PlainTextResponse("Not served by this page.\n", 404)
        return None


def _same(given: str, token: str) -> bool:
    """In a time that tells nothing of where they differ."""
    return hmac.compare_digest(given.encode(), token.encode())


def _cookie(text: str, name: str) -> str:
    try:
        found = SimpleCookie(text).get(name)
    except CookieError:
        return ""
    return found.value if found else ""


def _name(host: str) -> str:
    """The Host header without its port."""
    return host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host


def _with_headers(send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            ours = [(key.encode(), value.encode()) for key, value in HEADERS.items()]
            message["headers"] = [*message["headers"], *ours]
        await send(message)

    return sent
