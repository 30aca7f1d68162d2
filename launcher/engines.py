"""The servers that can be started on a model folder, and their commands. None is imported."""

from __future__ import annotations

import importlib.util
import shlex
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from launcher.errors import UserError

ENGINES = {  # name → the packages that it needs here, and how they are installed
    "vllm": (("vllm",), "pip install vllm"),
    "sglang": (("sglang",), "pip install 'sglang[all]'"),
    "transformers": (
        ("transformers", "fastapi", "uvicorn", "openai", "pydantic"),
        "pip install 'transformers[serving]'",
    ),
}


@dataclass(frozen=True)
class Asked:
    """What a person asks of any engine."""

    folder: Path  # absolute
    host: str
    port: int
    name: str | None = None
    key: Path | None = None  # the file with it
    extra: tuple[str, ...] = ()  # arguments that the engine alone knows

    def where(self) -> list[str]:
        return ["--host", self.host, "--port", str(self.port)]


@dataclass(frozen=True)
class Server:
    """What the process becomes."""

    argv: list[str]
    model: str  # what requests call it
    environment: dict[str, str] = field(default_factory=dict)
    key: Path | None = None  # whose content goes into VLLM_API_KEY
    notes: tuple[str, ...] = ()

    def shown(self) -> str:
        """The command as a shell takes it, without the key."""
        words = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        if self.key is not None:
            words.append(f'VLLM_API_KEY="$(cat {shlex.quote(str(self.key))})"')
        return " ".join([*words, shlex.join(self.argv)])


def choose(wanted: str) -> str:
    """An engine that is installed. Raises UserError with the command that installs one."""
    if wanted != "auto":
        if lost := missing(wanted):
            raise UserError(
                f"--engine {wanted} needs {', '.join(lost)}, which this Python has not: "
                f"{ENGINES[wanted][1]}"
            )
        return wanted
    found = next((name for name in ENGINES if not missing(name)), None)
    if found is None:
        raise UserError(
            f"no server is installed here; the smallest is transformers' own, which needs "
            f"{', '.join(missing('transformers'))}: {ENGINES['transformers'][1]}"
        )
    return found


def missing(engine: str) -> list[str]:
    """The packages of an engine that cannot be imported; none of them is."""
    return [name for name in ENGINES[engine][0] if importlib.util.find_spec(name) is None]


def server_of(engine: str, asked: Asked) -> Server:
    """The command of an engine. Raises UserError for an option that it has not."""
    if engine == "transformers":
        return _transformers(asked)
    name = asked.name or _name(asked.folder)
    options = [*asked.where(), "--served-model-name", name, *asked.extra]
    if engine == "vllm":
        program = _program("vllm", "vllm.entrypoints.cli.main")
        return Server([*program, "serve", str(asked.folder), *options], name, key=asked.key)
    argv = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(asked.folder)]
    notes: tuple[str, ...] = ()
    if asked.key is not None:
        notes = (
            "the key is handed over in a file (--config), which only you can read and which stays "
            f"in {tempfile.gettempdir()}; SGLang may write its settings, the key too, into its log",
        )
    return Server([*argv, *options], name, notes=notes)


def _transformers(asked: Asked) -> Server:
    folder = str(asked.folder)
    if asked.name not in (None, folder):
        raise UserError(
            f"--name {asked.name}: transformers serve calls a model by its folder, {folder}; leave "
            "--name out, or choose --engine vllm"
        )
    if "@" in folder:
        raise UserError(
            f"{folder}: transformers serve takes what follows an @ for a revision; name the folder "
            "by a link without one"
        )
    program = _program("transformers", "transformers.cli.transformers")
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    return Server([*program, "serve", folder, *asked.where(), *asked.extra], folder, quiet)


def _program(name: str, module: str) -> list[str]:
    """The command beside this Python, or its module where the script is elsewhere."""
    script = Path(sys.executable).parent / name
    return [str(script)] if script.is_file() else [sys.executable, "-m", module]


def _name(folder: Path) -> str:
    """What requests call it: the run's name rather than `export`."""
    return folder.parent.name if folder.name == "export" else folder.name
