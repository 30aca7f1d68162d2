"""`shardway import`: the command that does what a file of another trainer does."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml

from launcher.commands.arguments import command_parser, number
from launcher.config import experiment
from launcher.config.compose import compose, hydra_message
from launcher.config.imports import llamafactory
from launcher.config.imports.translation import Translation
from launcher.errors import REFUSED, UserError, one_line
from launcher.folders import regular

ABOUT = """\
Print the command that does what a file of LLaMA-Factory does: train, export or chat.

    shardway import examples/train_lora/qwen3_lora_sft.yaml
    shardway import qwen3_full_sft_ds3.yaml --ranks 8 --output mine/experiment/qwen3.yaml
    shardway import llama3_lora_sft.yaml --accelerate fsdp2_config.yaml --ranks 2

Every key of the file is accounted for: it is in the command, it makes no difference here, or it has
no equivalent, with the reason. Settings that the file leaves out get LLaMA-Factory's defaults where
Shardway's own are different. Nothing is started. The file does not say on how many GPUs it runs:
--ranks does, because LLaMA-Factory's global batch is per device × accumulation × GPUs.

Exit status: 0, or 2 if a key has no equivalent.
"""


def main() -> None:
    options = _parser().parse_args()
    file: Path = options.file
    folders = [Path(), *file.absolute().parents]
    translation = llamafactory.translate(
        _read(file), folders, int(options.ranks), options.accelerate
    )
    if translation.verb == "train" and not translation.refused:
        _check(translation)
    if options.json:
        print(json.dumps(vars(translation), indent=2, ensure_ascii=False))
    else:
        print(describe(translation))
    if options.output and translation.verb != "train":
        raise UserError(f"--output writes an experiment, and {file} is for {translation.verb}")
    if options.output:
        experiment.write(options.output, translation.words)
        print(f"\nexperiment: {options.output}", file=sys.stderr)
    sys.exit(REFUSED if translation.refused else 0)


def describe(translation: Translation) -> str:
    """The command, and below it what becomes of each key that is not in it."""
    words = re.split(r" (?=--)", shlex.join(translation.words))  # an option with its value
    if translation.verb == "train":
        words = [shlex.quote(word) for word in translation.words]
    lines = [" \\\n    ".join([f"shardway {translation.verb}", *words])]
    tables = {
        "Different here:": translation.notes,
        "Without an effect on the result:": translation.ignored,
        "No equivalent:": translation.refused,
    }
    for title, table in tables.items():
        if table:
            width = min(34, max(map(len, table)))
            rows = [f"    {key:<{width}}  {reason}" for key, reason in table.items()]
            lines += ["", title, *rows]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("import", ABOUT)
    parser.add_argument("file", type=Path, metavar="FILE", help="a .yaml or .json file")
    parser.add_argument(
        "--ranks",
        type=number(int, 1),
        default=1,
        metavar="N",
        help="GPUs of the whole run (default 1)",
    )
    parser.add_argument(
        "--accelerate", type=Path, metavar="YAML", help="the file given to `accelerate launch`"
    )
    parser.add_argument(
        "--output", type=Path, metavar="YAML", help="also write an experiment, a new file"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _read(file: Path) -> dict[str, Any]:
    try:
        text = regular.read_text(file)
        content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        raise UserError(f"{file} cannot be read: {reason} → name a .yaml or .json file") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{file} has no settings → name a file of `llamafactory-cli train`")
    return content


def _check(translation: Translation) -> None:
    """Raises UserError if the schema refuses the command: a value of the file is impossible."""
    try:
        compose(translation.words)
    except UserError:
        raise
    except Exception as error:
        raise UserError(hydra_message(error)) from error
