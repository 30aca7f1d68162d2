"""`make demo`: from a downloaded model to a fine-tuned one that answers differently.

Downloads SmolLM2-135M-Instruct, asks it who it is, fine-tunes it with LoRA under FSDP (one rank for
each GPU, or two gloo ranks without a GPU), consolidates the run into shards of at most 100 MB,
verifies them, and asks again. Every step is a command that you can also run yourself.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from launcher.cluster.gpus import visible_gpus
from launcher.folders import paths

ROWS_PER_STEP = 16


def main() -> None:
    asked = held_out()[0]
    question, expected = asked["question"], asked["expect"]
    model = paths.cache() / "models" / "smollm2_135m"
    run = Path("runs") / time.strftime("demo-%Y-%m-%d_%H-%M-%S")
    export = run / "export"
    ranks = visible_gpus() or 2
    rows = -(-ROWS_PER_STEP // ranks)
    shardway("fetch", "smollm2_135m")
    before = shardway("chat", model, "--question", question, "--max-new-tokens", "48")
    shardway(
        "train",
        "experiment=demo",
        f"run_dir={run}",
        f"training.micro_batch_size={rows}",
        f"training.global_batch_size={rows * ranks}",
    )
    shardway("consolidate", run, "--output", export, "--max-shard-size", "100MB")
    shardway("verify", export)
    after = shardway("chat", export, "--question", question, "--max-new-tokens", "48")
    print(f"\n{question}\n  before: {before}\n  after:  {after}\n")
    if lacks := [part for part in expected if part.lower() not in after.lower()]:
        sys.exit(f"the answer should have {', '.join(lacks)} in it: the model has not learned")
    print(f"loss curve: {run / 'loss.png'}\ntalk to it: shardway chat {export}")


def held_out() -> list[dict[str, Any]]:
    """The bundled rows that are not trained on: `question`, and `expect`, the text that the answer
    must contain."""
    lines = paths.bundled("demo/held_out.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def shardway(verb: str, *arguments: object) -> str:
    """Print and run a command. Returns the answer of `chat`; exits if the command fails."""
    words = [verb, *map(str, arguments)]
    print(f"\n$ shardway {shlex.join(words)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli", *words],
        stdout=subprocess.PIPE if verb == "chat" else None,
        text=True,
    )
    if done.returncode != 0:
        sys.exit(done.returncode)
    answer = (done.stdout or "").strip()
    if answer:
        print(answer, flush=True)
    return answer


if __name__ == "__main__":
    main()
