"""`shardway serve DIR`: an OpenAI-compatible endpoint on an exported folder.

    shardway serve runs/first/export                            on http://127.0.0.1:8000/v1
    shardway serve runs/first/export --dry-run                  the command alone
    shardway serve runs/first/export --host 0.0.0.0 --api-key-file key.txt
    shardway serve runs/first/export --engine vllm -- --tensor-parallel-size 2

The server is vLLM's, SGLang's or transformers' own: the first of them that is installed beside
Shardway, or --engine. This process becomes the server. What stands after -- is the engine's.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import shlex
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from launcher.chat.subject import find, is_run
from launcher.checkpoint import layout
from launcher.config.adapter import SETTINGS
from launcher.engines import ENGINES, Asked, Server, choose, server_of
from launcher.errors import UserError
from launcher.run_dir import RunDir

# Given once, by `serve`, which has checked them: an engine would take the last that it is told.
OURS = ("host", "port", "api-key", "api_key", "served-model-name", "served_model_name")
LONGEST_KEY = 4096


def main() -> None:
    words, extra = _split(sys.argv[1:])
    arguments = _parser().parse_args(words)
    arguments.extra = extra
    try:
        serve(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def serve(arguments: argparse.Namespace) -> None:
    """Say what is run, and become it. Raises UserError."""
    asked = Asked(
        model_folder(arguments.folder),
        arguments.host,
        arguments.port,
        arguments.name,
        arguments.api_key_file,
        _extra(arguments.extra),
    )
    engine, key = choose(arguments.engine), _key(asked.key)
    _check_host(asked.host, engine, key)
    if not arguments.dry_run:
        check_port(asked.host, asked.port)
    server = server_of(engine, asked)
    _announce(server, asked)
    if not arguments.dry_run:
        _become(engine, server, key)


def _become(engine: str, server: Server, key: str | None) -> NoReturn:
    argv, environment = server.argv, {**os.environ, **server.environment}
    if key is not None and engine == "vllm":
        environment["VLLM_API_KEY"] = key
    elif key is not None:
        argv = [*argv, *_in_a_file(key)]
    sys.stdout.flush()
    try:
        os.execvpe(argv[0], argv, environment)
    except OSError as error:
        raise UserError(f"{argv[0]} cannot be started: {error.strerror}") from error


def model_folder(path: Path) -> Path:
    """The folder, absolute. Raises UserError when it is none that a server loads."""
    if is_run(path) and (RunDir(path).export / "config.json").is_file():
        raise UserError(f"{path} is a run; serve its export: shardway serve {RunDir(path).export}")
    adapter = (path / SETTINGS).is_file() or layout.Checkpoint(path).adapter is not None
    if adapter or find(path).adapter is not None:
        raise UserError(
            f"{path} is an adapter and servers load whole models; make one: shardway consolidate "
            f"{path} --output DIR"
        )
    return path.absolute()


def check_port(host: str, port: int) -> None:
    """Raises UserError when nothing can listen there now."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, ValueError) as error:  # ValueError: a name that is no host's
        why = (isinstance(error, OSError) and error.strerror) or error
        raise UserError(
            f"--host {host} --port {port} cannot be listened on ({why}); name another with --port "
            "or --host"
        ) from error


def _extra(words: Sequence[str]) -> tuple[str, ...]:
    """What stands after --. Raises UserError where it would undo what was checked; an engine takes
    the beginning of an option for it."""
    for word in words:
        option = word.partition("=")[0]
        said = option.removeprefix("--")
        if option.startswith("--") and said and any(ours.startswith(said) for ours in OURS):
            raise UserError(
                f"{word} after -- is said to serve itself: --host, --port, --name, --api-key-file"
            )
    return tuple(words)


def _check_host(host: str, engine: str, key: str | None) -> None:
    if key is not None and engine == "transformers":
        raise UserError(
            "--api-key-file: transformers serve asks for no key, so it listens on this machine "
            "alone; leave the option out, or choose --engine vllm"
        )
    if is_loopback(host) or key is not None:
        return
    if engine == "transformers":
        raise UserError(
            f"--host {host}: transformers serve asks for no key, so it listens on this machine "
            "alone (127.0.0.1); choose --engine vllm, or go through ssh -L"
        )
    raise UserError(
        f"--host {host} is open to others; give a key that they need with --api-key-file FILE"
    )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _key(file: Path | None) -> str | None:
    """The key in a file. Raises UserError, which does not show it."""
    if file is None:
        return None
    try:
        key = file.read_bytes()[: LONGEST_KEY + 1].decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no ASCII text"
        raise UserError(f"--api-key-file {file} cannot be read: {why}") from error
    if not key or len(key) > LONGEST_KEY or not all("!" <= sign <= "~" for sign in key):
        raise UserError(
            f"--api-key-file {file} holds no key: one line without spaces; make one with "
            "(umask 077; openssl rand -hex 32 > FILE)"
        )
    if file.stat().st_mode & 0o077:
        print(f"others can read {file}; chmod 600 {file}", file=sys.stderr)
    return key


def _in_a_file(key: str) -> list[str]:
    """SGLang reads the key from its argv or a YAML file, and the argv is everyone's to see. The
    file is mode 600; nothing is left of this process that could remove it."""
    handle, name = tempfile.mkstemp(prefix="shardway-serve-", suffix=".yaml")
    with os.fdopen(handle, "w") as file:
        file.write(f"api-key: {json.dumps(key)}\n")
    return ["--config", name]


def _announce(server: Server, asked: Asked) -> None:
    host = f"[{asked.host}]" if ":" in asked.host else asked.host
    base = f"http://{host}:{asked.port}/v1"
    question = {"model": server.model, "messages": [{"role": "user", "content": "Who are you?"}]}
    curl = ["curl", f"{base}/chat/completions", "-H", "Content-Type: application/json"]
    example = shlex.join([*curl, "-d", json.dumps(question)])
    if asked.key is not None:
        file = shlex.quote(str(asked.key))
        example += f' -H "Authorization: Bearer $(cat {file})"'
    print(server.shown())
    print(f"base URL  {base}\nmodel     {server.model}\n{example}")
    print(*server.notes, sep="\n", end="\n" * bool(server.notes), file=sys.stderr)


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """What stands before the first -- and behind it."""
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is no port (1 to 65535)")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shardway serve",
        usage="shardway serve DIR [OPTIONS] [-- ENGINE ARGUMENTS]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="an exported folder, or any model folder")
    add("--engine", choices=("auto", *ENGINES), default="auto")
    add("--host", default="127.0.0.1", help="(default %(default)s: this machine alone)")
    add("--port", type=_port, default=8000, metavar="N", help="(default %(default)s)")
    add("--name", metavar="NAME", help="what requests call the model (vLLM, SGLang)")
    add("--api-key-file", type=Path, metavar="FILE", help="whose key every request needs")
    add("--dry-run", action="store_true", help="print the command, run nothing")
    return parser


if __name__ == "__main__":
    main()
