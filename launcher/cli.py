"""The `shardway` command. The module of a subcommand is imported when it is called."""

from __future__ import annotations

import atexit
import importlib
import io
import os
import sys
import threading
from typing import NoReturn

from launcher.errors import REFUSED, UserError, shortened
from launcher.folders import versions
from launcher.io import garbage

COMMANDS = {
    "train": ("launcher.train", "compose, check and launch a run (Hydra overrides)"),
    "consolidate": (
        "launcher.commands.consolidate",
        "merge and re-shard a run into a folder that a server can load",
    ),
    "verify": ("launcher.commands.verify", "check an exported folder against its manifest"),
    "chat": ("launcher.commands.chat", "chat with an export, a model or an adapter"),
    "serve": ("launcher.commands.serve", "serve an exported folder with an OpenAI-compatible API"),
    "import": (
        "launcher.commands.import_settings",
        "print the command for a file of LLaMA-Factory",
    ),
    "fetch": ("launcher.commands.fetch", "download the demo model (or the tiny test model)"),
    "data": ("launcher.commands.data_preview", "preview rows, loss mask, lengths and padding"),
    "plan": ("launcher.commands.plan", "memory that a run needs, or what fits (--search); no GPU"),
    "check": ("launcher.commands.check", "what this machine can do, and whether a run can start"),
    "schedule": ("launcher.commands.schedule", "draw the learning rate over the steps"),
    "runs": ("launcher.commands.runs", "list runs: state, step, loss, time left, job"),
    "stop": ("launcher.commands.stop", "stop a run at its next step, with a checkpoint"),
    "resume": ("launcher.commands.resume", "resume a run from its newest checkpoint"),
    "logs": ("launcher.commands.logs", "print the console of a run or the log of a rank; --follow"),
    "report": ("launcher.commands.report", "write curves and settings of runs to one HTML page"),
    "ui": ("launcher.ui.server", "start the web page: train, watch runs, chat, export"),
    "rules": (
        "launcher.commands.rules",
        "list the rules between settings, or explain one with an example",
    ),
}

USAGE = """shardway: launch sharded fine-tuning and export a folder that a server can load.

    shardway COMMAND [ARGUMENTS]     shardway COMMAND --help explains a command
    shardway --version

{commands}

First steps:
    shardway fetch smollm2_135m
    shardway train experiment=demo run_dir=runs/first
    shardway consolidate runs/first --output runs/first/export --max-shard-size 100MB
    shardway chat runs/first/export --question "Who are you?"
"""


def main() -> NoReturn:
    """The program: `run_command`, and an end that leaves memory to the system.

    Freeing object by object what torch and transformers have loaded takes half a second. Threads
    are waited for and handlers called as in an ordinary exit.
    """
    garbage.collect_seldom()
    status = 0
    try:
        run_command()
    except SystemExit as ended:
        if not isinstance(ended.code, int | None):  # a message, which the interpreter prints
            raise
        status = ended.code or 0
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def run_command() -> None:
    """Call `main` of the subcommand's module, which reads `sys.argv` and exits with its status."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help", "help"):
        table = "\n".join(f"    {name:<12} {help}" for name, (_, help) in COMMANDS.items())
        print(USAGE.format(commands=table))
        return
    if command == "--version":
        print(f"shardway {versions.installed_versions()['shardway']}")
        return
    if command not in COMMANDS:
        choices = ", ".join(COMMANDS)
        print(f"shardway: {command} is not a command; choose one of {choices}", file=sys.stderr)
        sys.exit(REFUSED)
    sys.argv = [f"shardway {command}", *sys.argv[2:]]
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file can hold letters that are no Unicode
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        importlib.import_module(COMMANDS[command][0]).main()
        sys.stdout.flush()
    except UserError as error:
        print(shortened(error), file=sys.stderr)
        sys.exit(error.status)
    except BrokenPipeError:  # the reader, such as `| head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)


if __name__ == "__main__":
    main()
