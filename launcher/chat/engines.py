"""The servers that can serve a model folder, and their commands. None of them is imported."""

from __future__ import annotations

import importlib.util
import shlex
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from launcher.errors import UserError

ENGINES = {  # name → the packages it needs in this environment, and the command to install them
    "vllm": (("vllm",), "pip install vllm"),
    "sglang": (("sglang",), "pip install 'sglang[all]'"),
    "transformers": (
        ("transformers", "fastapi", "uvicorn", "openai", "pydantic"),
        "pip install 'transformers[serving]'",
    ),
}


@dataclass(frozen=True)
class ServeRequest:
    """The options of `shardway serve` that every engine has."""

    folder: Path  # absolute
    host: str
    port: int
    name: str | None = None  # what requests call the model
    key_file: Path | None = None  # contains the API key
    extra: tuple[str, ...] = ()  # arguments of the engine, passed on unchanged

    def address_arguments(self) -> list[str]:
        """`--host` and `--port`, which every engine understands."""
        return ["--host", self.host, "--port", str(self.port)]


@dataclass(frozen=True)
class ServerCommand:
    """The command that starts a server."""

    argv: list[str]
    model: str  # what requests call the model
    environment: dict[str, str] = field(default_factory=dict)
    key_file: Path | None = None  # its content goes into VLLM_API_KEY
    notes: tuple[str, ...] = ()

    def to_shell(self) -> str:
        """The command as typed in a shell, without the key."""
        words = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        if self.key_file is not None:
            words.append(f'VLLM_API_KEY="$(cat {shlex.quote(str(self.key_file))})"')
        return " ".join([*words, shlex.join(self.argv)])


def choose_engine(requested: str) -> str:
    """The name of an installed engine: `requested`, or for "auto" the first one that is installed.

    Raises UserError with the command that installs an engine if none is installed.
    """
    if requested != "auto":
        if packages := missing_packages(requested):
            raise UserError(
                f"--engine {requested} needs packages that are not installed here "
                f"({', '.join(packages)}): {ENGINES[requested][1]}"
            )
        return requested
    installed = next((name for name in ENGINES if not missing_packages(name)), None)
    if installed is None:
        raise UserError(
            f"no server is installed; the smallest is the one of transformers, which needs "
            f"{', '.join(missing_packages('transformers'))}: {ENGINES['transformers'][1]}"
        )
    return installed


def missing_packages(engine: str) -> list[str]:
    """The packages of an engine that are not installed. Imports none of them."""
    return [name for name in ENGINES[engine][0] if importlib.util.find_spec(name) is None]


def server_command(engine: str, request: ServeRequest) -> ServerCommand:
    """The command of an engine. Raises UserError for an option that the engine does not support."""
    if engine == "transformers":
        return _transformers_command(request)
    name = request.name or _default_model_name(request.folder)
    options = [*request.address_arguments(), "--served-model-name", name, *request.extra]
    if engine == "vllm":
        program = _program("vllm", "vllm.entrypoints.cli.main")
        argv = [*program, "serve", str(request.folder), *options]
        return ServerCommand(argv, name, key_file=request.key_file)
    argv = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(request.folder)]
    notes: tuple[str, ...] = ()
    if request.key_file is not None:
        notes = (
            "SGLang receives the key in a file (--config) that only you can read. It stays in "
            f"{tempfile.gettempdir()}. SGLang may also write the key to its log.",
        )
    return ServerCommand([*argv, *options], name, notes=notes)


def _transformers_command(request: ServeRequest) -> ServerCommand:
    folder = str(request.folder)
    if request.name not in (None, folder):
        raise UserError(
            f"--name {request.name}: transformers serve names a model by its folder, {folder}; "
            "leave --name out, or choose --engine vllm"
        )
    if "@" in folder:
        raise UserError(
            f"{folder}: transformers serve reads the part after an @ as a revision; use a link "
            "whose path has no @"
        )
    program = _program("transformers", "transformers.cli.transformers")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    argv = [*program, "serve", folder, *request.address_arguments(), *request.extra]
    return ServerCommand(argv, folder, offline)


def _program(name: str, module: str) -> list[str]:
    """The script next to this Python, or its module if the script is installed elsewhere."""
    script = Path(sys.executable).parent / name
    return [str(script)] if script.is_file() else [sys.executable, "-m", module]


def _default_model_name(folder: Path) -> str:
    """The folder's name. For RUN/export it is the run's name."""
    return folder.parent.name if folder.name == "export" else folder.name
