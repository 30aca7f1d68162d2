"""`shardway serve DIR`: serve an exported folder through an OpenAI-compatible API.

    shardway serve runs/first/export                            on http://127.0.0.1:8000/v1
    shardway serve runs/first/export --dry-run                  only print the command
    shardway serve runs/first/export --host 0.0.0.0 --api-key-file key.txt
    shardway serve runs/first/export --engine vllm -- --tensor-parallel-size 2

The server is vLLM, SGLang or transformers serve: the first one that is installed next to Shardway,
or --engine. This process becomes the server. Arguments after -- are passed to the engine.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from launcher.chat.address import check_port, is_loopback
from launcher.chat.engines import (
    ENGINES,
    ServerCommand,
    ServeRequest,
    choose_engine,
    server_command,
)
from launcher.chat.target import find_target
from launcher.commands.arguments import command_parser
from launcher.errors import UserError
from launcher.folders.adapter import SETTINGS
from launcher.folders.checkpoint import Checkpoint
from launcher.folders.kind import is_run
from launcher.folders.run import RunDir

# Options that `serve` sets after checking them. An engine would use the last value it receives.
RESERVED_FLAGS = ("host", "port", "api-key", "api_key", "served-model-name", "served_model_name")
MAX_KEY_LENGTH = 4096


def main() -> None:
    """The command line."""
    words, extra = _split_at_double_dash(sys.argv[1:])
    arguments = _parser().parse_args(words)
    arguments.extra = extra
    serve(arguments)


def serve(arguments: argparse.Namespace) -> None:
    """Print the command, then replace this process with it. Raises UserError."""
    request = ServeRequest(
        model_folder(arguments.folder),
        arguments.host,
        arguments.port,
        arguments.name,
        arguments.api_key_file,
        _check_extra(arguments.extra),
    )
    engine, key = choose_engine(arguments.engine), _read_key(request.key_file)
    _check_host(request.host, engine, key)
    if not arguments.dry_run:
        check_port(request.host, request.port)
    server = server_command(engine, request)
    _print_server(server, request)
    if not arguments.dry_run:
        _exec(engine, server, key)


def _exec(engine: str, server: ServerCommand, key: str | None) -> NoReturn:
    """Replace this process with the server. Raises UserError if that fails."""
    argv, environment = server.argv, {**os.environ, **server.environment}
    if key is not None and engine == "vllm":
        environment["VLLM_API_KEY"] = key
    elif key is not None:
        argv = [*argv, *_key_file_arguments(key)]
    sys.stdout.flush()
    try:
        os.execvpe(argv[0], argv, environment)
    except OSError as error:
        raise UserError(f"{argv[0]} cannot be started: {error.strerror}") from error


def model_folder(path: Path) -> Path:
    """The absolute path of the folder. Raises UserError if a server cannot load it."""
    if is_run(path) and (RunDir(path).export / "config.json").is_file():
        raise UserError(f"{path} is a run; serve its export: shardway serve {RunDir(path).export}")
    is_adapter = (path / SETTINGS).is_file() or Checkpoint(path).adapter is not None
    if is_adapter or find_target(path).adapter is not None:
        raise UserError(
            f"{path} is an adapter, but servers load full models; make one: shardway consolidate "
            f"{path} --output DIR"
        )
    return path.absolute()


def _check_extra(words: Sequence[str]) -> tuple[str, ...]:
    """The arguments after --. Raises UserError for one that would override a checked option.

    Engines accept abbreviated options, so each prefix of a reserved flag is refused too.
    """
    for word in words:
        option = word.partition("=")[0]
        name = option.removeprefix("--")
        if option.startswith("--") and name and any(f.startswith(name) for f in RESERVED_FLAGS):
            raise UserError(
                f"{word} is not allowed after --; use the options of serve: --host, --port, "
                "--name, --api-key-file"
            )
    return tuple(words)


def _check_host(host: str, engine: str, key: str | None) -> None:
    if key is not None and engine == "transformers":
        raise UserError(
            "--api-key-file: transformers serve does not check keys, so only this machine may "
            "reach it; leave the option out, or choose --engine vllm"
        )
    if is_loopback(host) or key is not None:
        return
    if engine == "transformers":
        raise UserError(
            f"--host {host}: transformers serve does not check keys, so only this machine may "
            "reach it (127.0.0.1); choose --engine vllm, or use ssh -L"
        )
    raise UserError(
        f"--host {host} can be reached by others; require a key with --api-key-file FILE"
    )


def _read_key(file: Path | None) -> str | None:
    """The key in a file. Raises UserError; its message never contains the key."""
    if file is None:
        return None
    try:
        key = file.read_bytes()[: MAX_KEY_LENGTH + 1].decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not ASCII text"
        raise UserError(f"--api-key-file {file} cannot be read: {reason}") from error
    is_printable = all("!" <= character <= "~" for character in key)
    if not key or len(key) > MAX_KEY_LENGTH or not is_printable:
        raise UserError(
            f"--api-key-file {file} does not contain a key (one line without spaces); make one "
            "with (umask 077; openssl rand -hex 32 > FILE)"
        )
    if file.stat().st_mode & 0o077:
        print(f"warning: others can read {file}; run chmod 600 {file}", file=sys.stderr)
    return key


def _key_file_arguments(key: str) -> list[str]:
    """Write the key to a YAML file for SGLang: every user can see the arguments of a process.

    The file has mode 600. It stays, because this process no longer exists when the server ends.
    """
    handle, name = tempfile.mkstemp(prefix="shardway-serve-", suffix=".yaml")
    with os.fdopen(handle, "w") as file:
        file.write(f"api-key: {json.dumps(key)}\n")
    return ["--config", name]


def _print_server(server: ServerCommand, request: ServeRequest) -> None:
    """The command, the base URL, the model's name and an example request."""
    host = f"[{request.host}]" if ":" in request.host else request.host
    base_url = f"http://{host}:{request.port}/v1"
    question = {"model": server.model, "messages": [{"role": "user", "content": "Who are you?"}]}
    curl = ["curl", f"{base_url}/chat/completions", "-H", "Content-Type: application/json"]
    example = shlex.join([*curl, "-d", json.dumps(question)])
    if request.key_file is not None:
        file = shlex.quote(str(request.key_file))
        example += f' -H "Authorization: Bearer $(cat {file})"'
    print(server.to_shell())
    print(f"base URL  {base_url}\nmodel     {server.model}\n{example}")
    print(*server.notes, sep="\n", end="\n" * bool(server.notes), file=sys.stderr)


def _split_at_double_dash(words: list[str]) -> tuple[list[str], list[str]]:
    """The words before the first --, and the words after it."""
    index = words.index("--") if "--" in words else len(words)
    return words[:index], words[index + 1 :]


def _parse_port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port (1 to 65535)")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("serve", __doc__, "%(prog)s DIR [OPTIONS] [-- ENGINE ARGUMENTS]")
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="an exported folder, or any model folder")
    add("--engine", choices=("auto", *ENGINES), default="auto", help="(default: first installed)")
    add("--host", default="127.0.0.1", help="(default %(default)s: this machine only)")
    add("--port", type=_parse_port, default=8000, metavar="N", help="(default %(default)s)")
    add("--name", metavar="NAME", help="what requests call the model (vLLM, SGLang)")
    add("--api-key-file", type=Path, metavar="FILE", help="file with the key that requests need")
    add("--dry-run", action="store_true", help="print the command without running it")
    return parser
