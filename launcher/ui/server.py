"""`shardway ui`: the web page. By default only this machine can reach it.

    shardway ui                              http://127.0.0.1:7860
    shardway ui --port 8000 --root . --root /data
    shardway ui --token                      requires a token, for a machine with other users
    shardway ui --host 0.0.0.0               reachable from other machines, only with a token

Runs, exports and models are separate processes: neither closing the browser nor the end of this
server ends a run. Ctrl-C ends the server. The page is described in docs/ui.md.
"""

from __future__ import annotations

import argparse
import os
import secrets
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.chat.address import is_loopback
from launcher.errors import UserError
from launcher.ui.auth import AuthMiddleware
from launcher.ui.roots import Roots

if TYPE_CHECKING:
    from starlette.types import ASGIApp

LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})


def main() -> None:
    """The command line. Raises UserError if the page cannot be served."""
    arguments = _parser().parse_args()
    roots = Roots.of(arguments.root or [Path.cwd()])
    local_only = is_loopback(arguments.host)
    token = secrets.token_urlsafe(32) if arguments.token or not local_only else None
    listener = _listen(arguments.host, arguments.port)
    port = listener.getsockname()[1]
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    url = f"http://{host}:{port}/"
    os.chdir(roots.home)  # commands run here, so runs/ is here
    app = create_app(roots, token, LOOPBACK_NAMES | {host} if local_only else None, port)
    print(f"shardway ui: {url}{f'?token={token}' if token else ''}", flush=True)
    print(f"roots: {', '.join(map(str, roots.roots))}; Ctrl-C ends the page, not the runs")
    if not local_only:
        print(
            "the connection between browser and page is not encrypted; a safer way is\n"
            f"    ssh -L {port}:127.0.0.1:{port} THIS_MACHINE   with shardway ui on 127.0.0.1",
            flush=True,
        )
    _serve(app, listener)


def create_app(
    roots: Roots, token: str | None, hosts: frozenset[str] | None, port: int
) -> AuthMiddleware:
    """The page in both languages, behind access control. `hosts` None accepts any host name."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio
    from fastapi import FastAPI

    from launcher.ui.context import PageContext
    from launcher.ui.i18n import ENGLISH, chinese
    from launcher.ui.page import STYLE, build, theme

    context = PageContext(roots)
    app: Any = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    for path, translate in (("/zh", chinese()), ("/", ENGLISH)):  # "/" last: it matches every path
        app = gradio.mount_gradio_app(
            app,
            build(context, translate),
            path,
            show_error=False,
            allowed_paths=[],
            blocked_paths=["/"],
            footer_links=[],
            run_history=False,
            max_file_size=1,
            theme=theme(),
            css_paths=STYLE,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
        )
    return AuthMiddleware(app, token, hosts, port)


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens on `host` and `port`. Raises UserError if that is not possible."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot listen on --host {host} --port {port}: {reason} → another --port, or "
            "--port 0 for any free port"
        ) from error
    return listener


def _serve(app: ASGIApp, listener: socket.socket) -> None:
    import uvicorn

    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listener])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shardway ui",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    add("--port", type=int, default=7860, help="0: any free port (default %(default)s)")
    add(
        "--root",
        type=Path,
        action="append",
        metavar="DIR",
        help="a folder that the page may read and write; repeat for more. Runs are in runs/ of the "
        "first one (default: the current folder)",
    )
    add("--token", action="store_true", help="require a token on loopback too")
    return parser
