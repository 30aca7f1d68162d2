"""`shardway ui`: the web page, on this machine alone unless it is told otherwise.

    shardway ui                              http://127.0.0.1:7860
    shardway ui --port 8000 --root . --root /data
    shardway ui --token                      asks for a token, on a machine with other users
    shardway ui --host 0.0.0.0               reachable from elsewhere, with a token only

Runs, exports and models work in processes of their own: neither a closed browser nor the end of
this server ends a run. Ctrl-C ends the server. What is on the page: docs/ui.md
"""

from __future__ import annotations

import argparse
import os
import secrets
import socket
import sys
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.serve import is_loopback
from launcher.ui.gate import Gate
from launcher.ui.places import Places

NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})


def main() -> None:
    """The command line. Exits with 2 where the page cannot be served."""
    asked = _parser().parse_args()
    try:
        places = Places.of(asked.root or [Path.cwd()])
        alone = is_loopback(asked.host)
        token = secrets.token_urlsafe(32) if asked.token or not alone else None
        listening = _listen(asked.host, asked.port)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    port = listening.getsockname()[1]
    host = f"[{asked.host}]" if ":" in asked.host else asked.host
    where = f"http://{host}:{port}/"
    os.chdir(places.home)  # runs/ is here, as for a command that is typed here
    app = application(places, token, NAMES | {host} if alone else None, port)
    print(f"shardway ui: {where}{f'?token={token}' if token else ''}", flush=True)
    print(f"roots: {', '.join(map(str, places.roots))}; Ctrl-C ends the page, not the runs")
    if not alone:
        print(
            "what passes between browser and page is not encrypted; safer is\n"
            f"    ssh -L {port}:127.0.0.1:{port} THIS_MACHINE   with shardway ui on 127.0.0.1",
            flush=True,
        )
    _serve(app, listening)


def application(places: Places, token: str | None, hosts: frozenset[str] | None, port: int) -> Gate:
    """The page in both languages, behind its gate."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio
    from fastapi import FastAPI

    from launcher.ui.page import STYLE, House, build, theme
    from launcher.ui.words import ENGLISH, chinese

    house = House(places)
    app: Any = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    for path, words in (("/zh", chinese()), ("/", ENGLISH)):  # "/" takes all that is left
        app = gradio.mount_gradio_app(
            app,
            build(house, words),
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
    return Gate(app, token, hosts, port)


def _listen(host: str, port: int) -> socket.socket:
    """A socket on `host` and `port`. Raises UserError where it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
        made.listen(128)
    except (OSError, OverflowError) as error:
        made.close()
        why = getattr(error, "strerror", None) or error
        raise UserError(
            f"--host {host} --port {port} cannot be listened on: {why} → another --port, or "
            "--port 0 for any that is free"
        ) from error
    return made


def _serve(app: Any, listening: socket.socket) -> None:
    import uvicorn

    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listening])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shardway ui",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="where to listen (default %(default)s)")
    add("--port", type=int, default=7860, help="0: any that is free (default %(default)s)")
    add(
        "--root",
        type=Path,
        action="append",
        metavar="DIR",
        help="what the page may read and write; again for more. Runs are in runs/ of the first "
        "(default: this folder)",
    )
    add("--token", action="store_true", help="ask for a token on loopback, too")
    return parser


if __name__ == "__main__":
    main()
