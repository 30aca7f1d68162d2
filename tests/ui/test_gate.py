"""Who is let in, asked over HTTP of the gate before an application that says yes to all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from launcher.ui.gate import COOKIE, Gate
from launcher.ui.server import NAMES

Client = Callable[..., TestClient]


def client(token: str | None = None, hosts: frozenset[str] | None = NAMES) -> TestClient:
    gate = Gate(PlainTextResponse("in"), token, hosts, 7860)
    return TestClient(gate, base_url="http://127.0.0.1:7860", follow_redirects=False)


def test_loopback_needs_no_token() -> None:
    answer = client().get("/")
    assert (answer.status_code, answer.text) == (200, "in")
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:7860", "", "[::1", "0.0.0.0"]
)
def test_another_name_is_turned_away(host: str) -> None:
    """DNS that points a stranger's name here gets nothing."""
    assert client().get("/", headers={"host": host}).status_code == 421


@pytest.mark.parametrize("host", ["localhost:7860", "127.0.0.1", "[::1]:7860", "[::1]"])
def test_names_of_this_machine(host: str) -> None:
    assert client().get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1"])
def test_another_site_is_turned_away(origin: str) -> None:
    assert client().post("/gradio_api/queue/join", headers={"origin": origin}).status_code == 403


def test_the_page_itself_may_ask() -> None:
    headers = {"origin": "http://127.0.0.1:7860"}
    assert client().post("/gradio_api/queue/join", headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/", "/zh", "/gradio_api/queue/data", "/config", "/assets/x.js"])
def test_without_the_token_nothing_is_served(path: str) -> None:
    answer = client("secret").get(path)
    assert answer.status_code == 401
    assert "in" not in answer.text.split()


@pytest.mark.parametrize("wrong", ["", "Secret", "secre", "secrets", "sécret", "%00"])
def test_a_wrong_token(wrong: str) -> None:
    assert client("secret").get(f"/?token={wrong}").status_code == 401
    cookie = {"cookie": f"{COOKIE}_7860={wrong}".encode()}
    assert client("secret").get("/", headers=cookie).status_code == 401


def test_the_token_moves_into_a_cookie() -> None:
    asking = client("secret")
    answer = asking.get("/zh?token=secret")
    assert (answer.status_code, answer.headers["location"]) == (303, "/zh")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert asking.get("/").text == "in"  # which the client now has


def test_a_token_that_leads_elsewhere_is_no_redirect() -> None:
    answer = client("secret").get("//evil.example/?token=secret")
    assert not answer.headers.get("location", "").startswith("//")


@pytest.mark.parametrize(
    "path",
    [
        *("/gradio_api/upload", "/zh/gradio_api/file=/etc/passwd", "/gradio_api/proxy=http://x"),
        *("/gradio_api/process_recording", "/gradio_api/run-history/x", "/gradio_api/runs"),
        *("/openapi.json", "/docs", "/monitoring", "/gradio_api/component_server", "/file=/etc"),
        *("/assets/../gradio_api/upload", "/zh/zh/gradio_api/upload", "//gradio_api/upload"),
    ],
)
def test_files_go_neither_in_nor_out(path: str) -> None:
    assert client().get(path).status_code == 404
