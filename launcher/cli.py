"""The `shardway` command: verbs, each imported when it is called."""

from __future__ import annotations

import importlib
import os
import sys

from launcher.errors import UserError

VERBS = {
    "train": ("launcher.train", "compose, check and launch a run (Hydra overrides)"),
    "consolidate": ("launcher.export.cli", "merge and re-shard a run into a folder that serves"),
    "verify": ("launcher.export.verify", "check an exported folder against its manifest"),
    "chat": ("launcher.chat.terminal", "talk to an export, a model or an adapter in the terminal"),
    "serve": ("launcher.serve", "an OpenAI-compatible endpoint on an exported folder"),
    "fetch": ("launcher.model.fetch", "fetch the demo model (or the tiny one of the tests)"),
    "data": ("launcher.preview", "preview rows, learnt tokens, lengths and padding"),
    "plan": ("launcher.plan", "how much memory a run will need; no GPU, no weights"),
    "schedule": ("launcher.schedule", "draw the learning rate of a configuration over its steps"),
    "runs": ("launcher.runs", "a table of run folders: state, step, loss, place in the queue"),
    "stop": ("launcher.runs:stop", "end a run at its next step, with a checkpoint"),
    "resume": ("launcher.runs:resume", "go on from a run's newest checkpoint"),
    "logs": ("launcher.runs:logs", "what a run or one of its ranks said; --follow"),
    "report": ("launcher.report", "curves and settings of runs, side by side in one HTML page"),
    "ui": ("launcher.ui.server", "the web page: train, look after runs, chat, export"),
    "rules": ("launcher.rules", "the rules between settings; explain one by an example"),
}

USAGE = """shardway: launch sharded fine-tuning, land a folder that a server can load.

    shardway VERB [ARGUMENTS]        shardway VERB --help teaches the verb

{verbs}

First steps:
    shardway fetch smollm2_135m
    shardway train experiment=demo run_dir=runs/first
    shardway consolidate runs/first --output runs/first/export --max-shard-size 100MB
    shardway chat runs/first/export --question "Who are you?"
"""


def main() -> None:
    """Hand over to the verb's own `main`, which reads `sys.argv` and exits with its status."""
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in ("-h", "--help", "help"):
        listed = "\n".join(f"    {name:<12} {what}" for name, (_, what) in VERBS.items())
        print(USAGE.format(verbs=listed))
        return
    if verb not in VERBS:
        print(f"shardway: {verb} is no verb; there are {', '.join(VERBS)}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"shardway {verb}", *sys.argv[2:]]
    try:
        module, _, function = VERBS[verb][0].partition(":")
        getattr(importlib.import_module(module), function or "main")()
        sys.stdout.flush()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader (`| head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)


if __name__ == "__main__":
    main()
