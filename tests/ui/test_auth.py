"""The auth middleware over HTTP, in front of an application that accepts every request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from urllib.parse import unquote

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from launcher.ui.auth import COOKIE, AuthMiddleware
from launcher.ui.server import LOOPBACK_NAMES

Client = Callable[..., TestClient]


def client(token: str | None = None, hosts: frozenset[str] | None = LOOPBACK_NAMES) -> TestClient:
    page = AuthMiddleware(PlainTextResponse("in"), token, hosts, 7860)
    return TestClient(page, base_url="http://127.0.0.1:7860", follow_redirects=False)


def ask(target: str, token: str | None = None, kind: str = "http", **headers: str) -> list[Message]:
    """The response to a request for exactly `target`: HTTP clients normalize // and .. in it."""
    path, _, query = target.partition("?")
    named = {"host": "127.0.0.1:7860", **headers}
    scope: Scope = {
        "type": kind, "method": "GET", "path": unquote(path), "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in named.items()],
    }  # fmt: skip
    sent: list[Message] = []

    async def page(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"} if kind == "websocket" else {"type": "page"})

    async def receive() -> Message:
        raise AssertionError("a request without a body")

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(AuthMiddleware(page, token, LOOPBACK_NAMES, 7860)(scope, receive, send))
    return sent


def test_loopback_needs_no_token() -> None:
    answer = client().get("/")
    assert (answer.status_code, answer.text) == (200, "in")
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:7860", "", "[::1", "0.0.0.0"]
)
def test_a_foreign_host_name_is_refused(host: str) -> None:
    """A foreign host name whose DNS entry points to this machine is refused."""
    assert client().get("/", headers={"host": host}).status_code == 421


@pytest.mark.parametrize("host", ["localhost:7860", "127.0.0.1", "[::1]:7860", "[::1]"])
def test_names_of_this_machine_are_accepted(host: str) -> None:
    assert client().get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1"])
def test_a_foreign_origin_is_refused(origin: str) -> None:
    assert client().post("/gradio_api/queue/join", headers={"origin": origin}).status_code == 403


def test_the_origin_of_the_page_is_accepted() -> None:
    headers = {"origin": "http://127.0.0.1:7860"}
    assert client().post("/gradio_api/queue/join", headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/", "/zh", "/gradio_api/queue/data", "/config", "/assets/x.js"])
def test_without_the_token_nothing_is_served(path: str) -> None:
    answer = client("secret").get(path)
    assert answer.status_code == 401
    assert "in" not in answer.text.split()


@pytest.mark.parametrize("wrong", ["", "Secret", "secre", "secrets", "sécret", "%00"])
def test_a_wrong_token_is_refused(wrong: str) -> None:
    assert client("secret").get(f"/?token={wrong}").status_code == 401
    cookie = {"cookie": f"{COOKIE}_7860={wrong}".encode()}
    assert client("secret").get("/", headers=cookie).status_code == 401


def test_the_token_is_stored_in_a_cookie() -> None:
    asking = client("secret")
    answer = asking.get("/zh?token=secret")
    assert (answer.status_code, answer.headers["location"]) == (303, "/zh")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert asking.get("/").text == "in"  # the client has the cookie now


@pytest.mark.parametrize(
    "path", ["//evil.example/", "/%2Fevil.example/", "/\\evil.example/", "/%5C/evil.example/"]
)
def test_a_token_redirects_only_to_this_page(path: str) -> None:
    start, _ = ask(f"{path}?token=secret", token="secret")
    assert (start["status"], dict(start["headers"])[b"location"]) == (303, b"/evil.example/")


WEBSOCKETS: dict[str, dict[str, str]] = {
    "another host": {"host": "evil.example", "cookie": f"{COOKIE}_7860=secret"},
    "another site": {"origin": "http://evil.example", "cookie": f"{COOKIE}_7860=secret"},
    "no token": {},
    "a wrong token": {"cookie": f"{COOKIE}_7860=guess"},
}


@pytest.mark.parametrize("headers", WEBSOCKETS.values(), ids=WEBSOCKETS.keys())
def test_a_websocket_is_refused_like_a_request(headers: dict[str, str]) -> None:
    closed: list[Message] = [{"type": "websocket.close", "code": 1008}]
    assert ask("/config", "secret", "websocket", **headers) == closed


def test_a_websocket_with_the_token_reaches_allowed_paths() -> None:
    token = {"token": "secret", "kind": "websocket", "cookie": f"{COOKIE}_7860=secret"}
    assert ask("/config", **token) == [{"type": "websocket.accept"}]
    assert ask("/gradio_api/upload", **token)[0]["type"] == "websocket.close"


@pytest.mark.parametrize(
    "path",
    [
        *("/gradio_api/upload", "/zh/gradio_api/file=/etc/passwd", "/gradio_api/proxy=http://x"),
        *("/gradio_api/process_recording", "/gradio_api/run-history/x", "/gradio_api/runs"),
        *("/openapi.json", "/docs", "/monitoring", "/gradio_api/component_server", "/file=/etc"),
        *("/assets/../gradio_api/upload", "/static/%2e%2e/docs", "/zh/assets/..%2Fdocs"),
        *("/zh/zh/gradio_api/upload", "//gradio_api/upload", "//config", "/%2Fconfig"),
    ],
)
def test_paths_that_the_page_does_not_need_are_not_found(path: str) -> None:
    """These include all paths that upload or download files."""
    assert ask(path)[0].get("status") == 404


@pytest.mark.parametrize("path", ["/", "/zh", "/zh/config", "/assets/a/b.js", "/%63onfig"])
def test_paths_that_the_page_needs_are_served(path: str) -> None:
    assert ask(path) == [{"type": "page"}]
